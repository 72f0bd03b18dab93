#!/usr/bin/env bash
# E6b: MXFP4 W4A16 + LoRA + uniform AQN.
exec "$(dirname "$0")/launch.sh" log-e6b "$@"
