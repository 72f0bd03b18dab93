"""The C++ binding of the AscendC kernels compiles against the real torch and torch_npu headers."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract

KERNELS = Path(__file__).parents[2] / "kernels_ascendc"


def check_syntax(source: Path) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler (g++ or clang++)")
    torch, torch_npu = (
        Path(importlib.util.find_spec(name).submodule_search_locations[0]) / "include"
        for name in ("torch", "torch_npu")
    )
    folders = [KERNELS / "include", torch, torch / "torch/csrc/api/include", torch_npu]
    folders += [torch_npu / "third_party/acl/inc", Path(sysconfig.get_paths()["include"])]
    command = [compiler, "-std=c++20", "-fsyntax-only", *(f"-I{folder}" for folder in folders)]
    return subprocess.run([*command, str(source)], capture_output=True, text=True)


def test_binding_compiles():
    done = check_syntax(KERNELS / "binding" / "ops.cpp")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_wrong_call_of_the_framework_would_be_seen(tmp_path):
    text = (KERNELS / "binding" / "ops.cpp").read_text()
    wrong = tmp_path / "ops.cpp"
    assert "RunOpApiV2(name, [" in text
    wrong.write_text(text.replace("RunOpApiV2(name, [", "RunOpApiV2([", 1))
    assert check_syntax(wrong).returncode != 0
