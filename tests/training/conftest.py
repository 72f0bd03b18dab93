"""A process group of one, as the plain command line makes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from npu_qat.training.engine import launch_environment, shut_down


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """DeepSpeed on one process."""
    launch_environment(torch.device("cpu"))
    yield
    shut_down()
