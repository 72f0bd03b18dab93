"""Build the AscendC kernels.

    python -m kernels_ascendc.build host     a library on the host model, for tests (needs g++)
    python -m kernels_ascendc.build npu      the operators for PyTorch (needs CANN and torch_npu)

Without an argument: `npu` where CANN's environment is set (ASCEND_HOME_PATH), else `host`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
INSTALLED = HERE.parent / "npu_qat" / "backends" / "ascendc" / "libnpu_qat_ascendc.so"
# What CMake calls the chips, by the beginning of the name that npu-smi or the user gives.
ARCHITECTURES = {"Ascend910B": "dav-2201", "Ascend910_93": "dav-2201", "Ascend950": "dav-3510"}


class BuildError(Exception):
    """Something is missing or failed; the message says what to do."""


def build_host(target: Path, folder: Path = HERE) -> Path:
    """Compile the kernels of `folder` with the host model into the library `target`."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler: install g++ or clang++")
    # No contraction: a fused multiply-add rounds once, the chip's two instructions twice.
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    flags += ["-shared", "-fPIC", f"-I{folder / 'host'}", f"-I{folder / 'include'}"]
    source = str(folder / "host" / "host.cpp")
    target.parent.mkdir(parents=True, exist_ok=True)
    _run([compiler, *flags, source, "-o", str(target)])
    return target


def build_npu(soc: str | None, build_folder: Path) -> Path:
    """Compile kernels and operators with CANN and put them beside the backend that loads them."""
    if not os.environ.get("ASCEND_HOME_PATH"):
        raise BuildError(
            "CANN's environment is not set (no ASCEND_HOME_PATH): "
            "source /usr/local/Ascend/ascend-toolkit/set_env.sh first"
        )
    if shutil.which("cmake") is None:
        raise BuildError("no cmake: install it (pip install cmake)")
    architecture = architecture_of(soc or _soc_here())
    configure = ["cmake", "-S", str(HERE), "-B", str(build_folder), "-DNPU_QAT_TARGET=npu"]
    configure += [
        f"-DCMAKE_ASC_ARCHITECTURES={architecture}",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]
    _run(configure)
    _run(["cmake", "--build", str(build_folder), "--parallel"])
    shutil.copy2(build_folder / INSTALLED.name, INSTALLED)
    return INSTALLED


def architecture_of(soc: str) -> str:
    """CMake's name of the architecture of a chip such as Ascend910B3.

    Raises BuildError for a chip that the kernels are not written for.
    """
    for name, architecture in ARCHITECTURES.items():
        if soc.startswith(name):
            return architecture
    raise BuildError(
        f"the kernels are not written for {soc!r}; they are for {', '.join(ARCHITECTURES)}..."
    )


def _soc_here() -> str:
    try:
        import torch_npu
    except ImportError as error:
        raise BuildError(f"torch_npu is needed to build the operators: {error}") from error
    try:
        return str(torch_npu.npu.get_device_name(0))
    except Exception as error:  # the driver fails in many ways
        raise BuildError(
            f"no NPU to ask for its name ({error}); give it: --soc Ascend910B3"
        ) from error


def _run(command: list[str]) -> None:
    print("+", " ".join(command), file=sys.stderr, flush=True)
    if subprocess.run(command).returncode != 0:
        raise BuildError(f"{command[0]} failed; its messages are above")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="kernels_ascendc.build", description=__doc__.split("\n")[0]
    )
    parser.add_argument("target", nargs="?", choices=("host", "npu"))
    parser.add_argument("--soc", help="the chip, such as Ascend910B3 (default: ask the driver)")
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder of the build")
    arguments = parser.parse_args()
    target = arguments.target or ("npu" if os.environ.get("ASCEND_HOME_PATH") else "host")
    try:
        if target == "host":
            built = build_host(arguments.build / "libkernels_host.so")
        else:
            built = build_npu(arguments.soc, arguments.build / "npu")
    except BuildError as error:
        print(f"kernels_ascendc.build: {error}", file=sys.stderr)
        return 2
    print(built)
    return 0


if __name__ == "__main__":
    sys.exit(main())
