"""What a kernel has to do, counted on the host model, and the time that would take on a chip.

    python -m kernels_ascendc.roofline [--bandwidth 1.6e12] [--cores 40] [--clock 1.8e9]

Two lower bounds of a kernel's time: the bytes it copies from and to memory over the memory's
bandwidth, and the vector instructions it issues, 256 bytes a cycle and core, over cores and clock.
The counts come from running the kernel's source on the host model. The three numbers of the chip
are arguments: their defaults are what is commonly reported of an Ascend 910B and were neither
measured nor found in a data sheet. So the times are predictions to compare a measurement with, and
no measurements.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kernels_ascendc.build import BuildError, build_host

ROWS, LENGTH = 64, 8192
VALUES = ROWS * LENGTH


class Tiling(ctypes.Structure):
    """`Mxfp4Tiling` of include/npu_qat/mxfp4.h, the rule's four numbers at its end."""

    _fields_ = (
        ("rows", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("bump", ctypes.c_int32),
        ("nan_above", ctypes.c_int32),
        ("tiny_scale", ctypes.c_int32),
        ("nudge", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Cost:
    """Of one kernel, a value of x: bytes from and to memory, and vector cycles of one core."""

    kernel: str
    bytes_moved: float
    cycles: float


# Names of the tensors of each kernel by their bytes, in the order of its arguments.
KERNELS = {
    "mxfp4_fake_quant": (2 * VALUES, 2 * VALUES),
    "mxfp4_pack": (2 * VALUES, VALUES // 2, VALUES // 32),
    "mxfp4_dequant": (VALUES // 2, VALUES // 32, 2 * VALUES),
    "rms_norm_mxfp4_fake_quant": (2 * VALUES, 2 * LENGTH, 2 * VALUES, 2 * VALUES),
}


def measure(library: ctypes.CDLL) -> list[Cost]:
    """Run each kernel once on zeros in bf16 [64, 8192]; the counts do not depend on values."""
    library.vector_repeats.restype = library.bytes_copied.restype = ctypes.c_uint64
    tiling = Tiling(ROWS, LENGTH, 0, 0x7F7F, 0, 8)  # the rule of profile ascend950
    costs = []
    for kernel, sizes in KERNELS.items():
        before = library.vector_repeats(), library.bytes_copied()
        tensors = [ctypes.create_string_buffer(size) for size in sizes]
        last = [ctypes.c_float(1e-6)] if kernel.startswith("rms_norm") else []
        launch = getattr(library, f"launch_{kernel}_bf16")
        launch(ctypes.c_int64(8), *tensors, ctypes.byref(tiling), *last)
        repeats = library.vector_repeats() - before[0]
        copied = library.bytes_copied() - before[1]
        costs.append(Cost(kernel, copied / VALUES, repeats / VALUES))
    return costs


def table(costs: list[Cost], bandwidth: float, cores: int, clock: float) -> str:
    """Markdown; a pass goes through 64 floats; times in milliseconds for 8192 x 8192 values."""
    values = 8192 * 8192
    lines = [
        "| kernel, bf16 | bytes a value | vector passes a value | memory, ms | vector unit, ms |",
        "|---|---|---|---|---|",
    ]
    for cost in costs:
        memory = 1e3 * values * cost.bytes_moved / bandwidth
        vector = 1e3 * values * cost.cycles / (cores * clock)
        lines.append(
            f"| `{cost.kernel}` | {cost.bytes_moved:.2f} | {64 * cost.cycles:.1f} "
            f"| {memory:.2f} | {vector:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="kernels_ascendc.roofline", description="Count the work of the kernels."
    )
    parser.add_argument(
        "--bandwidth", type=float, default=1.6e12, help="of the memory, bytes a second"
    )
    parser.add_argument("--cores", type=int, default=40, help="vector cores")
    parser.add_argument(
        "--clock", type=float, default=1.8e9, help="of a vector core, cycles a second"
    )
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = ctypes.CDLL(str(build_host(Path(folder) / "kernels.so")))
            costs = measure(library)
    except BuildError as error:
        print(f"kernels_ascendc.roofline: {error}", file=sys.stderr)
        return 2
    print(table(costs, arguments.bandwidth, arguments.cores, arguments.clock))
    return 0


if __name__ == "__main__":
    sys.exit(main())
