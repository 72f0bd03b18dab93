"""What devices can do at best: one table, and for each figure where it comes from.

A figure that no vendor has published, or that nobody here has read, is absent, and a plan that
needs it asks the user for it (``--memory-gib``, ``--tflops``, ``--bandwidth``, ``--link``). Dense
rates, without sparsity.

Peaks alone predict nothing: a plan multiplies them by efficiencies that were measured
(``calibration.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

GB = 10**9
DATASHEET = "vendor's statement (data sheet)"
ANNOUNCED = "vendor's statement (announcement of September 2025)"
READ = "read (a published host configuration)"
GIVEN = "given by the user"


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: for people.
        kind: ``cuda`` or ``npu``.
        memory: bytes.
        flops: dense bf16 flop/s.
        flops_fp8, flops_fp4: the same in fewer bits, for information.
        bandwidth: of its memory, bytes/s.
        link: to the other devices of its host, bytes/s in one direction.
        evidence: where the figures come from.
        multiplies_codes: its matmul reads 4-bit codes (``layers/matmul.py``, fused).
    """

    name: str
    kind: str
    memory: float | None = None
    flops: float | None = None
    flops_fp8: float | None = None
    flops_fp4: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    evidence: str = DATASHEET
    multiplies_codes: bool = False

    @property
    def fused(self) -> bool:
        """Whether this version has fused norms and activations for it (``layers/fusion.py``)."""
        return self.kind == "cuda"

    def missing(self) -> list[str]:
        """Options that would give the figures that step times need and the table lacks."""
        wanted = {
            "--memory-gib": self.memory,
            "--tflops": self.flops,
            "--bandwidth": self.bandwidth,
            "--link": self.link,
        }
        return [option for option, value in wanted.items() if value is None]


HARDWARE = {
    "a100-40gb": Hardware(
        "NVIDIA A100 SXM 40 GB", "cuda", 40 * GB, 312e12, None, None, 1555e9, 300e9
    ),
    "a100-80gb": Hardware(
        "NVIDIA A100 SXM 80 GB", "cuda", 80 * GB, 312e12, None, None, 2039e9, 300e9
    ),
    "h100": Hardware(
        "NVIDIA H100 SXM 80 GB", "cuda", 80 * GB, 989e12, 1979e12, None, 3350e9, 450e9
    ),
    "h200": Hardware(
        "NVIDIA H200 SXM 141 GB", "cuda", 141 * GB, 989e12, 1979e12, None, 4800e9, 450e9
    ),
    "l40s": Hardware("NVIDIA L40S 48 GB", "cuda", 48 * GB, 362e12, 733e12, None, 864e9, 32e9),
    "ascend-910b": Hardware("Ascend 910B (A2)", "npu", evidence="no figure that we have read"),
    "ascend-910c": Hardware("Ascend 910C (A3), one die", "npu", 64 * GB, evidence=READ),
    "ascend-950pr": Hardware(
        "Ascend 950PR", "npu", 128 * GB, None, 1e15, 2e15, 1600e9, None, ANNOUNCED, True
    ),
    "ascend-950dt": Hardware(
        "Ascend 950DT", "npu", 144 * GB, None, 1e15, 2e15, 4000e9, None, ANNOUNCED, True
    ),
}


def find_hardware(
    name: str,
    *,
    memory_gib: float | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    link: float | None = None,
) -> Hardware:
    """The device called ``name`` with the figures that the user gave over the table's.

    Args:
        name: a key of ``HARDWARE``.
        memory_gib: GiB of memory.
        tflops: dense bf16 Tflop/s.
        bandwidth: GB/s of its memory.
        link: GB/s to another device, one direction.

    Raises:
        ValueError: an unknown name, or a figure that is not positive and finite.
    """
    if name not in HARDWARE:
        raise ValueError(f"unknown --soc {name!r}; choose from {', '.join(HARDWARE)}")
    given = {
        "memory": None if memory_gib is None else memory_gib * 2**30,
        "flops": None if tflops is None else tflops * 1e12,
        "bandwidth": None if bandwidth is None else bandwidth * GB,
        "link": None if link is None else link * GB,
    }
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if wrong := [key for key, value in changes.items() if not 0 < value < math.inf]:
        raise ValueError(f"--soc {name}: {wrong[0]} must be positive and finite")
    found = HARDWARE[name]
    if not changes:
        return found
    evidence = f"{found.evidence}; {', '.join(changes)} {GIVEN}"
    return replace(found, **changes, evidence=evidence)
