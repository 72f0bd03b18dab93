"""Other people's training loops and experiment trackers, with this package's numbers in them.

``QATCallback`` brings noise, phases and audit into the trainers of transformers and TRL; the
trackers show a run in TensorBoard, W&B, MLflow or SwanLab. Both need packages of their own, which
are imported where they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_qat.integrations.trackers import Tracker, Trackers, open_trackers
    from npu_qat.integrations.trainer_callback import QATCallback

_HOME = {
    "QATCallback": "trainer_callback",
    "Tracker": "trackers",
    "Trackers": "trackers",
    "open_trackers": "trackers",
}
__all__ = ["QATCallback", "Tracker", "Trackers", "open_trackers"]


def __getattr__(name: str) -> Any:
    """Import a name on first use (PEP 562): transformers takes seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'npu_qat.integrations' has no attribute {name!r}")
    return getattr(import_module(f"npu_qat.integrations.{_HOME[name]}"), name)
