"""``npu-qat serve-check``: is a running server the model that was exported?"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.cli.arguments import DEVICES, HelpFormatter, add_config_arguments, examples, load_from
from npu_qat.cli.terminal import make_console

if TYPE_CHECKING:
    from npu_qat.parity.serve_check import ServeReport
    from npu_qat.tasks import Task

FAILED = 1
KEY = "NPU_QAT_API_KEY"
EXAMPLES = examples(
    "npu-qat serve-check --url http://localhost:8000 --checkpoint served",
    "npu-qat serve-check --url http://localhost:8000 --checkpoint served --adapter mine "
    "--prompts 64",
    "npu-qat serve-check --url http://localhost:8000 --checkpoint served --json",
)


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "serve-check",
        help="compare a running vllm or vllm-ascend server with an export",
        description="Ask an OpenAI-compatible server of vLLM for log-probabilities and greedy "
        "tokens of real prompts and compare them with the export, within the measured noise. Exit "
        "code 1 if the server computes something else.",
        epilog=EXAMPLES + f"\n\n{KEY} holds the server's API key, if it wants one.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--url", required=True, help="of the server, as http://localhost:8000")
    parser.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="the export that is served"
    )
    parser.add_argument(
        "--adapter",
        metavar="NAME",
        help="the server's name of the adapter DIR/adapter, which is then compared with it "
        "applied; default: the base alone",
    )
    parser.add_argument(
        "--served-model", metavar="NAME", help="the server's name of the base; default: its first"
    )
    parser.add_argument(
        "--recording",
        metavar="DIR",
        help="what 'parity record' wrote: the training side's own numbers, prompts and noise; "
        "default: the export computed here",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=16,
        metavar="N",
        help="test problems, 2 or more (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=48, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="of the noise (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="of the reference")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds for one request"
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="of the reference")
    add_config_arguments(parser, positional=False)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``serve-check``: 0 if the server passed, else 1."""
    if min(args.prompts, args.max_new_tokens, args.seeds, args.batch_size) < 1:
        raise ValueError("--prompts, --max-new-tokens, --seeds and --batch-size must be 1 or more")
    folder = Path(args.checkpoint)
    adapter = folder / "adapter" if args.adapter is not None else None
    if adapter is not None and not adapter.is_dir():
        raise ValueError(f"--adapter {args.adapter}, but {folder} holds no adapter to compare with")
    config = load_from(args, config=None, preset=args.preset).config

    from npu_qat.parity.endpoint import Endpoint
    from npu_qat.parity.recording import Recording, Settings
    from npu_qat.parity.serve_check import require_spread, serve_check, served_name

    recording = None if args.recording is None else Recording.load(Path(args.recording))
    require_spread(args.prompts if recording is None else len(recording.messages))
    # Before the model, since loading takes time and a wrong address is quickly said.
    endpoint = Endpoint(args.url, api_key=os.environ.get(KEY), timeout=args.timeout)
    name = served_name(endpoint, args.adapter or args.served_model)

    from transformers import AutoTokenizer

    from npu_qat.backends import select
    from npu_qat.parity.serving import open_served
    from npu_qat.tasks import load_task

    selection = select(args.device)
    served = open_served(
        folder, adapter=adapter, device=selection.device, backend=selection.backend
    )
    messages = (
        _messages(load_task(config.task), args.prompts) if recording is None else recording.messages
    )
    report = serve_check(
        endpoint,
        name,
        served,
        AutoTokenizer.from_pretrained(folder),
        messages,
        Settings(args.prompts, args.max_new_tokens, args.seeds, args.batch_size),
        recording=recording,
    )
    if args.json:
        import json

        print(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report)
    return 0 if report.passed else FAILED


def _messages(task: Task, count: int) -> list[list[dict[str, str]]]:
    """Chat prompts of the first ``count`` test problems."""
    if count > len(task.test):
        raise ValueError(f"--prompts {count}: the task has {len(task.test)} test problems")
    return [task.messages(problem) for problem in task.test[:count]]


def _print(report: ServeReport) -> None:
    console = make_console()
    verdict = "serves" if report.passed else "does not serve"
    lines = [f"{report.url} {verdict} the export (as {report.model!r})"]
    for check in report.checks:
        mark = "ok" if check.ok else "FAIL"
        lines.append(f"  {mark:4}  {check.name}: {check.measured}  [expected: {check.expected}]")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
