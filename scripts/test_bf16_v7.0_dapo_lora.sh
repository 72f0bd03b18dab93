#!/usr/bin/env bash
# E7a: BF16 + LoRA.
exec "$(dirname "$0")/launch.sh" log-e7a "$@"
