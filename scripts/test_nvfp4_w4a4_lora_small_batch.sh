#!/usr/bin/env bash
# The log's E13b-nvfp4: 16 prompts a step.
exec "$(dirname "$0")/launch.sh" log-e13b "$@"
