"""The environment of the contract tests: the real torch-npu on a machine without an NPU.

    python3 tests/contract/environment.py COMMAND [ARGUMENT ...]

makes it if it is missing and runs a command of its ``bin`` folder in it (``make contract`` runs
pytest). Runs with any Python >= 3.10 and the standard library. It is a virtual environment of its
own, because torch-npu breaks ``import torch`` for every program beside it that does not know
about the stub libraries (``stubs.py``). In order:

1. ``scripts/bootstrap.py`` makes the environment that ``make test`` has too;
2. torch-npu of the same version as its torch, without dependencies;
3. the stub libraries of CANN, compiled for that torch-npu;
4. the operator tables (YAML) out of the wheels of other torch-npu releases, which are never
   installed: ``test_schemas.py`` compares what the product calls with each of them.

It lies in ``$XDG_CACHE_HOME/npu-qat`` (``~/.cache/npu-qat``) under a name made from what this
folder asks for: a change of that makes a new one, and several checkouts share one. Changes of the
project's own dependencies are made in place, by ``bootstrap.py``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCH = "2.13.0"
TORCH_NPU = "2.13.0"
# One release for each op-plugin branch that has the MX operators: 26.0.0 (CANN 9.0), the oldest
# that the product supports; 26.1.0 (CANN 9.1), which vllm-ascend 0.23 pins; and the newest ones.
SCHEMA_RELEASES = ("2.9.0.post2", "2.10.0.post4", "2.12.0", "2.13.0", "2.14.0")
SCHEMA_FILES = ("npu_native_functions.yaml", "npu_native_functions_by_codegen.yaml")


class EnvironmentFailure(Exception):
    """The environment cannot be made; the message says why and what to do."""


def folder() -> Path:
    """Where the environment lies, whether it is there or not."""
    inputs = [Path(__file__), HERE / "stubs.py"]
    parts = [sys.version, platform.machine(), *(p.read_text(encoding="utf-8") for p in inputs)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "npu-qat" / f"contract-{key}"


def python_of(home: Path) -> Path:
    return home / "venv" / "bin" / "python"


def variables(home: Path) -> dict[str, str]:
    """Environment variables that a command in the environment needs."""
    libraries = [str(home / "stubs"), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # else `import torch` looks for a device
        "DS_ACCELERATOR": "cpu",  # DeepSpeed takes any torch-npu that it can import for a device
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "NPU_QAT_CONTRACT": str(home),  # the tests find the operator tables through it
    }


def make(home: Path) -> None:
    """Make what is missing; one process at a time."""
    if platform.system() != "Linux":
        raise EnvironmentFailure("torch-npu has wheels for Linux only; use a container.")
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Asked every time: it knows whether the checkout that uses the environment is another.
        bootstrap = [str(ROOT / "scripts" / "bootstrap.py"), "--venv", str(home / "venv")]
        run([sys.executable, *bootstrap, "--torch", TORCH], TORCH_VARIANT="cpu")
        complete = home / "venv" / "complete"  # in there, so that it goes when the venv is remade
        if complete.exists():
            return
        pip(home, "install", "--no-deps", f"torch-npu=={TORCH_NPU}")
        where = "import sysconfig; print(sysconfig.get_paths()['platlib'])"
        packages = run([str(python_of(home)), "-I", "-c", where]).strip()
        run([sys.executable, str(HERE / "stubs.py"), packages, str(home / "stubs")])
        for release in SCHEMA_RELEASES:
            take_schemas(home, release)
        complete.touch()


def take_schemas(home: Path, release: str) -> None:
    """Put the operator tables of one torch-npu release into ``schemas/<release>``."""
    with tempfile.TemporaryDirectory() as download:
        # One platform for all: the tables are text, the same in each of a release's wheels.
        pip(
            home,
            *("download", "--no-deps", "--dest", download, f"torch-npu=={release}"),
            *("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"),
        )
        (wheel,) = Path(download).glob("*.whl")
        target = home / "schemas" / release
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in SCHEMA_FILES:
                (target / name).write_bytes(archive.read(f"torch_npu/csrc/aten/{name}"))


def pip(home: Path, *arguments: str) -> None:
    quiet = ["--disable-pip-version-check", "--no-input", "--quiet"]
    run([str(python_of(home)), "-m", "pip", *quiet, *arguments])


def run(command: list[str], **environ: str) -> str:
    """Run a command, its errors shown when it fails; returns what it printed."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environ},
    )
    if done.returncode != 0:
        raise EnvironmentFailure(f"{done.stdout}{done.stderr}\n{' '.join(command)} failed")
    return done.stdout


def main(command: list[str]) -> None:
    home = folder()
    try:
        make(home)
    except EnvironmentFailure as error:
        sys.exit(f"contract environment: {error}")
    if not command:
        print(python_of(home))
        return
    program = python_of(home).with_name(command[0])
    os.execve(program, [str(program), *command[1:]], {**os.environ, **variables(home)})


if __name__ == "__main__":
    main(sys.argv[1:])
