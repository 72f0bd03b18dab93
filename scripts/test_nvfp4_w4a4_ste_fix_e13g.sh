#!/usr/bin/env bash
# The log's E13g-nvfp4: with the straight-through estimator.
exec "$(dirname "$0")/launch.sh" log-e13g "$@"
