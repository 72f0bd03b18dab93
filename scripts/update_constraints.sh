#!/usr/bin/env bash
# Resolve constraints.txt and constraints-npu.txt for every supported Python ("make constraints").
# Versions already in a file are kept where they still fit; delete a line to get the newest.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# resolve FILE [PIN...]: the comment at its head stays; CUDA packages are torch's own business.
resolve() {
    local file=$1
    shift
    printf '%s\n' "$@" >"$work/pins.txt"
    grep -v '^torch-npu==' "$file" >"$work/out.txt"
    uv pip compile --quiet --universal --python-version 3.10 --no-sources --extra dev \
        --extra wandb --extra mlflow --extra swanlab \
        --no-annotate --no-header --constraint "$work/pins.txt" --output-file "$work/out.txt" \
        pyproject.toml
    { grep '^#' "$file"; grep -vE '^(nvidia-|cuda-|triton==)|emscripten' "$work/out.txt"; } \
        >"$work/new.txt"
    mv "$work/new.txt" "$file"
}

npu_torch=$(sed -n 's/^torch==//p' constraints-npu.txt)
npu_transformers=$(sed -n 's/^transformers==//p' constraints-npu.txt)
torch_npu=$(sed -n 's/^torch-npu==//p' constraints-npu.txt)
resolve constraints.txt
resolve constraints-npu.txt "torch==$npu_torch" "transformers==$npu_transformers"
sed -i "s/^torch==.*/&\ntorch-npu==$torch_npu/" constraints-npu.txt
