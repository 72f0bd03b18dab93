#!/usr/bin/env bash
# The plan's E13b: W4A4, noise on all layers.
exec "$(dirname "$0")/launch.sh" plan-e13b "$@"
