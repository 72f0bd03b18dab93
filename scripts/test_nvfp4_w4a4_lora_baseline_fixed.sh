#!/usr/bin/env bash
# The log's E13a-nvfp4: POST-hook, no estimator.
exec "$(dirname "$0")/launch.sh" log-e13a "$@"
