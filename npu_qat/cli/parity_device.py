"""``npu-qat parity device``: does this device compute what the emulation computes?"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.cli.arguments import BACKENDS, DEVICES, HelpFormatter, examples
from npu_qat.cli.terminal import report_line

if TYPE_CHECKING:
    from npu_qat.parity.device import Recording

DIFFERS = 1
EXAMPLES = examples(
    "npu-qat parity device --device npu --record ascend950.json",
    "npu-qat parity device --replay ascend950.json",
    "npu-qat parity device --device npu --quick --profile ascend950",
)


def add_parser(commands: Any) -> None:
    """Add the command to the parser of ``npu-qat parity``."""
    parser = commands.add_parser(
        "device",
        help="compare a device's 4-bit arithmetic with the emulation's, code by code",
        description="Let a device quantise and multiply a fixed set of inputs, compare codes, "
        "scale bytes and products with the emulation, and say of each difference what it looks "
        "like. Exit code 1 if anything differs.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="npu", help="where to compute (default: npu)"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="who computes (default: auto)"
    )
    parser.add_argument(
        "--profile",
        action="append",
        metavar="NAME",
        help="a numerics profile; again for more (default: those of the NPU's operators)",
    )
    parser.add_argument(
        "--case", action="append", metavar="TEXT", help="only cases whose name holds TEXT"
    )
    parser.add_argument(
        "--quick", action="store_true", help="without the cases in the size of real layers"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE.json", help="write down what the device answered"
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="FILE.json",
        help="judge a recording; needs no device and ignores the options above",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``parity device``: 0 if nothing differs, 1 if something does."""
    if args.replay is not None and args.record is not None:
        raise ValueError("--replay reads a recording and --record writes one: choose one of them")
    if args.record is not None and args.record.suffix != ".json":  # before the minutes, not after
        raise ValueError(f"--record {args.record}: the name must end in .json")

    from npu_qat.parity.device import judge, passed, report
    from npu_qat.parity.device_recording import read_recording, write_recording

    recording = _measure(args) if args.replay is None else read_recording(args.replay)
    verdicts = judge(recording)
    print(report(recording, verdicts))
    if args.record is not None:
        for path in write_recording(args.record, recording, verdicts):
            report_line(f"wrote {path}")
    if not verdicts:
        raise ValueError("no case of the suite has such a name (--case)")
    if all(v.refused for v in verdicts):
        report_line("nothing was compared: the backend refused every case")
    return 0 if passed(verdicts) else DIFFERS


def _measure(args: argparse.Namespace) -> Recording:
    from npu_qat.backends import select
    from npu_qat.experiments.environment import describe_environment
    from npu_qat.parity.device import PROFILES, measure

    selection = select(args.device, args.backend)
    described = describe_environment(selection)
    versions = described.pop("versions")
    environment = {key: str(value) for key, value in {**described, **versions}.items()}
    parts = args.case or [""]
    # The NPU backend refuses what a trial finds wrong; here is the place to see what is wrong.
    untried = getattr(selection.backend, "without_trials", lambda: selection.backend)
    return measure(
        untried(),
        selection.device,
        environment=environment,
        profiles=args.profile or PROFILES,
        wanted=lambda name: any(part in name for part in parts),
        large=not args.quick,
        progress=_announce_profiles(),
    )


def _announce_profiles() -> Callable[[str, str], None]:
    """A line when a profile begins: on a device the first call may compile for minutes."""
    seen: set[str] = set()

    def announce(profile: str, case: str) -> None:
        if profile not in seen:
            seen.add(profile)
            report_line(f"{profile} ...")

    return announce
