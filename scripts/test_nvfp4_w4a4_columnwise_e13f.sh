#!/usr/bin/env bash
# The log's E13f-nvfp4: weight blocks along the columns.
exec "$(dirname "$0")/launch.sh" log-e13f "$@"
