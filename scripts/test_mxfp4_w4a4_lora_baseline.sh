#!/usr/bin/env bash
# E13a, MXFP4 W4A4 without noise. The plan and the log name this one script and mean different runs,
# so say which: test_mxfp4_w4a4_lora_baseline.sh plan|log [PROCESSES] [options of npu-qat train]
case ${1:-} in
  plan) preset=plan-e13a ;;        # with the straight-through estimator, as planned
  log) preset=log-e13a-mxfp4 ;;    # without it, as run
  *)
    echo "error: say which E13a: '$(basename "$0") plan' (preset plan-e13a) or" \
      "'$(basename "$0") log' (preset log-e13a-mxfp4)" >&2
    exit 2
    ;;
esac
shift
exec "$(dirname "$0")/launch.sh" "$preset" "$@"
