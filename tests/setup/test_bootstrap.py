"""What the bootstrap script would install, and what it refuses: no network, no environment made."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bootstrap.py"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@pytest.fixture
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accepts(arguments: list[str], version: str) -> bool:
    """Whether the torch requirement among pip arguments admits a version (PEP 440)."""
    (requirement,) = (a for a in arguments if a.startswith("torch"))
    return Requirement(requirement).specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("variant", ["cpu", "npu"])
def test_a_machine_without_an_nvidia_gpu_can_only_get_a_cpu_torch(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)

    arguments = bootstrap.torch_arguments("2.13.0", variant, "Linux")

    assert arguments[arguments.index("--extra-index-url") + 1] == CPU_INDEX
    assert accepts(arguments, "2.13.0+cpu")
    # The package index's own file is "2.13.0", PyTorch's CUDA builds are "2.13.0+cu130" and so on.
    for cuda_build in ("2.13.0", "2.13.0+cu126", "2.13.0+cu130", "2.14.1"):
        assert not accepts(arguments, cuda_build)


def test_torch_comes_without_its_dependencies(bootstrap: ModuleType) -> None:
    """PyTorch's index serves torch and nothing else."""
    for variant in bootstrap.VARIANTS:
        assert "--no-deps" in bootstrap.torch_arguments("2.13.0", variant, "Linux")


def test_macos_wheels_have_no_label(bootstrap: ModuleType) -> None:
    assert accepts(bootstrap.torch_arguments("2.13.0", "cpu", "Darwin"), "2.13.0")


def test_cuda_is_the_package_index_s_own_build(bootstrap: ModuleType) -> None:
    arguments = bootstrap.torch_arguments("2.13.0", "cuda", "Linux")
    assert accepts(arguments, "2.13.0")
    assert CPU_INDEX not in arguments


def test_nothing_that_follows_can_swap_the_installed_torch(bootstrap: ModuleType) -> None:
    text = bootstrap.effective_constraints(
        "# tested\ntorch==2.13.0\ntorchdata==1.0\ntransformers==5.23.0\n", "2.13.0+cpu"
    )
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("torch=")] == ["torch==2.13.0+cpu"]
    assert {"torchdata==1.0", "transformers==5.23.0"} <= set(lines)
    assert not SpecifierSet("==2.13.0+cpu").contains("2.13.0")


def test_the_constraints_pin_each_variant_s_torch(bootstrap: ModuleType) -> None:
    cpu = (ROOT / bootstrap.CONSTRAINTS["cpu"]).read_text(encoding="utf-8")
    npu = (ROOT / bootstrap.CONSTRAINTS["npu"]).read_text(encoding="utf-8")
    # A label would shut out every other build, so there must be none.
    assert "+" not in bootstrap.pinned_version(cpu, "torch")
    assert bootstrap.pinned_version(npu, "torch") == "2.10.0"
    assert bootstrap.pinned_version(npu, "torch-npu").startswith("2.10.0")
    assert bootstrap.pinned_version(npu, "transformers") == "5.5.4"


def test_an_unpinned_package_is_an_error(bootstrap: ModuleType) -> None:
    with pytest.raises(bootstrap.SetupError, match="no version of torch"):
        bootstrap.pinned_version("torchvision==1.0\n", "torch")


@pytest.mark.parametrize(
    ("working", "expected"),
    [((), "cpu"), (("nvidia-smi",), "cuda"), (("npu-smi",), "npu"), (("npu-smi", "x"), "npu")],
)
def test_the_machine_decides_the_variant(
    bootstrap: ModuleType, working: tuple[str, ...], expected: str
) -> None:
    chosen = bootstrap.choose_variant({}, None, lambda command: command[0] in working)
    assert chosen == expected


def test_an_environment_keeps_its_variant(bootstrap: ModuleType) -> None:
    """A login node without a GPU must not tear down the GPU nodes' torch."""
    assert bootstrap.choose_variant({}, "cuda", lambda command: False) == "cuda"


def test_torch_variant_overrides(bootstrap: ModuleType) -> None:
    assert bootstrap.choose_variant({"TORCH_VARIANT": "CPU"}, "cuda", lambda command: True) == "cpu"
    with pytest.raises(bootstrap.SetupError, match="choose one of cpu, cuda, npu"):
        bootstrap.choose_variant({"TORCH_VARIANT": "rocm"}, None, lambda command: False)


@pytest.mark.parametrize(
    ("report", "variant", "problem"),
    [
        ({"version": "2.13.0", "cuda": "13.0"}, "cpu", "CUDA 13.0 build"),
        ({"version": "2.10.0+cu128", "cuda": "12.8"}, "npu", "2.13.0 was asked for"),
        ({"version": "2.14.1+cpu", "cuda": None}, "cpu", "2.14.1"),
        ({"version": "2.13.0+cpu", "cuda": None}, "cuda", "has no CUDA"),
    ],
)
def test_a_wrong_torch_is_an_error(
    bootstrap: ModuleType, report: dict[str, Any], variant: str, problem: str
) -> None:
    with pytest.raises(bootstrap.SetupError, match=problem):
        bootstrap.check_torch(report, "2.13.0", variant)


def test_the_right_torch_passes(bootstrap: ModuleType) -> None:
    bootstrap.check_torch({"version": "2.13.0+cpu", "cuda": None}, "2.13.0", "cpu")
    bootstrap.check_torch({"version": "2.13.0", "cuda": None}, "2.13.0", "cpu")  # macOS
    bootstrap.check_torch({"version": "2.13.0", "cuda": "13.0"}, "2.13.0", "cuda")


def test_the_question_about_torch_is_answered(bootstrap: ModuleType) -> None:
    """The snippet that reads version and CUDA without importing torch, run on this torch."""
    import json

    torch = pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-I", "-c", bootstrap.ASK_TORCH], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["version"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["cuda"] == torch.version.cuda


def test_debian_without_venv_is_told_what_to_install(bootstrap: ModuleType) -> None:
    def no_ensurepip(name: str) -> object:
        return None if name == "ensurepip" else object()

    with pytest.raises(bootstrap.SetupError, match="apt install -y python3-venv"):
        bootstrap.check_interpreter("posix", (3, 12), no_ensurepip)


def test_an_old_python_is_refused(bootstrap: ModuleType) -> None:
    with pytest.raises(bootstrap.SetupError, match=r"needs Python >= 3\.10"):
        bootstrap.check_interpreter("posix", (3, 9), lambda name: object())


def test_windows_is_refused(bootstrap: ModuleType) -> None:
    with pytest.raises(bootstrap.SetupError, match="WSL"):
        bootstrap.check_interpreter("nt", (3, 12), lambda name: object())


def test_pip_does_not_see_pythonpath(bootstrap: ModuleType) -> None:
    assert bootstrap.child_environment({"PYTHONPATH": "/x", "HOME": "/h"}) == {"HOME": "/h"}


class FakeInstaller:
    """Replaces the commands of an Installer; answers as if torch were ``torch_version``."""

    def __init__(self, succeeds: Any = lambda command: True) -> None:
        self.commands: list[list[str]] = []
        self.succeeds = succeeds

    def patch(self, bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(installer: Any, command: list[str], environ: Any = None) -> bool:
            installer.log.parent.mkdir(parents=True, exist_ok=True)
            installer.log.touch()
            self.commands.append(list(command))
            return bool(self.succeeds(command))

        monkeypatch.setattr(bootstrap.Installer, "run", run)
        monkeypatch.setattr(bootstrap.Installer, "uv_settings", lambda installer: {})
        monkeypatch.setattr(
            bootstrap.Installer, "verify_torch", lambda installer, version, variant: version
        )
        monkeypatch.setattr(bootstrap.shutil, "which", lambda name: f"/usr/bin/{name}")

    def matching(self, word: str) -> list[list[str]]:
        return [command for command in self.commands if word in command]


def test_a_complete_environment_is_left_alone(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeInstaller()
    fake.patch(bootstrap, monkeypatch)
    monkeypatch.setenv("TORCH_VARIANT", "cpu")
    arguments = ["--venv", str(tmp_path / "venv")]

    assert bootstrap.main(arguments) == 0
    assert fake.matching("--no-deps") and fake.matching("--editable")
    fake.commands.clear()
    assert bootstrap.main(arguments) == 0
    assert fake.commands == []

    monkeypatch.setenv("TORCH_VARIANT", "npu")
    assert bootstrap.main(arguments) == 0
    assert any("torch==2.10.0+cpu" in command for command in fake.commands)


def test_no_extras_are_none(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An image that only trains has no development tools."""
    fake = FakeInstaller()
    fake.patch(bootstrap, monkeypatch)
    monkeypatch.setenv("TORCH_VARIANT", "cpu")
    assert bootstrap.main(["--venv", str(tmp_path / "venv"), "--extras", ""]) == 0
    (command,) = fake.matching("--editable")
    assert command[command.index("--editable") + 1] == str(ROOT)


def test_an_environment_that_failed_has_no_stamp(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    FakeInstaller(lambda command: "--editable" not in command).patch(bootstrap, monkeypatch)
    monkeypatch.setenv("TORCH_VARIANT", "cpu")
    assert bootstrap.main(["--venv", str(tmp_path / "venv")]) == 1
    assert "dependencies could not be installed" in capsys.readouterr().err
    assert not (tmp_path / "venv" / ".stamp").exists()


def test_pip_takes_over_where_uv_fails(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeInstaller(lambda command: command[0] != "/usr/bin/uv")
    fake.patch(bootstrap, monkeypatch)
    monkeypatch.setenv("TORCH_VARIANT", "cpu")
    assert bootstrap.main(["--venv", str(tmp_path / "venv")]) == 0
    first, second = fake.matching("--editable")
    assert first[0] == "/usr/bin/uv" and "pip" in second
    assert first[first.index("--constraint") + 1] == second[second.index("--constraint") + 1]
    pins = Path(second[second.index("--constraint") + 1]).read_text(encoding="utf-8")
    assert bootstrap.pinned_version(pins, "torch")


def test_the_script_needs_no_package_to_start() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "TORCH_VARIANT" in done.stdout
