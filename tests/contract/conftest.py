"""What the contract tests run on: the real torch-npu, with CPU kernels for its MX operators.

This is the only place where the NPU backend meets tensors that are not on an NPU. The product has
no such way in: it chooses the backend by asking the driver for a device (``backends.selection``),
and with the stub libraries there is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_qat.backends.npu import NpuBackend, NpuOps
from tests.contract import op_kernels


@pytest.fixture(scope="session")
def contract_home() -> Path:
    """The folder of the environment, which holds the operator tables of other releases."""
    home = os.environ.get("NPU_QAT_CONTRACT")
    if home is None:
        pytest.fail("these tests have an environment of their own: make contract")
    return Path(home)


@pytest.fixture(scope="session")
def torch_npu(contract_home: Path) -> Any:
    """The package, without CPU kernels unless ``cpu_operators`` is asked for."""
    import torch_npu

    return torch_npu


@pytest.fixture(scope="session")
def cpu_operators(torch_npu: Any) -> Iterator[Any]:
    """The package with CPU kernels for its MX operators."""
    library = op_kernels.register()
    yield torch_npu
    del library


@pytest.fixture
def npu_backend(cpu_operators: Any, monkeypatch: pytest.MonkeyPatch) -> NpuBackend:
    """The NPU backend on CPU tensors; what it records says ``stubbed``."""
    # torch-npu makes torch's optimisers and autocast ask the driver, whatever the tensors are on.
    monkeypatch.setattr(torch.npu, "current_device", lambda: 0)
    monkeypatch.setattr(torch.npu, "get_device_name", lambda device=None: "stubbed")
    monkeypatch.setattr(torch.npu, "is_bf16_supported", lambda *arguments: True)
    return NpuBackend(NpuOps.loaded(), "stubbed", torch.device("cpu"))
