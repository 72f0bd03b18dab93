#!/usr/bin/env bash
# The log's E13d-nvfp4: PRE-hook.
exec "$(dirname "$0")/launch.sh" log-e13d "$@"
