"""What is said of an Ascend installation that is not whole, and what is done about it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from npu_qat.backends import npu_installation as ascend


@pytest.fixture(autouse=True)
def no_ascend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ascend, "ASCEND", tmp_path / "Ascend")


def missing(library: str) -> ImportError:
    return ImportError(f"{library}: cannot open shared object file: No such file or directory")


@pytest.mark.parametrize("library", ["libhccl.so", "libascendcl.so", "libge_runner.so.1"])
def test_a_missing_library_of_cann_is_explained_with_the_fix(library: str, tmp_path: Path) -> None:
    script = tmp_path / "Ascend/cann/set_env.sh"
    script.parent.mkdir(parents=True)
    script.touch()
    text = ascend.explain_import_error(missing(library))
    assert "CANN's environment is not loaded" in text
    assert f"'source {script}'" in text


def test_a_missing_library_of_the_driver_is_not_blamed_on_the_shell() -> None:
    text = ascend.explain_import_error(missing("libascend_hal.so"))
    assert "libascend_hal.so" in text and "driver/lib64" in text and "mount" in text


def test_an_undefined_symbol_means_versions_that_do_not_fit() -> None:
    error = ImportError("libtorch_npu.so: undefined symbol: _ZN3c10\nmore")
    text = ascend.explain_import_error(error)
    assert text.startswith("torch-npu does not fit this torch or CANN") and "more" not in text


def test_the_script_beside_the_toolkit_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "ascend-toolkit/latest"
    home.mkdir(parents=True)
    (home.parent / "set_env.sh").touch()
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(home))
    assert ascend.set_env_script() == home.parent / "set_env.sh"


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("version.cfg", "# x\nVersion=9.1.0\n", "9.1.0"),
        ("version.info", "version=[9.0.0.B123]\n", "9.0.0.B123"),
        ("x86_64-linux/ascend_toolkit_install.info", "package=x\nversion=8.5.1\n", "8.5.1"),
        ("runtime/version.info", "Version=9.1.RC1\n", "9.1.RC1"),
        ("other.txt", "Version=1\n", None),
    ],
)
def test_the_toolkits_version_is_read_from_its_files(
    file: str, text: str, version: str | None, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert ascend.cann_version(tmp_path) == version


@pytest.mark.parametrize(
    ("torch", "torch_npu", "cann", "problem"),
    [
        ("2.10.0+cpu", "2.10.0.post4", "9.1.0", None),
        ("2.10.0", "2.10.0.post4", None, None),
        ("2.13.0+cpu", "2.10.0.post4", "9.1.0", "needs torch 2.10.0, not 2.13.0+cpu"),
        ("2.10.1", "2.10.0.post4", "9.1.0", "needs torch 2.10.0"),
        ("2.10.0", "2.10.0.post4", "9.0.0", "built for CANN 9.1, not 9.0.0"),
        ("2.14.0", "2.14.0", "9.0.0", None),  # a release that nothing is known of
    ],
)
def test_versions_that_do_not_fit_are_named(
    torch: str, torch_npu: str, cann: str | None, problem: str | None
) -> None:
    found = ascend.pairing_problem(torch, torch_npu, cann)
    assert found == problem if problem is None else found is not None and problem in found


# --- a torch_npu that is there and broken -----------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed torch_npu whose import fails as the real one does without CANN."""
    package = tmp_path / "site/torch_npu"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise ImportError('libhccl.so: cannot open shared object file: No such file')"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)


def test_a_hidden_package_counts_as_not_installed_until_an_npu_is_wanted(
    broken: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ascend.hide_torch_npu()
    try:
        assert importlib.util.find_spec("torch_npu") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("torch_npu")
        assert ascend.is_installed()
        with pytest.raises(ImportError, match="libhccl"):
            ascend.import_torch_npu()
    finally:
        sys.modules.pop("torch_npu", None)


@pytest.mark.parametrize(
    ("sourced", "device", "hidden"),
    [(True, True, False), (False, True, True), (True, False, True)],
)
def test_the_command_line_hides_a_package_that_cannot_work(
    sourced: bool,
    device: bool,
    hidden: bool,
    broken: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or transformers, which imports whatever is installed, could not be imported on a CPU."""

    def load(name: str) -> None:
        assert name == "libhccl.so"
        if not sourced:
            raise OSError(name)

    monkeypatch.setattr(ascend.ctypes, "CDLL", load)
    monkeypatch.setattr(ascend, "DEVICES", tmp_path)
    (tmp_path / "davinci_manager").touch()
    if device:
        (tmp_path / "davinci0").touch()
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        ascend.prepare_process()
        assert (importlib.util.find_spec("torch_npu") is None) is hidden
    finally:
        sys.modules.pop("torch_npu", None)


def test_the_command_line_keeps_torch_from_loading_extensions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": ""})
    ascend.prepare_process()
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"


def test_a_package_that_is_in_use_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    ascend.hide_torch_npu()
    assert sys.modules["torch_npu"] is module


@pytest.mark.parametrize("given", [None, "max_split_size_mb:64"])
def test_the_allocator_expands_segments_unless_the_user_said_otherwise(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", given or "")
    if given is None:
        monkeypatch.delenv("PYTORCH_NPU_ALLOC_CONF")
    monkeypatch.setattr(
        importlib, "import_module", lambda name: os.environ["PYTORCH_NPU_ALLOC_CONF"]
    )
    assert ascend.import_torch_npu() == (given or "expandable_segments:True")


def test_the_installation_can_be_looked_at_without_torch() -> None:
    code = (
        "import sys; from npu_qat.backends import npu_installation; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def without_anything(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A machine without devices, driver, CANN and torch-npu."""

    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    def version(name: str) -> str:
        raise ascend.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ascend, "DEVICES", folder)
    monkeypatch.setattr(ascend, "ASCEND", folder / "Ascend")
    monkeypatch.setattr(ascend.ctypes, "CDLL", load)
    monkeypatch.setattr(ascend.metadata, "version", version)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)


def test_a_run_that_needs_an_npu_hears_of_all_that_is_missing_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_anything(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="an NPU is asked for") as error:
        ascend.require_npu()
    missing = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert [line[4:].split(" ")[0].rstrip(":") for line in missing] == [
        *("a", "torch-npu", "CANN", "the")
    ]
    assert f"{tmp_path}/davinci0" in missing[0] and "set_env.sh" in missing[2]
    assert "--device cpu" in str(error.value)


def test_a_machine_with_all_of_it_may_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_anything(monkeypatch, tmp_path)
    (tmp_path / "davinci0").touch()
    monkeypatch.setattr(ascend.ctypes, "CDLL", lambda name: None)
    with pytest.raises(ValueError, match="torch-npu:"):
        ascend.require_npu()
    monkeypatch.setattr(ascend.metadata, "version", lambda name: "2.10.0.post4")
    ascend.require_npu()  # the driver's version is not needed, only told where something else is
