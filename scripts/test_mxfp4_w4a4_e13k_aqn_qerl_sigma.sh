#!/usr/bin/env bash
# E13k as it was run: uniform AQN, sigma 0.01 to 0.0001.
exec "$(dirname "$0")/launch.sh" log-e13k "$@"
