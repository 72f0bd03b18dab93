"""AQN, adaptive quantization noise: how strong (schedule), where (multipliers), and the injector.

``AQN`` needs torch and is imported on first use; schedules and multipliers do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npu_qat.noise.multipliers import LayerMultipliers
from npu_qat.noise.schedule import Schedule, Stage

if TYPE_CHECKING:
    from npu_qat.noise.injector import AQN, NoiseError, NoiseRecord, StageCheck

__all__ = [
    "AQN",
    "LayerMultipliers",
    "NoiseError",
    "NoiseRecord",
    "Schedule",
    "Stage",
    "StageCheck",
]

_FROM_INJECTOR = ("AQN", "NoiseError", "NoiseRecord", "StageCheck")


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use (PEP 562)."""
    if name not in _FROM_INJECTOR:
        raise AttributeError(f"module 'npu_qat.noise' has no attribute {name!r}")
    from npu_qat.noise import injector

    return getattr(injector, name)
