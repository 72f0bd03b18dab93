#!/usr/bin/env bash
# The plan's E13d: W4A4, noise x 1.5 on layers 6 to 15.
exec "$(dirname "$0")/launch.sh" plan-e13d "$@"
