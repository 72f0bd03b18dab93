"""Building the kernels: which chip gets which code, and what is said when something is missing."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys

import pytest

from kernels_ascendc.build import BuildError, architecture_of
from tests.kernels_ascendc.host_model import KERNELS


@pytest.mark.parametrize(
    ("soc", "architecture"),
    [
        ("Ascend910B3", "dav-2201"),
        ("Ascend910_9382", "dav-2201"),
        ("Ascend950PR", "dav-3510"),
    ],
)
def test_architecture_of_a_chip(soc, architecture):
    assert architecture_of(soc) == architecture


def test_a_chip_without_kernels_is_refused():
    with pytest.raises(BuildError, match="Ascend310P3"):
        architecture_of("Ascend310P3")


def test_without_cann_the_message_names_what_to_source(monkeypatch):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    command = [sys.executable, "-m", "kernels_ascendc.build", "npu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=KERNELS.parent)
    assert done.returncode == 2
    assert "set_env.sh" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_host_build_by_its_command_leaves_a_library_with_the_launches(tmp_path):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler (g++ or clang++)")
    command = [sys.executable, "-m", "kernels_ascendc.build", "host", "--build", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=KERNELS.parent)
    assert done.returncode == 0, done.stderr
    assert ctypes.CDLL(done.stdout.strip()).launch_mxfp4_fake_quant_bf16


@pytest.mark.slow
def test_cmake_builds_for_the_host_by_default(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    for command in (["cmake", "-S", str(KERNELS), "-B", str(tmp_path)], ["cmake", "--build", "."]):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert ctypes.CDLL(str(tmp_path / "libkernels_host.so")).launch_mxfp4_pack_fp32


def test_cmake_refuses_an_unknown_target(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    command = ["cmake", "-S", str(KERNELS), "-B", str(tmp_path), "-DNPU_QAT_TARGET=gpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "must be host or npu" in done.stderr
