"""Which machine computes: what decides the order of a floating-point sum."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor(device: torch.device) -> str:
    """The name of the processor behind ``device``."""
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and module is not None:
        return str(module.get_device_name(device.index or 0))
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
