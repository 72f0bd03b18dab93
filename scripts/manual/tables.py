"""The manual's tables of numbers, made by the package: the worked block, the profiles side by side,
and the rooms of the house.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from example import block, specials

from npu_qat.numerics import Profile, QuantizedTensor, dequantize, get_profile, quantize
from npu_qat.numerics.profiles import PROFILES, ROUNDINGS, SCALE_RULES
from npu_qat.numerics.scales import values_from_bytes

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 8  # numbers of the block that a row of a wide table has room for


def worked_block() -> str:
    """Markdown: the first eight numbers of the block, step by step."""
    x, q = block(), quantize(block(), "ascend950")
    scale = values_from_bytes(q.scales, q.profile).item()
    amax = x.abs().max().item()
    back = dequantize(q).tolist()
    lines = [
        f"`amax` is {amax:g}, between 2^1 and 2^2, so `e` is 1. The floor rule takes 2^(e - 2) = "
        f"{scale:g}, which E8M0 stores as the byte {q.scales.item()} (0x{q.scales.item():02x}). "
        f"Then, for each number:",
        "",
        "| number | bf16 bits | number / scale | rounded (ties away from zero) | code | "
        "stands for | error |",
        "|---:|---|---:|---:|---|---:|---:|",
    ]
    for i in range(SHOWN):
        value, code = x[i].item(), q.codes[i].item()
        bits = x.view(torch.int16)[i].item() & 0xFFFF
        lines.append(
            f"| {value:.4g} | `{bits:04x}` | {value / scale:.4g} | {back[i] / scale:g} | "
            f"{code} (`{code:04b}`) | {back[i]:g} | {back[i] - value:+.3f} |"
        )
    pairs = ", ".join(f"`{byte:02x}`" for byte in q.packed.tolist()[: SHOWN // 2])
    lines += [
        "",
        f"The codes go into bytes in pairs, the first of a pair in the low nibble: {pairs}, ...",
    ]
    return "\n".join(lines)


def profile_fields() -> str:
    """Markdown: what each profile fixes."""
    lines = [
        "| profile | block | scale | rule | rounding | Inf in the block | NaN in the block | for |",
        "|---|---:|---|---|---|---|---|---|",
    ]
    for p in PROFILES.values():
        scale = p.scale_format.upper().replace("_480", " up to 480")
        if p.tensor_scale:
            scale += ", fp32 for the tensor"
        if p.level0_block:
            scale += f", fp32 for {p.level0_block}"
        use = "weights" if p.weights_only else "weights, activations"
        if p.forced_axis is not None:
            use += ", along `in`" if p.forced_axis == -1 else ", along `out`"
        lines.append(
            f"| `{p.name}` | {p.block_size} | {scale} | `{p.scale_rule}` | `{p.rounding}` | "
            f"{_fate(p.inf)} | {_fate(p.nan)} | {use} |"
        )
    return "\n".join(lines)


def _fate(what: str) -> str:
    return {"nan": "block is NaN", "saturate": "becomes ±6", "error": "refused"}[what]


def rules() -> str:
    """Markdown: the scale rules and the roundings."""
    lines = ["| scale rule | scale of a block with largest magnitude amax, e = floor(log2 amax) |"]
    lines += ["|---|---|", *(f"| `{name}` | {text} |" for name, text in SCALE_RULES.items()), ""]
    lines += ["| rounding | of an element |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in ROUNDINGS.items()]
    return "\n".join(lines)


def side_by_side() -> str:
    """Markdown: the worked block in every profile."""
    x = block()
    head = " | ".join(f"{v:.3g}" for v in x[:SHOWN].tolist())
    lines = [
        f"| profile | scale byte | scale | {head} | dB |",
        "|---|---|---:|" + "---:|" * (SHOWN + 1),
    ]
    for profile in PROFILES.values():
        q, numbers = _along_the_block(profile, x)
        error = (x.double() - numbers.double()).square().sum()
        sqnr = 10 * torch.log10(x.double().square().sum() / error).item()
        byte = q.scales.flatten()[0].item()
        scale = _scale(q)
        cells = " | ".join(f"{v:.4g}" for v in numbers[:SHOWN].tolist())
        lines.append(f"| `{profile.name}` | `{byte:02x}` | {scale:.4g} | {cells} | {sqnr:.1f} |")
    return "\n".join(lines)


def special_blocks() -> str:
    """Markdown: scale byte and first decoded number of special blocks in every profile."""
    blocks = specials()
    lines = [
        "| profile | " + " | ".join(f"largest: {name}" for name in blocks) + " |",
        "|---|" + "---|" * len(blocks),
    ]
    for profile in PROFILES.values():
        cells = []
        for x in blocks.values():
            try:
                q, numbers = _along_the_block(profile, x)
            except ValueError:
                cells.append("refused")
                continue
            cells.append(f"`{q.scales.flatten()[0].item():02x}`: {_numbers(numbers[:2])}")
        lines.append(f"| `{profile.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _numbers(values: torch.Tensor) -> str:
    return ", ".join("NaN" if v != v else f"{v:.3g}" for v in values.tolist())


def _along_the_block(profile: Profile, x: torch.Tensor) -> tuple[QuantizedTensor, torch.Tensor]:
    """Codes of the block under `profile` (in a column if it only works on columns), and numbers."""
    column = profile.forced_axis == -2
    q = quantize(x[:, None] if column else x[None], profile)
    return q, dequantize(q).flatten()


def _scale(q: QuantizedTensor) -> float:
    """All scales of the first number together."""
    value = values_from_bytes(q.scales, q.profile).flatten()[0].item()
    if q.tensor_scale is not None:
        value *= q.tensor_scale.item()
    if q.level0_scales is not None:
        value *= q.level0_scales.flatten()[0].item()
    return value


def rooms() -> str:
    """Markdown: the rooms in the order of the house test, each with its docstring's first line."""
    source = (ROOT / "tests" / "test_house.py").read_text(encoding="utf-8")
    (order,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER"
    )
    lines = ["| room | what its first line says |", "|---|---|"]
    for room in order:
        module = (ROOT / "npu_qat" / room / "__init__.py").read_text(encoding="utf-8")
        first = (ast.get_docstring(ast.parse(module)) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| `{room}` | {re.sub('`+', '`', first)} |")
    return "\n".join(lines)


def answers(words: str) -> str:
    """Markdown: what the runs on the demo model say to the questions that hold ``words``."""
    file = ROOT / "docs" / "results" / "rl-demo" / "report.json"
    asked = json.loads(file.read_text(encoding="utf-8"))["answers"]
    found = [answer for answer in asked if words in answer["question"]]
    if not found:
        raise ValueError(f"{file}: there is no question with {words!r}")
    lines = ["| question | points | 95 % interval | seeds | answer |", "|---|---:|---|---:|---|"]
    for answer in found:
        numbers = " | | "
        if answer["estimate"] is not None:
            points, low, high = (100 * answer[key] for key in ("estimate", "low", "high"))
            numbers = f"{points:+.1f} | {low:+.1f} to {high:+.1f} | {len(answer['seeds'])}"
        lines.append(f"| {answer['question']} | {numbers} | {answer['words']} |")
    return "\n".join(lines)


def demo_numbers() -> str:
    """Markdown: the five models of the committed demo run."""
    file = ROOT / "docs" / "results" / "demo-cpu" / "summary.json"
    arms = json.loads(file.read_text(encoding="utf-8"))["arms"]
    names = {
        "bf16_start": "as it came",
        "w4a4_ptq": "rounded, not trained",
        "bf16_lora": "trained and served in 16 bits",
        "bf16_lora_served_w4a4": "trained in 16, served in 4 bits",
        "w4a4_trained": "trained and served in 4 bits",
    }
    lines = ["| arm | | accuracy | 95 % interval |", "|---|---|---:|---|"]
    for name, meaning in names.items():
        mean, low, high = (100 * arms[name]["strict"][key] for key in ("mean", "low", "high"))
        lines.append(f"| `{name}` | {meaning} | {mean:.1f} % | {low:.1f} to {high:.1f} |")
    return "\n".join(lines)


def profile_docs() -> str:
    """Markdown: each profile's own description."""
    return "\n".join(f"`{name}`\n:   {get_profile(name).doc}\n" for name in PROFILES).rstrip()


TABLES: dict[str, Callable[[], str]] = {
    "worked-block": worked_block,
    "profile-fields": profile_fields,
    "rules": rules,
    "side-by-side": side_by_side,
    "special-blocks": special_blocks,
    "profile-docs": profile_docs,
    "rooms": rooms,
    "answers-estimator": lambda: answers("straight-through estimator"),
    "answers-noise": lambda: answers("Does global noise help"),
    "demo-numbers": demo_numbers,
}
