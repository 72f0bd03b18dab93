"""``npu-qat experiment``: a matrix of arms, seeds and models, its results, and their pages."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.cli.arguments import DEVICES, HelpFormatter, examples
from npu_qat.cli.terminal import FAILED, INTERRUPTED, make_console

if TYPE_CHECKING:
    from npu_qat.experiments.matrix import Cell, Matrix
    from npu_qat.experiments.matrix_store import Store

RUN_EXAMPLES = examples(
    "npu-qat experiment run smoke                       # minutes on a CPU",
    "npu-qat experiment run my-matrix.yaml --jobs 4 --results results/mine",
    "npu-qat experiment run rl-demo --device cuda --jobs 12 --time-limit 540",
    "npu-qat experiment run rl-demo --arms bf16-lora,mxfp4-w4a4 --seeds 0,1 --dry-run",
    "npu-qat experiment run sft-smollm2 --model smollm2=models/smollm2 --set task.path=data/gsm8k",
)
LIST_EXAMPLES = examples("npu-qat experiment list")
REPORT_EXAMPLES = examples(
    "npu-qat experiment report smoke                    # of runs/experiments/smoke/results",
    "npu-qat experiment report my-matrix.yaml --results results/mine --output pages/mine",
)
PAGES_EXAMPLES = examples(
    "npu-qat experiment pages docs/results              # every page anew from the result files",
    "npu-qat experiment pages docs/results --check      # are they up to date?",
)
WORKER_EXAMPLES = examples("npu-qat experiment worker smoke   # reads ids of cells, a line each")


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "experiment",
        help="run and report a matrix of arms, seeds and models",
        description="A matrix file names arms (configurations), seeds and models, and the "
        "questions asked of them. 'run' carries out what has no result yet and never overwrites "
        "one; 'report' puts the results into tables with intervals and corrected tests.",
        epilog=RUN_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    inner = parser.add_subparsers(title="commands", metavar="COMMAND")
    parser.set_defaults(run=lambda args: parser.print_help() or 0)
    _add(inner, "list", "list the matrices that come with the package", LIST_EXAMPLES, _list)
    _add_run(_add(inner, "run", "carry out the cells without a result", RUN_EXAMPLES, _run))
    report = _add(inner, "report", "report the results of a matrix", REPORT_EXAMPLES, _report)
    report.add_argument("matrix", metavar="MATRIX", help="a YAML file, or a shipped one's name")
    report.add_argument("--results", metavar="DIR", help="default: runs/experiments/NAME/results")
    report.add_argument("--output", metavar="DIR", help="where to write; default: beside DIR")
    pages = _add(inner, "pages", "make all pages of a folder anew", PAGES_EXAMPLES, _pages)
    pages.add_argument("folder", metavar="DIR", help="holds <matrix>/cells, e.g. docs/results")
    pages.add_argument(
        "--check", action="store_true", help="write nothing; fail if a page is out of date"
    )
    _add_selection(_add(inner, "worker", "(used by run) do named cells", WORKER_EXAMPLES, _worker))


def _add(commands: Any, name: str, purpose: str, epilog: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    _add_selection(run)
    run.add_argument("--jobs", type=_positive, default=1, metavar="N", help="cells at once")
    run.add_argument(
        "--devices", default="", metavar="N,N", help="accelerators to spread the cells over"
    )
    run.add_argument(
        "--time-limit",
        type=_positive_seconds,
        metavar="SECONDS",
        help="start no cell that would not end before, and ask running ones to stop then",
    )
    run.add_argument("--retry-failed", action="store_true", help="try failed cells again")
    run.add_argument(
        "--code",
        choices=("same", "any"),
        default="same",
        help="same: a result counts if this version of the code made it. any: whatever made it",
    )
    run.add_argument("--dry-run", action="store_true", help="list the cells and do nothing")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    """Which cells, on what, and where their results go."""
    parser.add_argument("matrix", metavar="MATRIX", help="a YAML file, or a shipped one's name")
    parser.add_argument("--results", metavar="DIR", help="default: runs/experiments/NAME/results")
    parser.add_argument("--runs", metavar="DIR", help="default: runs/experiments/NAME/runs")
    parser.add_argument("--keep-runs", action="store_true", help="keep the folders of done runs")
    parser.add_argument("--device", choices=DEVICES, help="same as --set run.device=...")
    parser.add_argument("--arms", metavar="A,B", help="only these arms")
    parser.add_argument("--seeds", metavar="N,N", help="only these seeds")
    parser.add_argument("--priority", type=int, metavar="N", help="only arms up to this priority")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="where a model of the matrix is; again for more",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="set one key in every cell; again for more",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _positive_seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def _list(args: argparse.Namespace) -> int:
    from npu_qat.experiments.matrix import cells, load_matrix, matrix_path, shipped_matrices
    from npu_qat.experiments.matrix_store import code_digest

    console = make_console()
    for name in shipped_matrices():
        matrix = load_matrix(matrix_path(name))
        count = len(cells(matrix))
        console.print(f"{name:16} {matrix.title} ({len(matrix.arms)} arms, {count} cells)")
    console.print(f"code of this checkout: {code_digest()}")
    return 0


def _select(args: argparse.Namespace) -> tuple[Matrix, list[Cell], Path, Path]:
    """The matrix, its chosen cells, and the folders of results and runs."""
    from npu_qat.config import ConfigError, Override, parse_overrides
    from npu_qat.experiments.matrix import cells, load_matrix, matrix_path

    matrix = load_matrix(matrix_path(args.matrix))
    models = {}
    for text in args.model:
        name, separator, path = text.partition("=")
        if not separator:
            raise ConfigError([f"--model {text}: expected NAME=PATH"])
        models[name] = path
    overrides = parse_overrides(args.overrides)
    if args.device:
        overrides.append(Override(("run", "device"), args.device, f"--device {args.device}"))
    chosen = everything = cells(matrix, models=models, overrides=overrides)
    if args.arms is not None:
        names = args.arms.split(",")
        if unknown := sorted(set(names) - {arm.name for arm in matrix.arms}):
            known = ", ".join(arm.name for arm in matrix.arms)
            raise ConfigError([f"--arms: there is no arm {unknown[0]!r}; arms: {known}"])
        chosen = [cell for cell in chosen if cell.arm.name in names]
    if args.seeds is not None:
        seeds = _seeds(args.seeds, {cell.seed for cell in everything})
        chosen = [cell for cell in chosen if cell.seed in seeds or not cell.arm.train]
    if args.priority is not None:
        chosen = [cell for cell in chosen if cell.arm.priority <= args.priority]
    home = Path("runs") / "experiments" / matrix.name
    return matrix, chosen, Path(args.results or home / "results"), Path(args.runs or home / "runs")


def _seeds(text: str, known: set[int]) -> set[int]:
    """The numbers of ``--seeds``. Raises ``ConfigError`` for one that no arm has."""
    from npu_qat.config import ConfigError

    listed = ", ".join(map(str, sorted(known)))
    chosen = set()
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) not in known:
            raise ConfigError([f"--seeds: no arm has the seed {part!r}; seeds: {listed}"])
        chosen.add(int(part))
    return chosen


def _run(args: argparse.Namespace) -> int:
    from npu_qat.experiments.matrix_run import Workplace, make_slots, run_cells
    from npu_qat.experiments.matrix_store import Store, code_digest

    console = make_console()
    matrix, chosen, results, runs = _select(args)
    store = Store(results, any_code=args.code == "any")
    state = {cell.id: _state(store, cell) for cell in chosen}
    if args.dry_run:
        for cell in chosen:
            console.print(f"{cell.id:44} {cell.digest}  {state[cell.id]}", markup=False)
    skip = {"done"} if args.retry_failed else {"done", "failed"}
    waiting = [cell for cell in chosen if state[cell.id] not in skip]
    counts = {s: list(state.values()).count(s) for s in ("done", "failed", "to do")}
    console.print(
        f"{matrix.name}: {len(chosen)} cells, {counts['done']} done, {counts['failed']} failed, "
        f"{len(waiting)} to do; code {code_digest()}; results in {results}",
        markup=False,
    )
    if args.dry_run:
        return 0
    expected = {cell.id for cell in chosen if cell.arm.expect == "refused"}
    earlier = {name for name, what in state.items() if what == "failed" and what in skip} - expected
    if earlier:
        console.print(
            f"left alone, since they failed earlier: {len(earlier)}; --retry-failed tries again",
            markup=False,
        )
    if not waiting:
        return FAILED if earlier else 0
    runs.mkdir(parents=True, exist_ok=True)
    devices = [text for text in args.devices.split(",") if text]
    slots = make_slots(min(args.jobs, len(waiting)), devices, args.device or "auto")
    command = [sys.executable, "-m", "npu_qat", "experiment", "worker", *_forwarded(args, runs)]
    with _stopped_as_by_ctrl_c():
        progress = run_cells(
            waiting,
            store,
            Workplace(command, runs, slots),
            lambda text: console.print(text, markup=False, soft_wrap=True),
            time_limit=args.time_limit,
            known=_seconds(store, chosen),
        )
    console.print(
        f"{len(progress.done)} done, {len(progress.failed)} failed, {len(progress.stopped)} "
        f"stopped, {len(progress.not_started)} not started"
        + (f", {len(progress.elsewhere)} at work elsewhere" if progress.elsewhere else ""),
        markup=False,
    )
    if progress.stopped or progress.not_started or progress.elsewhere:
        return INTERRUPTED
    return FAILED if earlier | set(progress.failed) - expected else 0


@contextmanager
def _stopped_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, by which a cluster ends a job, lets the running cells write a checkpoint, too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _state(store: Store, cell: Cell) -> str:
    if store.result(cell) is not None:
        return "done"
    return "failed" if store.failures(cell) else "to do"


def _seconds(store: Store, chosen: list[Cell]) -> dict[str, float]:
    """Arm -> most seconds of its results."""
    results = [result for cell in chosen if (result := store.result(cell)) is not None]
    ordered = sorted(results, key=lambda result: float(result["seconds"]))
    return {result["arm"]: float(result["seconds"]) for result in ordered}


def _forwarded(args: argparse.Namespace, runs: Path) -> list[str]:
    """The worker's arguments: what decides which cells there are and how they run."""
    words = [args.matrix, "--runs", str(runs)]
    for option in ("results", "device", "arms", "seeds", "priority"):
        value = getattr(args, option)
        words += [f"--{option}", str(value)] if value is not None else []
    for text in args.model:
        words += ["--model", text]
    for text in args.overrides:
        words += ["--set", text]
    return [*words, *(["--keep-runs"] if args.keep_runs else [])]


def _worker(args: argparse.Namespace) -> int:
    from npu_qat.experiments.matrix_run import serve_cells
    from npu_qat.experiments.matrix_store import Store

    _, chosen, results, runs = _select(args)
    return serve_cells(chosen, Store(results), runs, keep_runs=args.keep_runs)


def _report(args: argparse.Namespace) -> int:
    from npu_qat.experiments.matrix import load_matrix, matrix_path
    from npu_qat.experiments.matrix_report import write_report

    matrix = load_matrix(matrix_path(args.matrix))
    results = Path(args.results or Path("runs") / "experiments" / matrix.name / "results")
    if not results.is_dir():
        raise ValueError(
            f"{results}: no such folder; 'npu-qat experiment run {args.matrix}' makes results, and "
            "--results says where they are"
        )
    output = Path(args.output) if args.output else results.parent
    for path in write_report(matrix, results, output):
        make_console().print(str(path), markup=False)
    return 0


def _pages(args: argparse.Namespace) -> int:
    from npu_qat.experiments.matrix_pages import stale_pages, write_pages

    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not args.check:
        for path in write_pages(folder):
            make_console().print(str(path), markup=False)
        return 0
    stale = stale_pages(folder)
    for path in stale:
        make_console().print(f"out of date: {path}", markup=False)
    return FAILED if stale else 0
