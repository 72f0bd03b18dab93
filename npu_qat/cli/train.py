"""``npu-qat train``: quantise, train, evaluate, report."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.backends.npu_installation import require_npu
from npu_qat.cli.arguments import (
    BACKENDS,
    DEVICES,
    HelpFormatter,
    add_config_arguments,
    examples,
    load_from,
)
from npu_qat.cli.terminal import INTERRUPTED, make_console, world_size

if TYPE_CHECKING:
    from npu_qat.config import Loaded

EXAMPLES = examples(
    "npu-qat train                                  # the embedded demo, on whatever is there",
    "npu-qat train my-run.yaml --device cpu",
    "npu-qat train --preset log-e13h --dry-run      # the plan, without training",
    "npu-qat train --preset demo --set train.steps=10 --set noise.enabled=false",
    "npu-qat train my-run.yaml --output runs/mine --resume auto",
    "torchrun --nproc_per_node 2 -m npu_qat train my-run.yaml --output runs/mine",
    "deepspeed --num_gpus 2 --module npu_qat train my-run.yaml --output runs/mine",
)


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "train",
        help="train, evaluate and report one run",
        description="Quantise the model, train adapters through the quantised weights, evaluate "
        "every arm on held-out problems, and write it all into one run directory. Without CONFIG "
        "and --preset this is the preset 'demo'.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_config_arguments(parser)
    parser.add_argument("--device", choices=DEVICES, help="same as --set run.device=...")
    parser.add_argument("--backend", choices=BACKENDS, help="same as --set run.backend=...")
    parser.add_argument("--output", metavar="DIR", help="run directory (run.output_dir)")
    parser.add_argument(
        "--resume",
        choices=("auto", "no"),
        help="auto: go on from the newest intact checkpoint in --output, or start if there is "
        "none; without CONFIG and --preset also takes the configuration from there",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved plan and do nothing"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``train`` and return its exit code."""
    console = make_console()
    loaded = _load(args, console)
    for note in loaded.notes:
        console.print(f"note: {note}", markup=False)
    if args.dry_run:
        from npu_qat.cli.dry_run import build_plan, print_plan

        print_plan(build_plan(loaded.config), console)
        return 0
    if loaded.config.run.device == "npu":
        require_npu()
    directory = run_directory(loaded)
    console.print(f"run directory: {directory}", markup=False)

    from npu_qat.experiments.run import execute
    from npu_qat.training.loop import Interrupted

    try:
        execute(loaded.config, directory, console)
    except Interrupted as stop:
        console.print(f"{stop}. Go on with: --output {directory} --resume auto", markup=False)
        return INTERRUPTED
    return 0


def run_directory(loaded: Loaded) -> Path:
    """The run's folder: as configured, else ``runs/<name>-<date>-<time>``.

    All processes of a launch must agree on it, so the time is that at which their launcher
    started. Raises ``ValueError`` for a launch over several machines without a configured folder.
    """
    configured = loaded.config.run.output_dir
    if configured is not None:
        return Path(configured)
    if loaded.config.run.resume == "auto":
        raise ValueError("--resume auto needs the run to go on with: add --output DIR")
    started = time.time()
    if world_size() > 1:
        local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
        if local is None or int(local) != world_size():
            raise ValueError("a run on several machines needs one folder for all: add --output DIR")
        started = _launcher_start()
    return Path("runs") / f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}"


def _launcher_start() -> float:
    """When the process that started all ranks of this machine was itself started."""
    import psutil

    created: float = psutil.Process(os.getppid()).create_time()
    return created


def _load(args: argparse.Namespace, console: Any) -> Loaded:
    config, preset = args.config, args.preset
    if config is None and preset is None:
        earlier = Path(args.output or "") / "config.yaml"
        if args.resume == "auto" and args.output and earlier.is_file():
            console.print(f"going on with the configuration in {earlier}", markup=False)
            config = str(earlier)
        else:
            console.print("no CONFIG and no --preset: using the preset 'demo'", markup=False)
            preset = "demo"
    options = {
        "run.device": args.device,
        "run.backend": args.backend,
        "run.output_dir": args.output,
        "run.resume": args.resume,
    }
    given = {key: value for key, value in options.items() if value is not None}
    return load_from(args, config=config, preset=preset, options=given)
