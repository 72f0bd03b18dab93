"""What is said where the CUDA backend cannot run."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from npu_qat.backends import BackendUnavailable, cuda


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"npu-qat\[gpu\]"):
        cuda.load(torch.device("cuda"))


@pytest.mark.parametrize(
    ("there", "capability", "message"),
    [(False, (9, 0), "no NVIDIA GPU"), (True, (7, 5), "8.0, this GPU has 7.5")],
)
def test_without_a_gpu_that_the_kernels_need(
    there: bool, capability: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(BackendUnavailable, match=message):
        cuda.load(torch.device("cuda"))
