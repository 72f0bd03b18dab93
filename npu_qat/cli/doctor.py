"""``npu-qat doctor``: what is installed, what would be used, what is missing and how to get it.

Read-only. Nothing that the program does not need makes it fail: a C++ compiler and MPI may be
absent, and an accelerator too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from npu_qat.__about__ import __version__
from npu_qat.cli.arguments import DEVICES, HelpFormatter, add_config_arguments, examples, load_from
from npu_qat.cli.terminal import make_console, rank
from npu_qat.cluster.check import Check, Status

EXAMPLES = examples(
    "npu-qat doctor",
    "npu-qat doctor --json",
    "npu-qat doctor --rendezvous 10.0.0.1:29500 --wait 60   # does this machine reach it?",
    "scripts/launch_multinode.sh ... -- doctor --cluster my-run.yaml --output /shared/runs/mine",
    "torchrun --nproc_per_node 2 -m npu_qat doctor --cluster my-run.yaml",
)

# What training needs, with the lowest version (the same as in pyproject.toml; a test compares).
NEEDED = {
    "torch": "2.10",
    "transformers": "5.5",
    "peft": "0.18",
    "deepspeed": "0.19",
    "safetensors": "0.6",
    "numpy": "1.26",
    "pydantic": "2.10",
    "pyyaml": "6.0.2",
    "rich": "13.9",
    "matplotlib": "3.9",
    "jinja2": "3.1.4",
    "tensorboard": "2.18",
    "psutil": "5.9",
}
# What one use or another needs, and for what.
OPTIONAL = {
    "torch-npu": "training on an Ascend NPU: pip install 'npu-qat[npu]'",
    "triton": "fast kernels on NVIDIA GPUs: pip install 'npu-qat[gpu]'",
    "datasets": "GSM8K by its hub name: pip install datasets",
    "pyarrow": "GSM8K from Parquet files: pip install pyarrow",
}
LOWEST_PYTHON = (3, 10)
# Checkpoints, metrics and a report of the embedded demo stay below this.
LITTLE_DISK = 2 * 2**30


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine and installation",
        description="Print versions, devices, which device a run would take and why, and what is "
        "missing. Exit code 0 if everything that training needs is there, else 1. With --cluster, "
        "under the launcher of a run, on every machine: whether the machines agree and reach each "
        "other.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    cluster = parser.add_argument_group("several machines")
    cluster.add_argument(
        "--cluster",
        action="store_true",
        help="compare all processes of this launch: versions, code, configuration, model files, "
        "clocks; test the collectives and their speed",
    )
    add_config_arguments(parser)
    cluster.add_argument("--device", choices=DEVICES, help="as run.device")
    cluster.add_argument("--output", metavar="DIR", help="is this run directory seen by all?")
    cluster.add_argument(
        "--rank-table",
        metavar="FILE",
        help="check HCCL's rank table (default: RANK_TABLE_FILE, if it is set)",
    )
    cluster.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="only test whether this machine reaches it"
    )
    cluster.add_argument(
        "--wait", type=float, default=10.0, metavar="S", help="seconds to try (default 10)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``doctor`` and return its exit code."""
    with contextlib.redirect_stdout(sys.stderr):  # some libraries print while they are imported
        checks = _asked_for(args)
    healthy = not any(check.status == "missing" for check in checks)
    if args.json and rank() == 0:
        import json

        report = {"ok": healthy, "checks": [asdict(check) for check in checks]}
        print(json.dumps(report, indent=2))
    elif not args.json:
        _print(checks, healthy)
    return 0 if healthy else 1


def _asked_for(args: argparse.Namespace) -> list[Check]:
    options = ("config", "preset", "device", "output", "rank_table")
    given = [name for name in options if getattr(args, name)] + args.overrides
    if args.rendezvous is not None:
        from npu_qat.cluster import rendezvous

        if args.cluster or given:
            raise ValueError("--rendezvous is a test of its own: leave out --cluster and the rest")
        return rendezvous.examine(*rendezvous.parse(args.rendezvous), args.wait)
    if not args.cluster:
        if given:
            raise ValueError(f"{given[0]!r} belongs to doctor --cluster, which is not given")
        return examine()
    from npu_qat.cluster.examine import examine_cluster, rank_table_of_job

    loaded = None
    if args.config or args.preset:
        loaded = load_from(args, config=args.config, preset=args.preset)
    elif args.overrides:
        raise ValueError("--set changes a configuration: add CONFIG or --preset")
    table = Path(args.rank_table) if args.rank_table else rank_table_of_job()
    return examine_cluster(
        loaded.config if loaded else None,
        device=args.device or (loaded.config.run.device if loaded else "auto"),
        output=Path(args.output) if args.output else None,
        rank_table=table,
    )


def examine() -> list[Check]:
    """All checks. Never raises: what cannot be found out is a check that says so."""
    return [
        *_program(),
        *_packages(),
        *_devices(),
        *_ascend(),
        _deepspeed(),
        *_machine(),
        *_files(),
    ]


def _program() -> Iterator[Check]:
    yield Check("program", "npu-qat", "ok", __version__)
    enough = sys.version_info >= LOWEST_PYTHON
    lowest = ".".join(map(str, LOWEST_PYTHON))
    yield Check(
        "program",
        "python",
        "ok" if enough else "missing",
        f"{platform.python_version()} at {sys.executable}",
        "" if enough else f"install Python {lowest} or newer",
    )
    yield Check("program", "system", "ok", f"{platform.system()} {platform.machine()}")


def _packages() -> Iterator[Check]:
    for name, lowest in NEEDED.items():
        yield _package(name, lowest)
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        if version is None:
            yield Check("optional", name, "absent", "not installed", purpose)
        else:
            yield Check("optional", name, "ok", version)


def _package(name: str, lowest: str) -> Check:
    version = _version(name)
    get = f"pip install '{name}>={lowest}'"
    if name == "torch":
        get = "python scripts/bootstrap.py takes the torch build for this machine"
    if version is None:
        return Check("packages", name, "missing", "not installed", get)
    if version_key(version) < version_key(lowest):
        return Check("packages", name, "missing", f"{version} is older than {lowest}", get)
    return Check("packages", name, "ok", version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def version_key(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` as (2, 13, 0), to compare. Suffixes such as rc1 are not looked at."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


def _devices() -> Iterator[Check]:
    if _version("torch") is None:
        return
    from npu_qat.backends import BackendUnavailable, probe_devices, select

    for probe in probe_devices():
        status: Status = "ok" if probe.available else "absent"
        yield Check("devices", probe.name, status, probe.detail)
    try:
        selection = select("auto")
    except BackendUnavailable as error:
        yield Check("devices", "auto", "missing", str(error), "reinstall torch")
    else:
        yield Check("devices", "auto", "ok", selection.reason)


def _ascend() -> Iterator[Check]:
    """Only on machines with an NPU's device files, an Ascend toolkit or torch-npu."""
    from npu_qat.backends import npu_installation as ascend

    nodes = ascend.device_nodes()
    home, torch_npu = ascend.cann_home(), _version("torch-npu")
    if not nodes and home is None and torch_npu is None:
        return
    yield Check(
        "ascend",
        "device files",
        "ok" if nodes else "warning",
        f"{len(nodes)} NPUs" if nodes else "none under /dev",
        "" if nodes else "pass the NPUs to the container: --device /dev/davinci0 ...",
    )
    yield _driver(home)
    yield _cann(home)
    library = ascend.hccl_library()
    yield Check(
        "ascend",
        "HCCL",
        "ok" if library else "warning",
        str(library or "libhccl.so is not on LD_LIBRARY_PATH"),
        "" if library else f"source {ascend.set_env_script()}",
    )
    if _version("torch") is not None:
        yield from _torch_npu(home, torch_npu)


def _driver(home: Path | None) -> Check:
    from npu_qat.backends import npu_installation as ascend

    driver = ascend.driver_version()
    if driver is None:
        advice = f"install the driver, or mount {ascend.ASCEND}/driver into the container"
        return Check("ascend", "driver", "warning", "no version.info of a driver", advice)
    problem = ascend.driver_problem(driver, None if home is None else ascend.cann_version(home))
    if problem:
        advice = "install a newer Ascend HDK, or an image with an older CANN"
        return Check("ascend", "driver", "warning", problem, advice)
    return Check("ascend", "driver", "ok", driver)


def _cann(home: Path | None) -> Check:
    from npu_qat.backends import npu_installation as ascend

    if home is None:
        advice = f"source {ascend.set_env_script()}"
        return Check("ascend", "CANN", "warning", "ASCEND_HOME_PATH is not set", advice)
    version = ascend.cann_version(home)
    value = f"{version or 'version unknown'} at {home}"
    if version and version_key(version)[:2] < ascend.LOWEST_CANN_WITH_MX:
        advice = "MXFP4 operators came with CANN 9.0; without them they are emulated"
        return Check("ascend", "CANN", "warning", value, advice)
    return Check("ascend", "CANN", "ok", value)


def _torch_npu(home: Path | None, torch_npu: str | None) -> Iterator[Check]:
    """Whether torch, torch-npu and CANN fit, and what the chip can do."""
    from npu_qat.backends import npu_installation as ascend

    if torch_npu is None:
        value, advice = "not installed", OPTIONAL["torch-npu"]
        yield Check("ascend", "torch-npu", "warning", value, advice)
        return
    cann = None if home is None else ascend.cann_version(home)
    problem = ascend.pairing_problem(_version("torch") or "", torch_npu, cann)
    yield Check(
        "ascend",
        "torch-npu",
        "warning" if problem else "ok",
        problem or f"{torch_npu} fits torch {_version('torch')}",
        "pip install 'npu-qat[npu]' takes a pair that fits" if problem else "",
    )
    from npu_qat.backends import probe_devices
    from npu_qat.backends.npu import current_soc

    if next(probe for probe in probe_devices() if probe.name == "npu").available:
        import torch

        soc = current_soc(torch.npu)  # type: ignore[attr-defined]
        yield Check("ascend", "chip", "ok", f"{soc}: {soc.capability}")


def _deepspeed() -> Check:
    area, name = "training", "DeepSpeed accelerator"
    if _version("deepspeed") is None or _version("torch") is None:
        return Check(area, name, "missing", "DeepSpeed or torch is not installed", "see packages")
    from npu_qat.backends import select

    chosen, named = select("auto").device.type, os.environ.get("DS_ACCELERATOR")
    with _device_for_deepspeed(chosen):
        try:
            module = importlib.import_module("deepspeed.accelerator")
            accelerator = module.get_accelerator()
            found = str(accelerator._name)
            value = f"{found} with {accelerator.communication_backend_name()}"
        except Exception as error:  # an import of DeepSpeed fails in many ways
            return Check(
                area, name, "missing", f"cannot be imported: {error}", "reinstall deepspeed"
            )
    if named and found != chosen:
        return Check(
            area,
            name,
            "warning",
            f"{value} (DS_ACCELERATOR={named}), but a run would take {chosen}",
            "unset DS_ACCELERATOR: each run sets it to its own device, before it imports DeepSpeed",
        )
    why = f"DS_ACCELERATOR={named}" if named else "each run sets it to its own device"
    return Check(area, name, "ok", f"{value} ({why})")


@contextlib.contextmanager
def _device_for_deepspeed(chosen: str) -> Iterator[None]:
    """``DS_ACCELERATOR`` as a run on the chosen device would set it."""
    if "DS_ACCELERATOR" in os.environ:
        yield
        return
    os.environ["DS_ACCELERATOR"] = chosen
    try:
        yield
    finally:
        del os.environ["DS_ACCELERATOR"]


def _machine() -> Iterator[Check]:
    compiler = shutil.which("c++") or shutil.which("g++")
    yield Check(
        "training",
        "C++ compiler",
        "ok" if compiler else "absent",
        compiler or "none; not needed",
    )
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Check(
        "machine",
        "threads",
        "ok",
        f"{cores} cores, OMP_NUM_THREADS {threads or 'not set'}",
    )
    memory = _memory()
    if memory:
        yield Check("machine", "memory", "ok", memory)
    free = shutil.disk_usage(Path.cwd()).free
    little = free < LITTLE_DISK
    yield Check(
        "machine",
        "disk",
        "warning" if little else "ok",
        f"{free / 2**30:.1f} GiB free in {Path.cwd()}",
        "run elsewhere, or name another folder with --output" if little else "",
    )
    writable = os.access(Path.cwd(), os.W_OK)
    if not writable:
        yield Check(
            "machine", "folder", "warning", f"{Path.cwd()} is read-only", "use --output DIR"
        )


def _memory() -> str | None:
    """Total and available memory, on Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return f"{kib['MemTotal'] / 2**20:.1f} GiB, {kib['MemAvailable'] / 2**20:.1f} GiB available"


def _files() -> Iterator[Check]:
    from npu_qat.assets import demo_model_path

    try:
        yield Check("files", "demo model", "ok", str(demo_model_path()))
    except (OSError, ValueError) as error:
        yield Check("files", "demo model", "missing", str(error), "reinstall npu-qat")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    yield Check(
        "files",
        "model hub",
        "ok",
        "offline (HF_HUB_OFFLINE); models from folders and the cache" if offline else "allowed",
    )


def _print(checks: list[Check], healthy: bool) -> None:
    from rich.table import Table

    styles = {"ok": "green", "absent": "dim", "warning": "yellow", "missing": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    area = ""
    for check in checks:
        shown = f"{check.value}\n-> {check.advice}" if check.advice else check.value
        table.add_row(
            check.area if check.area != area else "",
            check.name,
            f"[{styles[check.status]}]{check.status}[/]",
            shown.replace("[", r"\["),
        )
        area = check.area
    console = make_console()
    console.print(table)
    missing = [check.name for check in checks if check.status == "missing"]
    if healthy:
        console.print("\nnothing that training needs is missing")
    else:
        console.print(f"\nmissing: {', '.join(missing)}", markup=False)
