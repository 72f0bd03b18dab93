"""Who computes the numbers: one protocol, one selection, one backend a kind of device."""

from npu_qat.backends.base import Backend, BackendUnavailable
from npu_qat.backends.emulation import EmulationBackend
from npu_qat.backends.selection import Selection, probe_devices, select

__all__ = [
    "Backend",
    "BackendUnavailable",
    "EmulationBackend",
    "Selection",
    "probe_devices",
    "select",
]
