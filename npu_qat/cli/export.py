"""``npu-qat export``: a finished run, or a model, as a folder that a serving engine loads."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.cli.arguments import HelpFormatter, add_config_arguments, examples, load_from
from npu_qat.cli.terminal import make_console

if TYPE_CHECKING:
    from npu_qat.config import RunConfig
    from npu_qat.deploy.adapter import Adapter
    from npu_qat.deploy.export import Exported
    from npu_qat.deploy.formats import Writer
    from npu_qat.deploy.run_source import TrainedBase

FORMATS = ("ascend", "compressed-tensors")
SCHEMES = ("W4A4_MXFP4", "W4A8_MXFP")
EXAMPLES = examples(
    "npu-qat export runs/mine --format ascend --output served      # base, and adapter beside it",
    "npu-qat export runs/mine --format compressed-tensors --output twin",
    "npu-qat export runs/mine --format ascend --adapter merge --output merged",
    "npu-qat export --model demo --format ascend --output ptq      # quantised, not trained",
    "npu-qat export --model path/to/model --format compressed-tensors --output nvfp4 "
    "--set quant.weight_profile=nvfp4 --set quant.activation_profile=nvfp4",
)


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "export",
        help="write a run or a model as a checkpoint that a serving engine loads",
        description="Quantise the base with the run's own numbers, layer by layer, write it in one "
        "format with the adapter beside it, and validate what was written.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_dir", nargs="?", metavar="RUN", help="directory of a run; brings its configuration"
    )
    parser.add_argument("--model", metavar="PATH", help="model.path, instead of a run directory")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="ascend: vllm-ascend and SGLang on Ascend 950; compressed-tensors: transformers, vLLM",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="a new folder")
    parser.add_argument(
        "--adapter",
        choices=("keep", "merge", "none"),
        help="keep (default for a run): beside the base, which stays as trained. merge: into the "
        "16-bit weights before they are quantised, with a report of what survives. none: base only",
    )
    parser.add_argument(
        "--adapter-dir", metavar="DIR", help="an adapter in PEFT's format, instead of the run's"
    )
    parser.add_argument(
        "--scheme", choices=SCHEMES, default=SCHEMES[0], help="for ascend (default: %(default)s)"
    )
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="devices to be served on"
    )
    parser.add_argument(
        "--any-activations",
        action="store_true",
        help="export for Ascend although training rounded the inputs by another profile",
    )
    add_config_arguments(parser, positional=False)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``export`` and return its exit code."""
    run_dir = _checked_run_dir(args)
    config_file = None if run_dir is None else str(run_dir / "config.yaml")
    options = {} if args.model is None else {"model.path": args.model}
    config = load_from(args, config=config_file, preset=args.preset, options=options).config

    from npu_qat.deploy import PackedCore, open_checkpoint
    from npu_qat.deploy.export import export
    from npu_qat.deploy.run_source import trained_base, trained_errors

    adapter, choice = _adapter(args, run_dir, config)
    writer = _writer(args)
    base = None if run_dir is None else trained_base(run_dir)
    known = base is not None and base.fingerprint is not None
    core = PackedCore(
        open_checkpoint(config.model),
        config.quant,
        merge=adapter if choice == "merge" else None,
        input_scales=_input_scales(config, args, base),
        trained_errors={} if run_dir is None or known else trained_errors(run_dir),
    )
    exported = export(
        core,
        writer,
        Path(args.output),
        adapter=adapter if choice == "keep" else None,
        any_activations=args.any_activations,
        trained=None if base is None else base.fingerprint,
    )
    if args.json:
        import json

        print(json.dumps({"output": args.output, **exported.record}, indent=2))
    else:
        _print(exported)
    return 0


def _checked_run_dir(args: argparse.Namespace) -> Path | None:
    """The run directory, or None for ``--model``. Raises ``ValueError`` unless exactly one."""
    if (args.run_dir is None) == (args.model is None):
        raise ValueError("give either a run directory or --model PATH (--help has examples)")
    if args.tensor_parallel < 1:
        raise ValueError("--tensor-parallel must be 1 or more")
    if args.format != "ascend" and args.scheme != SCHEMES[0]:
        raise ValueError(f"--scheme {args.scheme} goes with --format ascend")
    if args.run_dir is None:
        return None
    if args.preset is not None:
        raise ValueError("--preset goes with --model; a run directory brings its own configuration")
    if any(text.startswith(("quant.", "model.")) for text in args.overrides):
        raise ValueError("--set model... or quant... goes with --model; a run keeps its own")
    run_dir = Path(args.run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is no run directory: it has no config.yaml")
    return run_dir


def _adapter(
    args: argparse.Namespace, run_dir: Path | None, config: RunConfig
) -> tuple[Adapter | None, str]:
    """The adapter to export and what to do with it."""
    from npu_qat.deploy import read_adapter
    from npu_qat.deploy.run_source import check_scale, trained_adapter

    has_one = run_dir is not None or args.adapter_dir is not None
    choice = args.adapter or ("keep" if has_one else "none")
    if choice == "none":
        return None, choice
    if args.adapter_dir is not None:
        return read_adapter(Path(args.adapter_dir)), choice
    if run_dir is None:
        raise ValueError(f"--adapter {choice} with --model needs --adapter-dir DIR")
    adapter = read_adapter(trained_adapter(run_dir))
    check_scale(adapter, config.lora)
    return adapter, choice


def _writer(args: argparse.Namespace) -> Writer:
    from npu_qat.deploy import AscendWriter, CompressedTensorsWriter

    if args.format == "ascend":
        return AscendWriter(args.scheme, args.tensor_parallel)
    return CompressedTensorsWriter(args.tensor_parallel)


def _input_scales(
    config: RunConfig, args: argparse.Namespace, base: TrainedBase | None
) -> Mapping[str, Any]:
    """Calibrated scales where the format and the recipe need them: the run's own if it has any."""
    from npu_qat.numerics.profiles import get_profile

    recipe = config.quant
    needed = recipe.quantizes_input and get_profile(recipe.activation_profile).tensor_scale
    if not needed or args.format == "ascend":
        return {}
    if base is not None:
        return base.input_scales
    from npu_qat.deploy.run_source import calibrated_inputs

    return calibrated_inputs(config)


def _print(exported: Exported) -> None:
    console = make_console()
    record = exported.record
    if exported.survival:
        _print_survival(exported)
    lines = [
        f"{exported.folder}: {exported.tensors} tensors, {exported.bytes / 2**20:.1f} MiB, "
        "validated",
        f"base fingerprint {exported.fingerprint}",
    ]
    if record["adapter"] == "beside":
        lines.append(f"adapter: {exported.folder}/adapter, bound to this base")
    activations = record["activations"]
    if not activations["same"]:
        lines.append(
            f"activations differ: trained with {activations['trained']}, served with "
            f"{activations['served']}; compare weights, not outputs"
        )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _print_survival(exported: Exported) -> None:
    """What quantisation left of the merged adapter, by kind of linear."""
    from rich.table import Table

    from npu_qat.deploy.core import Survival

    kinds: dict[str, Survival] = {}
    for path, survival in exported.survival.items():
        kind = path.rpartition(".")[2]
        kinds[kind] = kinds[kind] + survival if kind in kinds else survival
    none = Survival(0.0, 0.0, 0.0, 0.0)
    kinds["all"] = sum(exported.survival.values(), none)
    table = Table(title="What is left of the merged adapter D = s B A", title_justify="left")
    for column in ("linears", "|D| / |W|", "kept", "noise / |D|"):
        table.add_column(column, justify="left" if column == "linears" else "right")
    for kind, s in kinds.items():
        table.add_row(kind, f"{s.size:.2%}", f"{s.kept:.3f}", f"{s.noise:.2f}")
    console = make_console()
    console.print(table)
    console.print(
        "kept: share of D in the change of the 4-bit weights (1: all, on average); noise: what "
        "else changed. The merged base is not the one that was trained on."
    )
