"""Who computes the numbers: one protocol, one selection, one backend a kind of device."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_qat.backends.base import (
        Backend,
        BackendUnavailable,
        EncodedInput,
        FusedBackend,
        FusedOnRequest,
        PackedWeight,
    )
    from npu_qat.backends.emulation import EmulationBackend
    from npu_qat.backends.selection import Selection, probe_devices, select

_HOME = {
    "Backend": "base",
    "BackendUnavailable": "base",
    "EncodedInput": "base",
    "FusedBackend": "base",
    "FusedOnRequest": "base",
    "PackedWeight": "base",
    "EmulationBackend": "emulation",
    "Selection": "selection",
    "probe_devices": "selection",
    "select": "selection",
}
__all__ = [
    "Backend",
    "BackendUnavailable",
    "EmulationBackend",
    "EncodedInput",
    "FusedBackend",
    "FusedOnRequest",
    "PackedWeight",
    "Selection",
    "probe_devices",
    "select",
]


def __getattr__(name: str) -> Any:
    # What is installed (npu_installation) can be looked at where torch cannot be imported.
    if name in _HOME:
        return getattr(import_module(f"npu_qat.backends.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
