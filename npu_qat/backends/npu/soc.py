"""Ascend chips: what each can compute of MXFP4, by the number or the name that torch_npu reports.

Only the Ascend 950 has FP4: its operators quantise and multiply 4-bit codes. A2 and A3 have int4
and int8 matmuls but no FP4, FP8 or E8M0 at all (their ACLNN calls return 361001), so MXFP4 is
emulated there in 16 bits: by this project's AscendC kernels if they are built, else in plain torch.
The older and the inference chips are refused: no bf16 training that this program could promise.

Numbers are those of ``torch_npu.npu.get_soc_version()``. The number decides, since npu-smi and
drivers print "Ascend910" for chips of three generations; the name decides for a number that is
unknown here. A chip that neither identifies is refused. (All read in op-plugin, vllm-ascend,
torchtitan-npu and the operators' product tables; nothing was run on a chip.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["950", "A3", "A2", "310P", "310B", "910A", "unknown"]

# First and last number of a family.
_NUMBERS: tuple[tuple[int, int, Family], ...] = (
    (100, 104, "910A"),
    (200, 205, "310P"),
    (220, 225, "A2"),
    (240, 243, "310B"),
    (250, 256, "A3"),
    (260, 260, "950"),
)
_NAMES: tuple[tuple[str, Family], ...] = (
    (r"Ascend950|Ascend910_95", "950"),
    (r"Ascend910_93", "A3"),
    (r"Ascend910B[1-4]", "A2"),
    (r"Ascend310P", "310P"),
    (r"Ascend310B", "310B"),
    (r"Ascend910(A|B$|Pro|Premium)", "910A"),
)
_REFUSED: dict[Family, str] = {
    "310P": "an inference chip without bf16",
    "310B": "an inference chip without bf16",
    "910A": "the first generation, without bf16",
    "unknown": "not a chip that this version knows (it knows Ascend 950, A3 and A2)",
}


@dataclass(frozen=True)
class Soc:
    """One kind of chip.

    Attributes:
        name: as reported.
        number: of ``get_soc_version``, or None where it could not be had.
        family: the row of the table.
    """

    name: str
    number: int | None
    family: Family

    @property
    def fused(self) -> bool:
        """Whether it multiplies FP4 codes."""
        return self.family == "950"

    @property
    def refusal(self) -> str | None:
        """Why this program does not run on it, or None."""
        reason = _REFUSED.get(self.family)
        return None if reason is None else f"{self} is {reason}"

    @property
    def capability(self) -> str:
        """One line for people."""
        if self.refusal is not None:
            return f"refused: {self.refusal}"
        if self.fused:
            return "MXFP4 operators and matmul"
        return "no FP4 operators: MXFP4 is emulated in 16 bits"

    def __str__(self) -> str:
        number = "" if self.number is None else f", number {self.number}"
        family = "" if self.family == "unknown" else f", {self.family}"
        return f"{self.name} (SoC{family}{number})"


def identify(name: str, number: int | None) -> Soc:
    """The chip called ``name`` with ``number``."""
    for first, last, family in _NUMBERS:
        if number is not None and first <= number <= last:
            return Soc(name, number, family)
    for pattern, family in _NAMES:
        if re.match(pattern, name):
            return Soc(name, number, family)
    return Soc(name, number, "unknown")


def current_soc(npu: Any) -> Soc:
    """The first device of ``npu``, which is ``torch.npu``."""
    try:
        number = int(npu.get_soc_version())
    except (AttributeError, RuntimeError, TypeError, ValueError):
        number = None  # some builds do not say; the name may do
    return identify(str(npu.get_device_name(0)), number)
