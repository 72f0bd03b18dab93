#!/usr/bin/env bash
# E6a: MXFP4 W4A16 + LoRA.
exec "$(dirname "$0")/launch.sh" log-e6a "$@"
