"""The table in the kernels' README is what the count gives."""

from __future__ import annotations

import ctypes

from kernels_ascendc.roofline import measure, table
from tests.kernels_ascendc.host_model import KERNELS


def test_the_readme_holds_the_counted_table(library):
    costs = measure(ctypes.CDLL(str(library)))
    assert table(costs, 1.6e12, 40, 1.8e9) in (KERNELS / "README.md").read_text()
    assert round(costs[0].bytes_moved, 2) == 4.0  # read two, write two
