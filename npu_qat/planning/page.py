"""The tables of ``docs/scaling.md`` and its figure, from result files and from the plan itself.

    python -m npu_qat.planning.page docs/scaling.md

Between a marker and ``<!-- end -->`` stands what the marker names: ``<!-- check FILE -->`` every
measured number of ``docs/results/scaling/FILE`` beside its prediction, ``<!-- errors FILE -->`` a
summary of them, ``<!-- plans -->`` predictions for large models, ``<!-- devices -->`` the hardware
table. Everything else on the page is written by people.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.planning.calibration import errors, fit, predictions
from npu_qat.planning.efficiency import Efficiency, shipped_calibration
from npu_qat.planning.hardware import HARDWARE, Hardware
from npu_qat.planning.memory import GIB

if TYPE_CHECKING:
    from npu_qat.planning.plan import ScalePlan

RESULTS = Path("results") / "scaling"
FIGURE = Path("images") / "scaling.png"
_MARKED = re.compile(
    r"(<!-- (check|errors|plans|devices)((?: [\w.-]+)*) -->\n).*?(<!-- end -->)", re.DOTALL
)
MODELS = ("qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b", "qwen2.5-72b")
WHERE = (("h100", 1), ("h100", 8), ("h200", 8), ("ascend-950dt", 8))
PROMPT, COMPLETION = 200, 600


def filled(text: str, results: Path) -> str:
    """``text`` with its marked parts made anew from the files in ``results``."""
    makers: dict[str, Callable[..., str]] = {
        "check": lambda file: _check_table(results / file),
        "errors": lambda file: _error_table(results / file),
        "plans": _plans_table,
        "devices": _devices_table,
    }

    def part(found: re.Match[str]) -> str:
        return f"{found[1]}{makers[found[2]](*found[3].split())}\n{found[4]}"

    return _MARKED.sub(part, text)


# ---------------------------------------------------------------- measured beside predicted


def device_of(measured: dict[str, Any]) -> Hardware:
    """The hardware of a result file; a CPU has the peaks that its probe measured."""
    environment = measured["environment"]
    name = environment.get("accelerator", "")
    for key in ("h100", "h200", "a100"):
        if key in name.lower():
            return HARDWARE[key if key != "a100" else "a100-80gb"]
    if environment["device"].startswith("cpu"):
        probe = next(row for row in measured["rows"] if row["kind"] == "probe")
        return Hardware(
            environment["processor"],
            "cpu",
            flops=probe["flops"],
            bandwidth=probe["bandwidth"],
            evidence="measured",
        )
    raise ValueError(f"no figures for {name or environment['device']!r} are known")


@functools.cache
def _checked(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], Efficiency]:
    measured = json.loads(path.read_text(encoding="utf-8"))
    hardware = device_of(measured)
    rows = measured["rows"]
    return measured, predictions(rows, hardware), fit(rows, hardware)


def _check_table(path: Path) -> str:
    measured, found, _ = _checked(path)
    lines = [_machine(measured["environment"]), ""]
    lines += ["| quantity | case | measured | predicted | measured / predicted |"]
    lines += ["|---|---|---|---|---|"]
    for one in sorted(found, key=lambda one: str(one["quantity"])):
        unit = _bytes if "memory" in one["quantity"] else _seconds
        ratio = one["measured"] / one["predicted"]
        lines.append(
            f"| {one['quantity']} | {_case(one['row'])} | {unit(one['measured'])} | "
            f"{unit(one['predicted'])} | {ratio:.2f} |"
        )
    failed = [row for row in measured["rows"] if row["kind"] == "error"]
    lines += [f"\nFailed: {row['model']}, {row['error']}" for row in failed]
    return "\n".join(lines)


def _error_table(path: Path) -> str:
    _, found, efficiency = _checked(path)
    lines = ["| quantity | cases | measured / predicted, 95 % for one more case | worst |"]
    lines += ["|---|---|---|---|"]
    for quantity, error in sorted(errors(found).items()):
        spread = f"{error.low:.2f} to {error.high:.2f}"
        lines.append(f"| {quantity} | {error.rows} | {spread} | {error.worst:.2f} |")
    fitted = ", ".join(
        f"`{name}` {'not measured' if value is None else format(value, '.3g')}"
        for name, value in efficiency.__dict__.items()
    )
    return "\n".join([*lines, "", f"Fitted to all rows: {fitted}."])


def _machine(environment: dict[str, Any]) -> str:
    versions = environment["versions"]
    device = environment.get("accelerator") or environment["processor"]
    return (
        f"`{environment['command']}`: {device}, {environment['cores']} cores, load "
        f"{environment['load_average'][0]}; Python {versions['python']}, torch "
        f"{versions['torch']}, transformers {versions.get('transformers', '?')}, DeepSpeed "
        f"{versions.get('deepspeed', '?')}."
    )


def _case(row: dict[str, Any]) -> str:
    """A row in a few words."""
    model = row["model"]
    if "hidden_size" in row["changes"]:
        model = f"width {row['changes']['hidden_size']}"
    words = [model, row["storage"]]
    if row["kind"] == "decode":
        return ", ".join([*words, f"{row['sequences']} rows of {row['prompt']}"])
    words.append(f"{row['sequences']} x {row['tokens']}")
    words += ["no mask"] if not row["ragged"] and row["sequences"] > 1 else []
    words += ["checkpointing"] if row["checkpointing"] else []
    words += [f"ZeRO-{row['zero']}"] if row["zero"] else []
    words += [f"{row['processes']} devices"] if row["processes"] > 1 else []
    return ", ".join(words)


def _bytes(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size > GIB / 2 else f"{size / 2**20:.1f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


# ---------------------------------------------------------------- predictions


@functools.cache
def _plan(model: str, soc: str, devices: int) -> ScalePlan:
    from npu_qat.config import load_config
    from npu_qat.planning.plan import Lengths, make_plan, resolve_model

    config = load_config(overrides=[f"model.path={resolve_model(model)}"])
    return make_plan(
        config,
        HARDWARE[soc],
        devices,
        shipped_calibration(),
        lengths=Lengths(PROMPT, COMPLETION),
    )


def _plans_table() -> str:
    lines = [
        "| model | devices | layout | needs a device | rollout rows | micro-batch | step "
        "| in rollouts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for soc, devices in WHERE:
            plan = _plan(model, soc, devices)
            best = plan.best
            where = f"{devices} x {plan.hardware.name}"
            if best is None:
                least = min(c.needed for c in plan.candidates)
                lines.append(f"| {model} | {where} | none fits | {_bytes(least)} | | | | |")
                continue
            share = ""
            step = "not calibrated" if plan.calibration is None else "no figure for bf16"
            if best.time is not None:
                low, high = plan.interval(best.time)
                step = f"{best.time.total:.0f} s ({low:.0f} to {high:.0f})"
                share = f"{best.time.generation_share:.0%}"
            lines.append(
                f"| {model} | {where} | {best.name} | {_bytes(best.needed)} | "
                f"{best.load.rollout_rows} | {best.load.sequences} | {step} | {share} |"
            )
    return "\n".join(lines)


def _devices_table() -> str:
    lines = [
        "| `--soc` | device | memory | bf16 | fp8 | fp4 | memory bandwidth | link, one way "
        "| evidence |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, h in HARDWARE.items():
        figures = [_figure(h.memory, 1e9, "GB")]
        figures += [_figure(f, 1e12, "Tflop/s") for f in (h.flops, h.flops_fp8, h.flops_fp4)]
        figures += [_figure(f, 1e9, "GB/s") for f in (h.bandwidth, h.link)]
        lines.append(f"| `{name}` | {h.name} | {' | '.join(figures)} | {h.evidence} |")
    return "\n".join(lines)


def _figure(value: float | None, scale: float, unit: str) -> str:
    return "-" if value is None else f"{value / scale:.0f} {unit}"


# ---------------------------------------------------------------- the figure


def draw(results: Path, path: Path) -> None:
    """Measured over predicted of every result file, memory on the left and seconds on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.2))
    for axis, title in zip(axes, ("memory, GiB", "time, s"), strict=True):
        memory = title.startswith("memory")
        scale = GIB if memory else 1.0
        ends: list[float] = []
        for file in sorted(results.glob("*.json")):
            _, found, _ = _checked(file)
            chosen = [one for one in found if ("memory" in one["quantity"]) == memory]
            x = [one["predicted"] / scale for one in chosen]
            y = [one["measured"] / scale for one in chosen]
            ends += x + y
            axis.scatter(x, y, s=18, label=file.stem)
        low, high = min(ends) / 1.3, max(ends) * 1.3
        axis.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
        axis.set(xscale="log", yscale="log", xlabel="predicted", ylabel="measured", title=title)
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(page: str) -> None:
    """Write the tables of ``page`` and its figure."""
    path = Path(page)
    results = path.parent / RESULTS
    path.write_text(filled(path.read_text(encoding="utf-8"), results), encoding="utf-8")
    draw(results, path.parent / FIGURE)


if __name__ == "__main__":
    main(*sys.argv[1:])
