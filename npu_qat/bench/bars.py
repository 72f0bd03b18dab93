"""What this project asks of itself: the largest ratio to the baseline that a row may have.

The bars were set before the code was written, for one GPU (H100) and for two CPU cores; other rows
have none. ``bench`` prints them beside the ratio, so that a bar that is not reached is seen.
"""

from __future__ import annotations

import re

_GPU_LINEAR = r"(q-1536x1536|gate-1536x8960|down-8960x1536)/4096-tokens"
_GPU_STEP = r"qwen2\.5-1\.5b/4x2048-tokens/(plain|checkpointing)"
_BARS = (
    (r"fake-quant/cuda-ascend950/bfloat16/8192x(8192|8960)", 1.02),
    (r"fake-quant/cuda-ascend950/bfloat16/(8192|2048)x1536", 1.05),
    (r"fake-quant/cpu-ascend950/bfloat16/4096x4096", 1.5),
    (rf"linear/image(-fp8)?-[\w-]+/{_GPU_LINEAR}", 1.10),
    (rf"linear/packed(-fp8)?-[\w-]+/{_GPU_LINEAR}", 1.25),
    (rf"train-step/image(-fp8)?-[\w-]+/{_GPU_STEP}", 1.05),
    (rf"train-step/packed(-fp8)?-[\w-]+/{_GPU_STEP}", 1.15),
    (r"memory/packed-ascend950/weights", 0.27),
    (r"memory/packed-nvfp4-one-level/weights", 0.285),
    (r"decode/packed-ascend950/qwen2\.5-1\.5b/batch-8/256-tokens", 1 / 1.3),
    (r"dapo-step/w4a4-ascend950/demo", 1.3),
)


def bar_of(name: str) -> float | None:
    """The largest ratio that the row ``name`` may have, or None without a bar."""
    return next((bar for pattern, bar in _BARS if re.fullmatch(pattern, name)), None)


def verdict(name: str, ratio: float) -> str:
    """``<= 1.10 met``, ``<= 1.10 missed``, or nothing for a row without a bar."""
    bar = bar_of(name)
    if bar is None:
        return ""
    return f"<= {bar:.3g} {'met' if ratio <= bar else 'missed'}"
