#!/usr/bin/env bash
# E13j as it was run: uniform AQN, sigma 0.05 to 0.0005.
exec "$(dirname "$0")/launch.sh" log-e13j "$@"
