#!/usr/bin/env bash
# The plan's E13c: W4A4, noise on layers 6 to 15 only.
exec "$(dirname "$0")/launch.sh" plan-e13c "$@"
