#!/usr/bin/env bash
# The log's E13c-nvfp4: quantised in training only.
exec "$(dirname "$0")/launch.sh" log-e13c "$@"
