"""The stub libraries and the environment's bookkeeping; no torch-npu needed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.contract import environment, stubs

needs_gcc = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("nm") is None, reason="no gcc and nm here"
)


def fake_package(site: Path) -> Path:
    """A ``torch_npu`` whose library wants three functions of CANN and one of the C library."""
    source = """
        #include <stdlib.h>
        int aclrtGetDeviceCount(unsigned *);
        long HcclSomething(void);
        const char *aclGetRecentErrMsg(void);
        int own_function(void) { return 3; }
        unsigned count(void) {
            unsigned n = 7;
            aclrtGetDeviceCount(&n);
            return n + HcclSomething();
        }
        const char *message(void) { return getenv("NOWHERE") ? "" : aclGetRecentErrMsg(); }
    """
    for folder in (site / "torch_npu" / "lib", site / "torch" / "lib"):
        folder.mkdir(parents=True)
    library = site / "torch_npu" / "lib" / "libtorch_npu.so"
    command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    return library


@needs_gcc
def test_stubs_define_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    library = fake_package(tmp_path)
    wanted = ["HcclSomething", "aclGetRecentErrMsg", "aclrtGetDeviceCount"]
    assert stubs.wanted_symbols(tmp_path) == wanted
    out = stubs.make_stub_libraries(tmp_path, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == sorted(stubs.LIBRARIES)
    ctypes.CDLL(str(out / stubs.LIBRARIES[0]), mode=ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(str(library))
    loaded.message.restype = ctypes.c_char_p
    assert (loaded.count(), loaded.message()) == (0, b"stub library")


@pytest.mark.parametrize("tool", ["gcc", "nm"])
def test_a_missing_tool_is_named(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stubs.shutil, "which", lambda name: None if name == tool else "/bin/true")
    with pytest.raises(stubs.StubError, match=f"{tool} is not installed"):
        stubs.make_stub_libraries(tmp_path, tmp_path / "out")


@needs_gcc
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(stubs.StubError, match="no torch_npu"):
        stubs.make_stub_libraries(tmp_path, tmp_path / "out")


def test_the_folder_depends_on_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = environment.folder()
    assert before.parent == tmp_path / "npu-qat" and before == environment.folder()
    monkeypatch.setattr(environment.sys, "version", "another Python")
    assert environment.folder() != before


def test_the_environment_keeps_torch_npu_and_deepspeed_quiet(tmp_path: Path) -> None:
    variables = environment.variables(tmp_path)
    assert variables["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    assert variables["DS_ACCELERATOR"] == "cpu"
    assert variables["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(tmp_path / "stubs")


def test_torch_npu_is_of_its_torch() -> None:
    assert environment.TORCH_NPU.startswith(environment.TORCH)
    assert environment.TORCH_NPU in environment.SCHEMA_RELEASES


def test_a_failing_command_is_shown() -> None:
    with pytest.raises(environment.EnvironmentFailure, match="the reason"):
        environment.run(["sh", "-c", "echo the reason >&2; exit 3"])


def test_another_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "system", lambda: "Darwin")
    with pytest.raises(environment.EnvironmentFailure, match="Linux"):
        environment.make(tmp_path)
