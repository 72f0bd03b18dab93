"""What a result depends on besides its configuration: versions, machine, device, code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "npu-qat",
    "torch",
    "torch-npu",
    "transformers",
    "peft",
    "deepspeed",
    "accelerate",
    "safetensors",
    "numpy",
)


def describe_environment(selection: Any) -> dict[str, Any]:
    """The content of ``environment.json``. ``selection`` is the backend's."""
    import torch

    return {
        "device": str(selection.device),
        "backend": selection.backend.name,
        "reason": selection.reason,
        "versions": {"python": platform.python_version(), **package_versions()},
        "machine": platform.machine(),
        "system": " ".join((platform.system(), *platform.libc_ver())),
        "processor": _processor(),
        **_accelerator(selection.device),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _accelerator(device: Any) -> dict[str, str]:
    """The accelerator's own name, if the run is on one."""
    import torch

    if device.type == "cpu":
        return {}
    kind = getattr(torch, device.type)
    return {"accelerator": str(kind.get_device_name(device))}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git_commit() -> str | None:
    """The commit of the source tree this package is imported from, if it is one."""
    source = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() if (source / "pyproject.toml").exists() else None
