"""Where the kernels run in these tests: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"


def _interpreter_is_off() -> bool:
    from npu_qat.backends.cuda import launch

    return INTERPRETED and not launch.interpreted()


needs_kernels = [
    pytest.mark.skipif(
        _interpreter_is_off(), reason="Triton was imported before it could be told to interpret"
    ),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
