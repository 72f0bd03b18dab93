"""Set up a virtual environment for npu-qat: ``make demo`` and ``make test`` run this first.

Runs with any Python >= 3.10 and nothing but the standard library. In order:

1. make ``.venv`` (``python -m venv``);
2. install torch *alone*, in the build for this machine;
3. install everything else at the versions of the constraints file, with uv if it can be had, else
   with pip, torch being pinned to the very build that step 2 installed;
4. check that torch is still that build, then write ``.venv/.stamp``.

Why torch comes alone and first: on Linux a plain ``torch`` from the package index is a CUDA build
of several GB, also on a machine without a GPU. PyTorch's own index has CPU builds, whose versions
carry the *local label* ``+cpu``. A package index may not hold versions with a local label, so
``torch==X+cpu`` can come from PyTorch's index (or a wheel folder that the user's pip is configured
with) and from nowhere else: where neither is reachable, the installation fails; it never falls back
to CUDA. The price is that the label must be known per platform, see :func:`torch_requirement`.

``TORCH_VARIANT=cpu|cuda|npu`` overrides the choice; otherwise an environment keeps the variant that
it was made with, and a new one takes what a working ``nvidia-smi`` or ``npu-smi`` says. A mirror
that pip is configured with as its index serves uv as well.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VARIANTS = ("cpu", "cuda", "npu")
MIN_PYTHON = (3, 10)

# Constraints file and extras of each variant.
CONSTRAINTS = {"cpu": "constraints.txt", "cuda": "constraints.txt", "npu": "constraints-npu.txt"}
EXTRAS = {"cpu": "dev", "cuda": "dev,gpu", "npu": "dev,npu"}


# Asks an environment about its torch without importing it, so before its dependencies are there.
ASK_TORCH = """
import importlib.metadata, json, pathlib, runpy
torch = importlib.metadata.distribution("torch")
facts = runpy.run_path(str(pathlib.Path(torch.locate_file("torch/version.py"))))
print(json.dumps({"version": torch.version, "cuda": facts["cuda"]}))
"""


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


# --- what to install -----------------------------------------------------------------------------


def detect_variant(works: Callable[[Sequence[str]], bool]) -> str:
    """The torch variant of this machine: ``works(command)`` tells whether a command succeeds."""
    if works(["npu-smi", "info"]):
        return "npu"
    if works(["nvidia-smi", "--list-gpus"]):
        return "cuda"
    return "cpu"


def choose_variant(
    environ: Mapping[str, str],
    made_with: str | None,
    works: Callable[[Sequence[str]], bool],
) -> str:
    """``TORCH_VARIANT`` if set, else what the environment was made with, else what is here.

    Keeping the old variant matters where a login node without a GPU shares the checkout with nodes
    that have one.
    """
    asked = environ.get("TORCH_VARIANT", "").strip().lower()
    if not asked:
        return made_with or detect_variant(works)
    if asked not in VARIANTS:
        raise SetupError(f"TORCH_VARIANT={asked!r}: choose one of {', '.join(VARIANTS)}.")
    return asked


def torch_requirement(version: str, variant: str, system: str) -> str:
    """The one requirement that names the right torch build.

    ``system`` is ``platform.system()``. On Linux (x86-64 and aarch64 alike) the CPU build is
    ``X+cpu``; torch_npu is built against it too. On macOS no CUDA build exists and the wheels carry
    no label.
    """
    if variant == "cuda" or system == "Darwin":
        return f"torch=={version}"
    return f"torch=={version}+cpu"


def torch_arguments(version: str, variant: str, system: str) -> list[str]:
    """Arguments of ``pip`` that install torch and nothing else.

    Without its dependencies: those come with the rest, from the user's own package index, so that
    PyTorch's index is asked for one package only.
    """
    arguments = ["install", "--no-deps", torch_requirement(version, variant, system)]
    if variant != "cuda":
        arguments += ["--extra-index-url", TORCH_CPU_INDEX]
    return arguments


def project_arguments(extras: str, constraints: Path, wheel: Path | None) -> list[str]:
    """Arguments of ``pip`` or ``uv pip`` that install this checkout, editable, or a built wheel."""
    arguments = ["install", "--constraint", str(constraints)]
    if wheel:
        return [*arguments, str(wheel)]
    return [*arguments, "--editable", f"{ROOT}[{extras}]" if extras else str(ROOT)]


def pinned_version(constraints: str, package: str) -> str:
    """The version that the text of a constraints file pins ``package`` to."""
    found = re.search(rf"(?m)^{re.escape(package)}==([^\s;#]+)", constraints)
    if not found:
        raise SetupError(f"The constraints file pins no version of {package}.")
    return found.group(1)


def effective_constraints(constraints: str, installed_torch: str) -> str:
    """The constraints with torch pinned to the build in place, local label included.

    With ``torch==2.13.0+cpu`` as a constraint no resolver can swap it for ``2.13.0`` (CUDA).
    ``installed_torch`` is the version in the package's metadata.
    """
    others = [line for line in constraints.splitlines() if not re.match(r"torch\s*==", line)]
    return "\n".join([*others, f"torch=={installed_torch}", ""])


def check_torch(report: Mapping[str, str | None], version: str, variant: str) -> None:
    """Raise unless the installed torch is the version and the build that was asked for.

    ``report`` has ``version`` (of the package's metadata) and ``cuda`` (``torch.version.cuda``).
    """
    installed, cuda = str(report["version"]), report["cuda"]
    if installed.partition("+")[0] != version:
        raise SetupError(f"torch {version} was asked for and {installed} is installed.")
    if variant != "cuda" and cuda is not None:
        raise SetupError(
            f"torch {installed} is a CUDA {cuda} build, and this setup is for {variant}. "
            f"Remove the environment (make clean-venv) and run again; the CPU build is at "
            f"{TORCH_CPU_INDEX}. For an NVIDIA GPU set TORCH_VARIANT=cuda."
        )
    if variant == "cuda" and cuda is None:
        raise SetupError(
            f"torch {installed} has no CUDA and TORCH_VARIANT is cuda. Is pip configured with a "
            "folder of CPU wheels (pip config list)? Use TORCH_VARIANT=cpu to go on without a GPU."
        )


# --- doing it ------------------------------------------------------------------------------------


def command_works(command: Sequence[str]) -> bool:
    """Whether a command exists here and succeeds within 20 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


class Installer:
    """Makes one environment; commands write to a log, whose end is shown when one fails."""

    def __init__(self, venv: Path) -> None:
        self.venv = venv
        self.python = venv / "bin" / "python"
        self.log = venv / "bootstrap.log"
        self.stamp = venv / ".stamp"

    def run(self, command: Sequence[str], environ: Mapping[str, str] | None = None) -> bool:
        """Run a command with its output in the log; True if it succeeded."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**child_environment(os.environ), **(environ or {})},
            )
        return done.returncode == 0

    def fail(self, what: str) -> SetupError:
        """An error with the lines of the log that matter."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        telling = [line for line in lines if not line.startswith("WARNING: Location")]
        return SetupError("\n".join([*telling[-15:], "", f"{what} (whole log: {self.log})"]))

    def read_stamp(self) -> str:
        """``<variant> <fingerprint>`` of a complete environment, else an empty string."""
        return self.stamp.read_text(encoding="utf-8").strip() if self.stamp.exists() else ""

    def make_venv(self) -> None:
        """``python -m venv``, anew if what is there does not run."""
        if self.python.exists() and not command_works([str(self.python), "-m", "pip", "--version"]):
            shutil.rmtree(self.venv)
        if self.python.exists():
            return
        say(f"making {self.venv} with Python {platform.python_version()}")
        self.venv.mkdir(parents=True, exist_ok=True)
        if not self.run([sys.executable, "-m", "venv", str(self.venv)]):
            raise self.fail("python -m venv failed")

    def pip(self, *arguments: str) -> bool:
        """pip of the environment; its own complaint about its age is kept out of the log."""
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        return self.run([*pip, *arguments])

    def verify_torch(self, version: str, variant: str) -> str:
        """Check the torch in the environment; returns its version with the local label."""
        done = subprocess.run(
            [str(self.python), "-I", "-c", ASK_TORCH],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            raise SetupError(f"{done.stderr}\ntorch is installed but cannot be read")
        report = json.loads(done.stdout)
        check_torch(report, version, variant)
        return str(report["version"])

    def install_torch(self, version: str, variant: str) -> str:
        """Step 2; returns the installed version with its local label."""
        arguments = torch_arguments(version, variant, platform.system())
        requirement = torch_requirement(version, variant, platform.system())
        say(f"installing {requirement}")
        if not self.pip(*arguments):
            source = "the package index" if variant == "cuda" else TORCH_CPU_INDEX
            raise self.fail(
                f"{requirement} could not be installed. It comes from {source}, or from a wheel "
                "folder that pip is configured with (PIP_FIND_LINKS): is one of them reachable, "
                f"and is there a build for Python {platform.python_version()} there?"
            )
        return self.verify_torch(version, variant)

    def uv(self) -> str | None:
        """A uv to install with: the one on PATH, else one put into the environment."""
        on_path = shutil.which("uv")
        if on_path:
            return on_path
        own = self.venv / "bin" / "uv"
        return str(own) if own.exists() or self.pip("install", "uv") else None

    def uv_settings(self) -> dict[str, str]:
        """What uv does not take from pip's configuration: its index, and the system's trust."""
        settings = {"UV_SYSTEM_CERTS": "1", "UV_NO_PROGRESS": "1"}
        index = subprocess.run(
            [str(self.python), "-m", "pip", "config", "get", "global.index-url"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        ).stdout.strip()
        index = os.environ.get("PIP_INDEX_URL", index)
        if index and not {"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & set(os.environ):
            settings["UV_DEFAULT_INDEX"] = index
        return settings

    def install_project(self, arguments: list[str]) -> None:
        """Step 3. uv and pip read the same constraints, so the choice decides the speed alone."""
        uv = self.uv()
        if uv:
            say("installing npu-qat and its dependencies with uv")
            if self.run([uv, "pip", *arguments, "--python", str(self.python)], self.uv_settings()):
                return
            say("uv could not reach or resolve something; going on with pip")
        else:
            say("installing npu-qat and its dependencies with pip")
        if not self.pip(*arguments):
            raise self.fail("the dependencies could not be installed")


def check_interpreter(
    system: str, version: tuple[int, ...], find_spec: Callable[[str], object]
) -> None:
    """Raise if this Python is too old or cannot make virtual environments (Debian splits that)."""
    if system != "posix":
        raise SetupError("npu-qat runs on Linux and macOS; on Windows use WSL.")
    wanted = ".".join(map(str, MIN_PYTHON))
    here = ".".join(map(str, version))
    if version < MIN_PYTHON:
        raise SetupError(
            f"npu-qat needs Python >= {wanted}; {sys.executable} is {here}. Name another one: "
            "make demo PYTHON=python3.12"
        )
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        raise SetupError(
            f"This Python {here} cannot make virtual environments. On Debian or Ubuntu: "
            "sudo apt install -y python3-venv"
        )


def fingerprint(*choices: str) -> str:
    """What the environment depends on; a change of it makes the stamp stale."""
    files = [ROOT / "pyproject.toml", Path(__file__)]
    parts = [*choices, str(ROOT), *(file.read_text(encoding="utf-8") for file in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Without PYTHONPATH and PYTHONHOME: pip would count what lies there as installed."""
    return {k: v for k, v in environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def say(text: str) -> None:
    print(f"bootstrap: {text}", flush=True)


def bootstrap(options: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Make the environment complete; nothing to do if the stamp says that it is."""
    started = time.monotonic()
    installer = Installer(options.venv.absolute())
    made_with, _, complete_for = installer.read_stamp().partition(" ")
    variant = choose_variant(environ, made_with or None, command_works)
    extras = EXTRAS[variant] if options.extras is None else options.extras
    constraints = Path(options.constraints or ROOT / CONSTRAINTS[variant]).read_text("utf-8")
    version = options.torch or pinned_version(constraints, "torch")
    mark = fingerprint(variant, extras, version, constraints, str(options.wheel))

    if complete_for == mark:
        return
    check_interpreter(os.name, sys.version_info[:2], importlib.util.find_spec)
    if installer.stamp.exists():
        installer.stamp.unlink()
    installer.make_venv()
    installer.log.write_text("", encoding="utf-8")
    installed = installer.install_torch(version, variant)
    effective = installer.venv / "constraints.txt"
    effective.write_text(effective_constraints(constraints, installed), encoding="utf-8")
    installer.install_project(project_arguments(extras, effective, options.wheel))
    installer.verify_torch(version, variant)
    installer.stamp.write_text(f"{variant} {mark}\n", encoding="utf-8")
    seconds = time.monotonic() - started
    say(f"ready: torch {installed} ({variant}) in {installer.venv}, {seconds:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Set up the virtual environment of npu-qat.",
        epilog="TORCH_VARIANT=cpu|cuda|npu overrides the torch build chosen for this machine.",
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument("--extras", help="extras, '' for none (default: dev, and the variant's)")
    parser.add_argument("--constraints", help="constraints file (default: the variant's)")
    parser.add_argument("--torch", help="torch version (default: the constraints file's)")
    parser.add_argument("--wheel", type=Path, help="install this wheel instead of the checkout")
    try:
        bootstrap(parser.parse_args(arguments), os.environ)
    except SetupError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
