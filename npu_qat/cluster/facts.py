"""What a process knows of itself that must, or should, be the same in every other.

A rank computes with its own copy of the code, of the model and of the libraries. Where two copies
differ nothing fails: the ranks average gradients of two different models. So each copy is reduced
to a fingerprint, and the fingerprints are compared (agreement.py).

Weights are many GB, and reading all of them on every machine would take longer than the check may.
A file's fingerprint is its size with its first and last MiB: other weights of the same shape differ
there, since a safetensors file ends in weights. Damage in the middle of a file is not found.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_qat.config import RunConfig

EDGE = 2**20
# Variables that change what is computed or how machines reach each other; shown and compared.
VARIABLES = (
    "OMP_NUM_THREADS",
    "HCCL_CONNECT_TIMEOUT",
    "HCCL_EXEC_TIMEOUT",
    "HCCL_NPU_SOCKET_PORT_RANGE",
    "HCCL_DETERMINISTIC",
    "HCCL_WHITELIST_DISABLE",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "TASK_QUEUE_ENABLE",
    "CPU_AFFINITY_CONF",
    "PYTORCH_NPU_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "NPU_QAT_PEER_TIMEOUT",
    "HF_HUB_OFFLINE",
)


def collect(device: Any, config: RunConfig | None) -> dict[str, Any]:
    """The facts of this process, as plain data.

    Args:
        device: the torch device of this process.
        config: the run that is meant, or None.

    Returns:
        Keys ``rank``, ``local_rank``, ``host``, ``device``, ``devices`` (how many this machine
        has), ``accelerator``, ``versions``, ``code``, ``variables``, ``interface``, ``addresses``,
        and with a configuration ``config``, ``model`` and ``task``.
    """
    from npu_qat.experiments.environment import package_versions
    from npu_qat.training.network import interface_to

    interface = interface_to(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    facts = {
        "rank": int(os.environ.get("RANK", "0")),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "host": socket.gethostname(),
        "device": device.type,
        **_devices(device),
        "versions": {"python": platform.python_version(), **package_versions()},
        "code": code_fingerprint(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "interface": {"name": interface.name, "address": interface.address},
        "addresses": addresses(),
    }
    if config is not None:
        from npu_qat.config.dump import dump_yaml

        facts["config"] = hashlib.sha256(dump_yaml(config).encode()).hexdigest()[:12]
        if facts["local_rank"] == 0:  # once a machine
            facts["model"] = files_fingerprint(config.model.path)
            facts["task"] = files_fingerprint(config.task.path)
    return facts


def code_fingerprint() -> str:
    """Of all Python files of the installed package; equal for an editable and a real install."""
    import npu_qat

    root = Path(npu_qat.__file__).parent
    return _digest(sorted(root.rglob("*.py")), root, whole=True)


def files_fingerprint(path: str | None) -> str:
    """Of a model or data folder, or one file; a hub name, which is no file, stands for itself."""
    if path is None:
        return "built in"
    place = Path(path)
    if place.is_file():
        return _digest([place], place.parent)
    if place.is_dir():
        return _digest(sorted(p for p in place.rglob("*") if _counts(p, place)), place)
    if place.is_absolute():
        return "not there"
    return f"by name: {path}"


def addresses() -> dict[str, list[str]]:
    """IPv4 addresses of this machine by interface, loopback left out."""
    import psutil

    found = {
        name: [a.address for a in entries if a.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {
        name: mine
        for name, mine in found.items()
        if mine and not all(address.startswith("127.") for address in mine)
    }


def _counts(path: Path, root: Path) -> bool:
    """Hidden is what is hidden below ``root``; the folder itself may lie in ``~/.cache``."""
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.is_file() and not hidden and path.suffix not in (".md", ".lock", ".pyc")


def _digest(files: Iterable[Path], root: Path, *, whole: bool = False) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root).as_posix()}\0{size}\0".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(-1 if whole else EDGE))
            if not whole and size > EDGE:
                handle.seek(max(size - EDGE, EDGE))
                digest.update(handle.read())
    return digest.hexdigest()[:12]


def _devices(device: Any) -> dict[str, Any]:
    """How many accelerators this process sees, and what they are."""
    import torch

    if device.type == "cpu":
        return {"devices": len(os.sched_getaffinity(0)), "accelerator": platform.machine()}
    kind = getattr(torch, device.type)
    index = int(os.environ.get("LOCAL_RANK", "0"))
    return {"devices": kind.device_count(), "accelerator": str(kind.get_device_name(index))}
