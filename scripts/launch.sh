#!/usr/bin/env bash
# Train a preset: launch.sh PRESET [PROCESSES] [options of npu-qat train]
#
# The launchers beside this file have the names that the design documents use and call it with the
# preset that reproduces them. Where those scripts read variables, these do:
#   MODEL_PATH   model.path        TRAIN_DATA   task.path, a folder with train and test files
#   PYTHON       the interpreter in which npu-qat is installed (default: python)
set -euo pipefail

if (($# == 0)); then
  echo "usage: launch.sh PRESET [PROCESSES] [options of npu-qat train]" >&2
  exit 2
fi
preset=$1
shift
processes=1
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  processes=$1
  shift
fi
options=(--preset "$preset")
if [[ -n ${MODEL_PATH:-} ]]; then options+=(--set "model.path=$MODEL_PATH" --set model.revision=null); fi
if [[ -n ${TRAIN_DATA:-} ]]; then options+=(--set "task.path=$TRAIN_DATA"); fi
python=${PYTHON:-python}
if ! command -v "$python" >/dev/null; then
  echo "error: there is no $python; set PYTHON to the interpreter that has npu-qat" >&2
  exit 2
fi
program=("$python" -m)
if ((processes > 1)); then
  program+=(torch.distributed.run --standalone --nproc_per_node "$processes" -m)
fi
exec "${program[@]}" npu_qat train "${options[@]}" "$@"
