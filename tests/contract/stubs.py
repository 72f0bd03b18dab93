"""Libraries that let ``import torch_npu`` succeed on a machine without CANN.

torch-npu's extension modules are linked against six libraries of Huawei's CANN toolkit, which no
package index has. Without them the import ends with "libhccl.so: cannot open shared object file".
What is needed of them at import is little: that the names exist. So a compiler makes libraries of
functions that return 0 ("success") and do nothing, one for each symbol that the wheel leaves
undefined and that neither torch nor the C library defines.

With the folder on ``LD_LIBRARY_PATH`` (and ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``) the real package
is there: its operator schemas, its Meta kernels, its Python wrappers. What is not there is a
device: ``torch.npu.is_available()`` is False, since the stub counts none. CPU kernels for the
operators can be registered beside it (``op_kernels.py``); nothing here computes anything.

Needs ``gcc`` and ``nm`` (Debian: apt install gcc, which brings binutils).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

# What the wheel's libraries name as NEEDED and no package provides. All symbols go into the first.
LIBRARIES = (
    "libascendcl.so",
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
)
# CANN's C interfaces: runtime and compiler, driver runtime, profiler, collectives, graph engine,
# device management.
PREFIXES = ("acl", "rt", "Msprof", "Hccl", "ge", "Dcmi")

# Where "returns 0" would be read as something else than "no device".
SPECIAL = {
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *count) { *count = 0; return 0; }",
    "aclrtGetSocName": "const char *aclrtGetSocName(void) { return 0; }",
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return "stub library"; }',
}


class StubError(RuntimeError):
    """The stub libraries cannot be made; the message says what is missing."""


def make_stub_libraries(site_packages: Path, out: Path) -> Path:
    """Make the stub libraries for the torch-npu that is installed in ``site_packages``.

    Args:
        site_packages: folder that holds ``torch`` and ``torch_npu``.
        out: folder to write them to; made if needed. Put it on ``LD_LIBRARY_PATH``.

    Returns ``out``. Raises StubError without a compiler, without the packages, or if the compiler
    fails.
    """
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise StubError(
                f"{tool} is not installed: the stub libraries of CANN are compiled for the "
                "torch-npu at hand. On Debian or Ubuntu: sudo apt install -y gcc"
            )
    symbols = wanted_symbols(site_packages)
    out.mkdir(parents=True, exist_ok=True)
    for name in LIBRARIES:
        functions = symbols if name == LIBRARIES[0] else []
        compile_library(out / name, [source_of(symbol) for symbol in functions])
    return out


def wanted_symbols(site_packages: Path) -> list[str]:
    """CANN symbols that torch-npu leaves undefined, sorted.

    The system's libraries give their symbols versions (``getenv@GLIBC_2.2.5``); CANN's have none,
    and neither have torch's, which are taken off by name.
    """
    package = site_packages / "torch_npu"
    own = [*(package / "lib").glob("lib*.so"), *package.glob("_C*.so")]
    own = [path for path in own if path.name != "libop_plugin_atb.so"]  # loaded on demand only
    if not own:
        raise StubError(f"no torch_npu in {site_packages}: pip install --no-deps torch-npu")
    undefined = read_symbols(own, "--undefined-only")
    if not any("@" in name for name in undefined):
        raise StubError("this nm shows no symbol versions; binutils 2.35 or newer does")
    torch = (site_packages / "torch" / "lib").glob("lib*.so")
    defined = {name.partition("@")[0] for name in read_symbols([*own, *torch], "--defined-only")}
    return sorted(name for name in undefined - defined if is_cann(name))


def is_cann(symbol: str) -> bool:
    return symbol.startswith(PREFIXES) and "@" not in symbol


def read_symbols(libraries: Iterable[Path], which: str) -> set[str]:
    """Names of the dynamic symbols of libraries, with their versions (``name@VERSION``)."""
    done = subprocess.run(
        ["nm", "-D", "--format=posix", which, *map(str, libraries)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line and not line.endswith(":")]
    return {line.split()[0] for line in lines}


def source_of(symbol: str) -> str:
    """A C function called ``symbol`` that does nothing and reports success."""
    return SPECIAL.get(symbol, f"long {symbol}(void) {{ return 0; }}")


def compile_library(path: Path, functions: list[str]) -> None:
    """A shared library of C functions; one dummy if there are none."""
    source = "\n".join([*functions, f"int {path.stem}_stub;", ""])
    done = subprocess.run(
        # -w: some names clash with what the compiler believes of them, and that is all right here
        [
            "gcc",
            "-shared",
            "-fPIC",
            "-w",
            f"-Wl,-soname,{path.name}",
            "-o",
            str(path),
            "-x",
            "c",
            "-",
        ],
        input=source,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise StubError(f"gcc could not make {path.name}:\n{done.stderr}")


if __name__ == "__main__":
    import sys

    if len(sys.argv) != 3:
        sys.exit("usage: stubs.py SITE_PACKAGES OUT")
    try:
        print(make_stub_libraries(Path(sys.argv[1]), Path(sys.argv[2])))
    except StubError as error:
        sys.exit(f"stubs: {error}")
