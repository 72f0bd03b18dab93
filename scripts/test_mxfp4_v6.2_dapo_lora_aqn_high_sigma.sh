#!/usr/bin/env bash
# E12: MXFP4 W4A16 + LoRA + epoch-aware AQN.
exec "$(dirname "$0")/launch.sh" log-e12 "$@"
