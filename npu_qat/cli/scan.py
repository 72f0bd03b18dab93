"""``npu-qat scan``: which linears suffer from 4 bits, their cost, and what noise that suggests."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.cli.arguments import (
    BACKENDS,
    DEVICES,
    HelpFormatter,
    add_config_arguments,
    examples,
    load_from,
)
from npu_qat.cli.terminal import make_console, rank
from npu_qat.training.rundir import prove_writable

if TYPE_CHECKING:
    from rich.console import Console

    from npu_qat.config import LayerSigma, Loaded
    from npu_qat.reporting.scan_page import Guidance
    from npu_qat.sensitivity import Scan, Text

EXAMPLES = examples(
    "npu-qat scan                                          # the demo model, in seconds",
    "npu-qat scan --preset demo --output scans/demo",
    "npu-qat scan --model_path path/to/model --prompts prompts.jsonl --loss layer",
    "npu-qat scan --set quant.weight_profile=nvfp4 --set quant.activation_profile=nvfp4",
    "npu-qat scan --method published --model_path path/to/model --quant_type mxfp4 "
    "--injection_point both --output w4a4_srdd_results.json",
)
METHODS = ("linears", "published")
QUANT_TYPES = ("mxfp4", "nvfp4")
# What --quant_type means: the numbers that serve, and those of the documents' own scanner.
SERVED = {"mxfp4": "ascend950", "nvfp4": "nvfp4"}
INJECTION_POINTS = ("weight", "input", "both", "output", "weight_output")
LOSSES = ("none", "layer", "linear")
SCORES = ("output", "input", "weight", "loss", "leave_one_out", "elementwise")
DEFAULT_LOSS, DEFAULT_SCORE, DEFAULT_BATCH = "linear", "output", 8
DEFAULT_TEXTS = 32
PUBLISHED_TEXTS = 8
_SHOWN = 8


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "scan",
        help="measure what 4 bits do to each linear, and suggest multipliers for the noise",
        description="Read the task's problems (or a file) with the 16-bit model and measure, for "
        "each linear that the configuration quantises, the error of its input, weight and result "
        "and what it adds to the loss. Writes JSON, a heat map, an HTML page, and for each "
        "strategy a YAML file that 'npu-qat train' takes. The model is not changed. Without "
        "CONFIG, --preset and --model_path it scans the demo.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--model_path", "--model", metavar="PATH", help="same as --set model.path=..."
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="linears",
        help="linears (default): what W4A4 quantises. published: the design documents' scan of the "
        "hidden states, with their thresholds and their JSON",
    )
    parser.add_argument(
        "--quant_type",
        choices=QUANT_TYPES,
        help="short for both profiles: ascend950 or nvfp4; with --method published the documents' "
        "own numbers, fork-mxfp4 or fork-nvfp4-row",
    )
    parser.add_argument(
        "--injection_point",
        choices=INJECTION_POINTS,
        help="same as --set quant.injection_point=...",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="read these instead of the task's problems: .jsonl with 'prompt' and 'completion', or "
        "plain text, one text a line",
    )
    parser.add_argument(
        "--num_prompts",
        type=int,
        metavar="N",
        help=f"how many (default {DEFAULT_TEXTS}; published {PUBLISHED_TEXTS})",
    )
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        help="what each linear (default), or each layer and kind, adds to the loss: two passes "
        "over the texts each",
    )
    parser.add_argument(
        "--score",
        choices=SCORES,
        help="what the multipliers go by (default output)",
    )
    parser.add_argument(
        "--normalize", action="store_true", help="multipliers with mean 1 (noise.layers.normalize)"
    )
    parser.add_argument(
        "--batch_size", type=int, metavar="N", help="texts a forward pass (loss; default 8)"
    )
    for name, default, what in (
        ("sqnr", 20.0, "dB below which"),
        ("deadzone", 0.05, "share above which"),
        ("saturation", 0.01, "share above which"),
        ("relative_error", 0.10, "share above which"),
    ):
        parser.add_argument(
            f"--{name}_threshold",
            type=float,
            metavar="X",
            help=f"{what} --method published flags a layer (default {default:g})",
        )
    parser.add_argument("--device", choices=DEVICES, help="same as --set run.device=...")
    parser.add_argument("--backend", choices=BACKENDS, help="same as --set run.backend=...")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a folder, or a .json file beside which the others are put. Default: "
        "scans/<name>-<date>-<time>",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``scan`` and return its exit code."""
    _check(args)
    loaded = _load(args)
    from npu_qat.backends import select
    from npu_qat.layers.base_model import load_base

    if args.method == "linears":
        from npu_qat.sensitivity import check_score

        check_score(args.score or DEFAULT_SCORE, loaded.config.quant, args.loss or DEFAULT_LOSS)
    console = make_console()
    for note in loaded.notes:
        console.print(f"note: {note}", markup=False)
    config = loaded.config
    selection = select(config.run.device, config.run.backend)
    if config.run.threads is not None:
        import torch

        torch.set_num_threads(config.run.threads)
    console.print(f"device: {selection.reason}", markup=False)
    model, tokenizer = load_base(config.model, selection.device)
    texts, source = _texts(args, loaded, tokenizer)
    console.print(f"texts: {source}", markup=False)
    files = _Files.at(args.output, loaded.name)
    if args.method == "published":
        _published(args, loaded, model, texts, source, files, console)
        return 0

    from npu_qat.sensitivity import scan

    found = scan(
        model,
        texts,
        config.quant,
        backend=selection.backend,
        loss=args.loss or DEFAULT_LOSS,
        batch_size=args.batch_size or DEFAULT_BATCH,
        progress=_progress(console),
    )
    _write(args, loaded, found, source, files, console)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other. Raises ``ValueError``."""
    thresholds = [
        f"--{name}_threshold"
        for name in ("sqnr", "deadzone", "saturation", "relative_error")
        if getattr(args, f"{name}_threshold") is not None
    ]
    if thresholds and args.method != "published":
        raise ValueError(f"{thresholds[0]} goes with --method published; the scan of linears ranks")
    for option in thresholds:
        value = getattr(args, option[2:])
        if not math.isfinite(value) or value < 0.0:
            raise ValueError(f"{option} must be a number of 0 or more, not {value}")
    if args.method == "published":
        for option in ("loss", "score", "batch_size"):
            if getattr(args, option) is not None:
                raise ValueError(
                    f"--{option} goes with --method linears; the published scan measures no loss, "
                    "and its multipliers go by its relative error"
                )
    for option in ("num_prompts", "batch_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be 1 or more, not {value}")
    profiles = [o for o in args.overrides if o.startswith("quant.") and "_profile" in o]
    if args.quant_type and profiles:
        raise ValueError(
            f"--quant_type sets both profiles; leave it out to use --set {profiles[0]}"
        )


def _load(args: argparse.Namespace) -> Loaded:
    """The configuration, with the documents' options over everything else."""
    preset = args.preset
    if args.config is None and preset is None and args.model_path is None:
        preset = "demo"
    options: dict[str, str | None] = {
        "run.device": args.device,
        "run.backend": args.backend,
        "model.path": args.model_path,
        "quant.injection_point": args.injection_point,
    }
    if args.model_path is not None:
        # A revision that a preset names is one of the preset's own model.
        args.overrides = ["model.revision=null", *args.overrides]
    if args.injection_point is not None:
        options["quant.lora_input"] = "full"  # a scan has no LoRA
    if args.quant_type is not None:
        from npu_qat.sensitivity.published import PROFILES

        names = PROFILES if args.method == "published" else SERVED
        options |= {
            "quant.weight_profile": names[args.quant_type],
            "quant.activation_profile": names[args.quant_type],
            "quant.block_axis": "row",
        }
    given = {key: value for key, value in options.items() if value is not None}
    return load_from(args, config=args.config, preset=preset, options=given)


# What is read -------------------------------------------------------------------------------------


def _texts(args: argparse.Namespace, loaded: Loaded, tokenizer: Any) -> tuple[list[Text], str]:
    """The token sequences, and where they come from in words."""
    from npu_qat.layers.base_model import answer_ids, prompt_ids
    from npu_qat.sensitivity import Text
    from npu_qat.tasks import load_task

    published = args.method == "published"
    wanted = args.num_prompts or (PUBLISHED_TEXTS if published else DEFAULT_TEXTS)
    if args.prompts is not None:
        return _texts_from_file(Path(args.prompts), wanted, tokenizer)
    task = load_task(loaded.config.task)
    problems = task.train[:wanted]
    texts = [
        Text(
            tuple(prompt_ids(tokenizer, task.messages(problem))),
            tuple(answer_ids(tokenizer, problem.solution)),
        )
        for problem in problems
    ]
    return texts, f"the first {len(texts)} training problems of {task.name} with their solutions"


def _texts_from_file(file: Path, wanted: int, tokenizer: Any) -> tuple[list[Text], str]:
    """Raises ``ValueError`` for a file that cannot be read, or a line that is not as it must be."""
    from npu_qat.layers.base_model import answer_ids, prompt_ids
    from npu_qat.sensitivity import Text

    try:
        # Not splitlines(): texts may hold U+2028.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {file}: cannot be read: {error}") from None
    texts: list[Text] = []
    for number, line in enumerate(lines, start=1):
        if len(texts) == wanted:
            break
        if not line.strip():
            continue
        if file.suffix == ".jsonl":
            prompt, completion = _record(line, f"{file}, line {number}")
            messages = [{"role": "user", "content": prompt}]
            text = Text(
                tuple(prompt_ids(tokenizer, messages)), tuple(answer_ids(tokenizer, completion))
            )
        else:
            ids = tokenizer(line, add_special_tokens=False)["input_ids"]
            if len(ids) < 2:
                raise ValueError(f"{file}, line {number}: needs at least two tokens")
            text = Text(tuple(ids[:1]), tuple(ids[1:]))
        texts.append(text)
    if not texts:
        raise ValueError(f"--prompts {file}: there is no text in it")
    return texts, f"the first {len(texts)} of {file.name}"


def _record(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg})") from None
    found = record if isinstance(record, dict) else {}
    prompt, completion = found.get("prompt"), found.get("completion")
    if not (isinstance(prompt, str) and isinstance(completion, str) and prompt and completion):
        raise ValueError(f"{where}: expected an object with the texts 'prompt' and 'completion'")
    return prompt, completion


# What is written ----------------------------------------------------------------------------------


class _Files:
    """Where a scan's files go."""

    def __init__(self, folder: Path, stem: str | None) -> None:
        self.folder, self.stem = folder, stem

    @classmethod
    def at(cls, output: str | None, name: str) -> _Files:
        if output is None:
            output = f"scans/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = Path(output)
        json_file = path.suffix == ".json"
        folder, stem = (path.parent, path.stem) if json_file else (path, None)
        try:  # before a scan that may take long
            prove_writable(folder)
        except OSError as error:
            raise ValueError(
                f"--output {output}: {folder} is no folder that can be written to: {error.strerror}"
            ) from None
        return cls(folder, stem)

    @property
    def result(self) -> Path:
        return self.folder / f"{self.stem or 'scan'}.json"

    @property
    def page(self) -> Path:
        return self.folder / f"{self.stem or 'scan'}.html"

    @property
    def picture(self) -> Path:
        return self.folder / f"{self.stem or 'heatmap'}.png"

    def noise(self, strategy: str) -> Path:
        prefix = f"{self.stem}-" if self.stem else ""
        return self.folder / f"{prefix}noise-{strategy}.yaml"


def _write(
    args: argparse.Namespace,
    loaded: Loaded,
    found: Scan,
    source: str,
    files: _Files,
    console: Console,
) -> None:
    if rank() != 0:
        return
    from npu_qat.reporting.scan_page import headline, write_heat_map, write_scan_page
    from npu_qat.sensitivity import layer_scores
    from npu_qat.sensitivity.statements import statements

    model = loaded.config.model.path
    score = args.score or DEFAULT_SCORE
    guidance = _guidance(score, layer_scores(found, score), args.normalize)
    sentences = statements(found)
    written = _write_noise(guidance, files, f"a scan of {model}, score {score}")
    _write_json(
        files.result,
        {
            **found.as_dict(),
            "model": model,
            "source": source,
            "statements": sentences,
            "guidance": _guidance_dict(guidance),
        },
    )
    title = f"{model}: {headline(found)}"
    write_heat_map(found, files.picture, title)
    names = _what_is_what(files, written)
    write_scan_page(
        found,
        files.page,
        model=model,
        source=source,
        guidance=guidance,
        statements=sentences,
        files=names,
    )
    _print(found, guidance, sentences, console)
    for path in (files.result, files.picture, files.page, *written):
        console.print(f"wrote {path}", markup=False)


def _what_is_what(files: _Files, noise: list[Path]) -> dict[str, str]:
    """Names of the other files for the page, with what they are."""
    return {
        files.result.name: "everything measured",
        files.picture.name: "the heat maps as a picture",
        **{path.name: "noise for npu-qat train" for path in noise},
    }


def _guidance(score: str, scores: dict[int, float], normalize: bool) -> Guidance:
    from npu_qat.reporting.scan_page import Guidance
    from npu_qat.sensitivity import STRATEGIES, guide, spread

    sections = {name: guide(scores, name, normalize=normalize) for name in STRATEGIES}
    return Guidance(score, scores, sections, spread(scores))


def _guidance_dict(guidance: Guidance) -> dict[str, Any]:
    from npu_qat.sensitivity import layer_sigma_config

    blocks = {}
    for name, section in guidance.sections.items():
        block: dict[str, Any] = {"noise.layers": section.model_dump(mode="json")}
        if not (section.normalize and section.zone_schedule is not None):
            plain = _normalized(section, guidance.scores)
            block["layer_sigma_config"] = layer_sigma_config(plain)
        blocks[name] = block
    return {
        "score": guidance.score,
        "scores": {str(layer): score for layer, score in guidance.scores.items()},
        "statement": guidance.statement,
        "strategies": blocks,
    }


def _normalized(section: LayerSigma, layers: dict[int, float]) -> LayerSigma:
    """``section`` with its mean divided out, for readers that know no ``normalize``."""
    if not section.normalize:
        return section
    from npu_qat.noise import LayerMultipliers

    table = LayerMultipliers(section, layers)
    return section.model_copy(
        update={
            "normalize": False,
            "default_multiplier": table.multiplier(None, 0, 1),
            "layer_multipliers": {layer: table.multiplier(layer, 0, 1) for layer in layers},
        }
    )


def _write_noise(guidance: Guidance, files: _Files, origin: str) -> list[Path]:
    """One YAML file a strategy; each is read back as ``npu-qat train`` reads it."""
    import yaml

    from npu_qat.config import load_config
    from npu_qat.config.dump import to_plain

    written = []
    for name, section in guidance.sections.items():
        layers = {key: value for key, value in to_plain(section).items() if value is not None}
        body = yaml.safe_dump({"noise": {"enabled": True, "layers": layers}}, sort_keys=False)
        path = files.noise(name)
        path.write_text(
            f"# Strategy {name}, from {origin}, by npu-qat scan.\n"
            f"# Use: npu-qat train {path.name} --preset NAME; sigma and stages are the preset's.\n"
            + body,
            encoding="utf-8",
        )
        if load_config(path).noise.layers != section:
            raise RuntimeError(f"{path} does not load back to what was written")
        written.append(path)
    return written


def _write_json(path: Path, data: dict[str, Any]) -> None:
    # NaN is no JSON: a standard error over one text has none.
    path.write_text(json.dumps(_without_nan(data), indent=1) + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _progress(console: Console) -> Any:
    """Every quarter of a stage as a line."""

    def show(stage: str, done: int, total: int) -> None:
        if total >= 10 and (done * 4) // total != ((done - 1) * 4) // total:
            console.print(f"{stage}: {done} of {total}", markup=False)

    return show


def _print(found: Scan, guidance: Guidance, sentences: list[str], console: Console) -> None:
    from rich.table import Table

    from npu_qat.reporting.scan_page import headline, worst_linears

    console.print(f"\n{headline(found)}", markup=False, style="bold")
    table = Table(box=None, pad_edge=False)
    table.add_column("worst linears", no_wrap=True)
    for column in ("input dB", "weight dB", "result dB", "loss alone", "loss left out"):
        table.add_column(column, justify="right")
    for row in worst_linears(found)[:_SHOWN]:
        s = row.linear
        parts = [
            f"{part.sqnr_db['p50']:.1f}" if part else "-" for part in (s.input, s.weight, s.output)
        ]
        losses = ["-", "-"]
        if row.loss is not None:
            losses = [str(row.loss.one_at_a_time), str(row.loss.leave_one_out)]
        table.add_row(s.path, *parts, *losses)
    console.print(table)
    for sentence in sentences:
        console.print(f"- {sentence}", markup=False)
    console.print(f"- Guidance by {guidance.score}: {guidance.statement}", markup=False)


# The published method -----------------------------------------------------------------------------


def _published(
    args: argparse.Namespace,
    loaded: Loaded,
    model: Any,
    texts: list[Text],
    source: str,
    files: _Files,
    console: Console,
) -> None:
    from npu_qat.reporting.published_page import write_published_map, write_published_page
    from npu_qat.sensitivity import Thresholds, published_scan

    named = {
        "sqnr_db": args.sqnr_threshold,
        "deadzone": args.deadzone_threshold,
        "saturation": args.saturation_threshold,
        "relative_error": args.relative_error_threshold,
    }
    config = loaded.config
    result = published_scan(
        model,
        texts,
        config.quant,
        model_path=config.model.path,
        quant_type=args.quant_type or config.quant.activation_profile,
        thresholds=Thresholds(**{key: v for key, v in named.items() if v is not None}),
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%S"),
        progress=_progress(console),
    )
    if rank() != 0:
        return
    rows = result["report"]["per_layer"]
    scores = {row["layer_id"]: row["relative_error"] for row in rows}
    guidance = _guidance("published relative_error", scores, args.normalize)
    result["guidance"] = _guidance_dict(guidance)
    result["source"] = source
    _write_json(files.result, result)
    written = _write_noise(guidance, files, f"the published scan of {config.model.path}")
    flagged = result["report"]["summary"]["problematic_layers"]
    title = f"{config.model.path}: the published scan flags {flagged} of {len(rows)} layers"
    write_published_map(result, files.picture, title)
    names = _what_is_what(files, written)
    write_published_page(result, files.page, source=source, guidance=guidance, files=names)
    _print_published(result, console)
    for path in (files.result, files.picture, files.page, *written):
        console.print(f"wrote {path}", markup=False)


def _print_published(result: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("layer", "SQNR dB", "dead zone", "saturation", "relative error", "flagged"):
        table.add_column(column, justify="right")
    for row in result["report"]["per_layer"]:
        table.add_row(
            str(row["layer_id"]),
            f"{row['sqnr_db']:.2f}",
            f"{row['deadzone_ratio']:.1%}",
            f"{row['saturation_ratio']:.2%}",
            f"{row['relative_error']:.1%}",
            "yes" if row["is_problematic"] else "no",
        )
    console.print(table)
    recommended = result["recommendations"]
    console.print(f"strategy: {recommended['strategy']} ({recommended['details']})", markup=False)
    console.print(result["statement"], markup=False)
