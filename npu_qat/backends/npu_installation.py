"""What of the Ascend software is installed, and what is wrong with it. Imports no torch.

torch-npu is a shared library on top of CANN, and CANN is found only in a shell that has sourced its
``set_env.sh``. Where that was forgotten, three things go wrong one after another:

1. ``import torch`` itself fails, because torch loads installed device extensions.
2. ``import torch_npu`` fails: ``libhccl.so: cannot open shared object file``.
3. ``import transformers`` (and peft, and accelerate) fails likewise, since it imports torch_npu
   wherever that is installed.

And where CANN is found but there is no device, a container started without ``--device`` say, all
imports succeed and the first optimiser step *on the CPU* fails: torch_npu replaces parts of torch's
optimisers and autocast by functions that ask the driver.

So that such a machine can run on its CPU, and say what is wrong, the command line turns the loading
of extensions off and hides a torch_npu that cannot work (``prepare_process``); it is imported, and
its error explained, where an NPU is wanted and there is one.

All of this was seen with the real torch-npu 2.13.0 on a machine without CANN.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ASCEND = Path("/usr/local/Ascend")
DEVICES = Path("/dev")
# Libraries of CANN that torch_npu links; those of the driver come with the device.
CANN_LIBRARIES = (
    "libhccl",
    "libascendcl",
    "libacl_op_compiler",
    "libge_runner",
    "libgraph",
    "libacl_tdt_channel",
)
# torch-npu release -> CANN that it was built for (Ascend/pytorch, COMPATIBILITY; read). The MX
# operators need 9.0.
CANN_FOR = {
    "2.12.0": "9.1",
    "2.11.0": "9.1",
    "2.10.0.post4": "9.1",
    "2.9.0.post6": "9.1",
    "2.9.0.post2": "9.0",
    "2.8.0.post4": "9.0",
    "2.7.1.post8": "9.1",
    "2.7.1.post4": "9.0",
    "2.9.0": "8.5",
}
LOWEST_CANN_WITH_MX = (9, 0)
# Oldest driver (Ascend HDK) that a release of CANN runs on: the table "CANN and Ascend HDK Version
# Compatibility" in the release notes of CANN 9.1.0 (read).
LOWEST_DRIVER: dict[tuple[int, ...], tuple[int, int]] = {
    (8, 5): (25, 0),
    (9, 0): (25, 0),
    (9, 1): (25, 2),
}


def prepare_process() -> None:
    """Call before torch and transformers are imported; see the module's text."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    if importlib.util.find_spec("torch_npu") is None:
        return
    try:
        ctypes.CDLL("libhccl.so")
    except OSError:
        hide_torch_npu()
    if not device_nodes():
        hide_torch_npu()


def require_npu() -> None:
    """Raise ``ValueError`` with all that an NPU needs and is not here. Takes milliseconds.

    For a command that was told to use an NPU, before it spends half a minute on imports. What only
    the device can tell (its chip, a driver that fails) is left to ``backends.select``.
    """
    if sys.modules.get("torch_npu") is not None:
        return  # somebody got it to work
    missing = []
    if not device_nodes():
        missing.append(
            f"a device file {DEVICES}/davinci0, davinci1, ...: load the driver on this machine, or "
            "give the devices to the container (docs/containers.md)"
        )
    try:
        metadata.version("torch-npu")
    except metadata.PackageNotFoundError:
        missing.append("torch-npu: pip install 'npu-qat[npu]', or use an NPU image")
    try:
        ctypes.CDLL("libhccl.so")
    except OSError as error:
        missing.append(f"CANN in this shell: source {set_env_script()} ({error})")
    if missing and driver_version() is None:
        missing.append(f"the driver: {ASCEND}/driver, in a container mounted from the host")
    if missing:
        lines = "".join(f"\n  - {what}" for what in missing)
        raise ValueError(
            f"an NPU is asked for (run.device: npu) and cannot be used. Missing:{lines}\n"
            "'npu-qat doctor' shows what is there; '--device cpu' emulates the NPU's numbers"
        )


def device_nodes() -> list[Path]:
    """The device files of the NPUs that this process can see."""
    return sorted(DEVICES.glob("davinci[0-9]*"))


def is_installed() -> bool:
    """Whether there is a torch_npu to import, working or not."""
    if "torch_npu" in sys.modules and sys.modules["torch_npu"] is None:
        del sys.modules["torch_npu"]  # hidden by a run on another device
    return importlib.util.find_spec("torch_npu") is not None


def import_torch_npu() -> Any:
    """The module, with the allocator set up as this program wants it, unless the user did.

    Expandable segments keep the caching allocator from fragmenting when generation and training
    take turns; the allocator reads the variable when it is first used.
    """
    os.environ.setdefault("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
    return importlib.import_module("torch_npu")


def hide_torch_npu() -> None:
    """Make a torch_npu that is not imported count as not installed, in this process.

    None in ``sys.modules`` is Python's own mark for "do not import this".
    """
    if "torch_npu" not in sys.modules and importlib.util.find_spec("torch_npu") is not None:
        sys.modules["torch_npu"] = None  # type: ignore[assignment]


def explain_import_error(error: BaseException) -> str:
    """One line: what failed, and what to do about it."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    library = re.match(r"(lib\w+)\.so[\w.]*: cannot open shared object", text)
    if library and library[1] in CANN_LIBRARIES:
        return (
            f"CANN's environment is not loaded ({library[1]}.so is not found): run "
            f"'source {set_env_script()}' in this shell, then start again (in a container or a "
            "service, before the command)"
        )
    if library:
        return (
            f"{text}. If it belongs to the driver, mount {ASCEND}/driver/lib64 into the container "
            f"and run 'source {set_env_script()}'"
        )
    if "undefined symbol" in text:
        return f"torch-npu does not fit this torch or CANN: {text}"
    return f"torch_npu cannot be imported: {text}"


def cann_home() -> Path | None:
    """The toolkit whose environment this process has, or None."""
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    return Path(home) if home else None


def set_env_script() -> Path:
    """The ``set_env.sh`` to source: the one that is there, else where it usually is."""
    home = cann_home()
    places = [] if home is None else [home / "set_env.sh", home.parent / "set_env.sh"]
    places += [ASCEND / "ascend-toolkit/set_env.sh", ASCEND / "cann/set_env.sh"]
    return next((place for place in places if place.is_file()), places[-2])


def cann_version(home: Path) -> str | None:
    """Version of the toolkit in ``home``, from the files that its installers write."""
    return _version_in(
        home / "version.cfg",
        home / "version.info",
        *sorted(home.glob("*/ascend_*_install.info")),
        *sorted(home.glob("compiler/version.info")),
        *sorted(home.glob("runtime/version.info")),
    )


def driver_version() -> str | None:
    """Version of the NPU driver; None where no driver is installed or mounted."""
    return _version_in(ASCEND / "driver/version.info")


def driver_problem(driver: str, cann: str | None) -> str | None:
    """Why ``driver`` is too old for ``cann``, or None. Unknown releases of CANN are not judged."""
    lowest = LOWEST_DRIVER.get(_numbers(cann)[:2]) if cann else None
    if lowest is None or not _numbers(driver) or _numbers(driver)[:2] >= lowest:
        return None
    return f"CANN {cann} needs driver {lowest[0]}.{lowest[1]} or newer, not {driver}"


def hccl_library() -> Path | None:
    """The collective library as the loader of this process would find it, or None."""
    folders = [Path(p) for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p]
    return next((f / "libhccl.so" for f in folders if (f / "libhccl.so").is_file()), None)


def pairing_problem(torch: str, torch_npu: str, cann: str | None) -> str | None:
    """What does not fit of three versions, or None. Unknown releases are not judged."""
    release = _numbers(torch_npu)[:3]
    if _numbers(torch)[:3] != release:
        wanted = ".".join(map(str, release))
        return f"torch-npu {torch_npu} needs torch {wanted}, not {torch}"
    built_for = CANN_FOR.get(torch_npu)
    if built_for and cann and _numbers(cann)[:2] < _numbers(built_for):
        return f"torch-npu {torch_npu} is built for CANN {built_for}, not {cann}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _version_in(*files: Path) -> str | None:
    for file in files:
        if file.is_file():
            found = re.search(
                r"(?i)^\W*version\W*=\W*\[?([\w.]+)", file.read_text(errors="replace"), re.MULTILINE
            )
            if found:
                return found[1]
    return None
