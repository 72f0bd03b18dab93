#!/usr/bin/env bash
# The log's E13e-nvfp4: hooks on the wrappers only.
exec "$(dirname "$0")/launch.sh" log-e13e "$@"
