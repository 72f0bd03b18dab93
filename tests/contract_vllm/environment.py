"""The environment of the serving contract: the real vllm and vllm-ascend on a machine without NPU.

    python3 tests/contract_vllm/environment.py COMMAND [ARGUMENT ...]

makes it if it is missing and runs a command of its ``bin`` folder in it (``make contract-vllm``
runs pytest). It is made as the environment of ``tests/contract`` is, with the versions that the NPU
stack pins where they can be had:

1. ``scripts/bootstrap.py`` with ``constraints-npu.txt`` (transformers 5.5.4). The torch of that
   stack, 2.10.0, has no CPU build on the package index; torch and torch-npu are 2.13.0, whose
   operators have the same signatures (``tests/contract/test_schemas.py`` compares the releases);
2. vllm from its source archive for the target ``empty``: Python alone, as Ascend's own images
   build it. Its wheel would bring CUDA libraries of several GB;
3. vllm-ascend, torch-npu and what they import, all without their dependencies: those name Triton,
   torchvision and packages that exist for a device only;
4. the stub libraries of CANN.

It lies in ``$XDG_CACHE_HOME/npu-qat`` (``~/.cache/npu-qat``) under a name made from all that it
depends on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from tests.contract.environment import (  # noqa: E402 (a script: the checkout is put on the path)
    EnvironmentFailure,
    pip,
    python_of,
    run,
    variables,
)

TORCH = "2.13.0"
TORCH_NPU = "2.13.0"
VLLM = "0.23.0"
VLLM_ASCEND = "0.23.0"
PYTHONS = ((3, 10), (3, 11), (3, 12))
CONSTRAINTS = ROOT / "constraints-npu.txt"
REQUIREMENTS = HERE / "requirements.txt"
STUBS = HERE.parent / "contract" / "stubs.py"


def folder() -> Path:
    """Where the environment lies, whether it is there or not."""
    # Not pyproject.toml: bootstrap.py looks after that, in the environment that is there.
    inputs = [CONSTRAINTS, REQUIREMENTS, Path(__file__), STUBS]
    parts = [sys.version, platform.machine(), *(p.read_text(encoding="utf-8") for p in inputs)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "npu-qat" / f"contract-vllm-{key}"


def make(home: Path) -> None:
    """Make what is missing; one process at a time."""
    if platform.system() != "Linux":
        raise EnvironmentFailure("torch-npu has wheels for Linux only; use a container.")
    if sys.version_info[:2] not in PYTHONS:
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise EnvironmentFailure(
            f"vllm-ascend {VLLM_ASCEND} has wheels for Python 3.10 to 3.12 and this is {here}; "
            "name another one: make contract-vllm PYTHON=python3.12"
        )
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        # Asked every time: it knows whether the checkout that uses the environment is another.
        bootstrap = [str(ROOT / "scripts" / "bootstrap.py"), "--venv", str(home / "venv")]
        choices = ["--constraints", str(CONSTRAINTS), "--torch", TORCH]
        run([sys.executable, *bootstrap, *choices], TORCH_VARIANT="cpu")
        if (home / "complete").exists():
            return
        add_serving_stack(home)
        (home / "complete").touch()
        print(f"contract-vllm: {home} made in {time.monotonic() - began:.0f} s", flush=True)


def add_serving_stack(home: Path) -> None:
    """vllm, vllm-ascend, torch-npu and the stub libraries, into the environment in ``home``."""
    pip(home, "install", "--no-deps", "--requirement", str(REQUIREMENTS))
    # Without the override the archive's version reads 0.23.0+empty, which pip then refuses.
    target = {"VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": VLLM}
    build = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary=vllm"]
    run([str(python_of(home)), "-m", "pip", *build, f"vllm=={VLLM}"], **target)
    pip(
        home,
        *("install", "--no-deps", "--only-binary=:all:"),
        *(f"vllm-ascend=={VLLM_ASCEND}", f"torch-npu=={TORCH_NPU}"),
    )
    where = "import sysconfig; print(sysconfig.get_paths()['platlib'])"
    packages = run([str(python_of(home)), "-I", "-c", where]).strip()
    shutil.rmtree(home / "stubs", ignore_errors=True)
    run([sys.executable, str(STUBS), packages, str(home / "stubs")])


def main(command: list[str]) -> None:
    home = folder()
    try:
        make(home)
    except EnvironmentFailure as error:
        sys.exit(f"contract-vllm environment: {error}")
    if not command:
        print(python_of(home))
        return
    program = python_of(home).with_name(command[0])
    os.execve(program, [str(program), *command[1:]], {**os.environ, **variables(home)})


if __name__ == "__main__":
    main(sys.argv[1:])
