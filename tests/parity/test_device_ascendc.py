"""The conformance kit takes any backend: here the AscendC kernels, run on the host model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from npu_qat.backends.ascendc import AscendcBackend, kernel_profiles
from npu_qat.parity.device import PROFILES, judge, measure, passed, report
from tests.backends.test_ascendc import HostOps
from tests.kernels_ascendc import host_model


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the host model with")
def test_the_ascendc_kernels_pass_on_the_host_model(tmp_path: Path) -> None:
    ops = HostOps(host_model.HostKernels(host_model.build(tmp_path / "kernels.so")))
    profiles = [name for name in PROFILES if name in kernel_profiles()]
    recording = measure(
        AscendcBackend(ops, "kernels.so"),
        torch.device("cpu"),
        profiles=profiles,
        wanted=lambda name: not name.startswith("fp16"),
        large=False,
    )
    verdicts = judge(recording)
    assert "ascend950" in profiles and passed(verdicts), report(recording, verdicts)
    assert set(ops.calls) == {"mxfp4_fake_quant", "mxfp4_pack", "mxfp4_dequant"}
    # No matmul of codes there, and nothing else is refused.
    assert {v.entry.kind for v in verdicts if v.refused} == {"product"}
