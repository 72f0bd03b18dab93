"""Figures of the method, as flows and curves.

Curves are computed: the staircase by ``npu_qat.numerics``, the noise by ``npu_qat.noise.schedule``,
the clipped loss by ``npu_qat.training.dapo``.
"""

from __future__ import annotations

import torch
from svg import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT_BLUE,
    LIGHT_GREEN,
    LIGHT_ORANGE,
    ORANGE,
    PALE,
    RED,
    Figure,
)

from npu_qat.numerics import fake_quant


def overview() -> Figure:
    """From a 16-bit model to a server, and what is measured on the way."""
    fig = Figure(860, 240, "The road from a 16-bit model to a server on an NPU")
    stages = [
        ("16-bit model", "Hugging Face folder", "#ffffff", INK),
        ("quantised base", "frozen 4-bit weights", LIGHT_ORANGE, ORANGE),
        ("training", "LoRA, DAPO or SFT", LIGHT_GREEN, GREEN),
        ("export", "the bytes of training", LIGHT_BLUE, BLUE),
        ("serving", "vllm-ascend, W4A4", "#ffffff", INK),
    ]
    for i, (name, says, fill, stroke) in enumerate(stages):
        x = 14 + i * 170
        fig.box(x, 70, 146, 60, [name, says], fill=fill, stroke=stroke, size=12, bold_first=True)
        if i:
            fig.line(x - 24, 100, x - 3, 100, width=2, arrow=True)
    for x, command in (
        (257, "npu-qat scan"),
        (427, "npu-qat train"),
        (597, "npu-qat export"),
        (767, "npu-qat serve-check"),
    ):
        fig.text(x, 54, command, mono=True, size=12, color=BLUE)
    for x, check in (
        (257, ["error of each", "linear"]),
        (427, ["audit: what was", "really quantised"]),
        (597, ["validate: what a", "loader would accept"]),
        (767, ["parity: codes,", "layers, model"]),
    ):
        fig.text(x, 156, check, size=11, color=GREEN)
    fig.text(
        430,
        214,
        "one definition of every number: npu_qat/numerics",
        size=13,
        color=ORANGE,
        bold=True,
    )
    fig.line(180, 196, 680, 196, color=ORANGE, width=2)
    return fig


def straight_through() -> Figure:
    """Rounding, its derivative, and the derivative that is used instead."""
    fig = Figure(
        860, 330, "Rounding as a staircase, its derivative, and the straight-through estimator"
    )
    for panel, (title, subtitle) in enumerate(
        [
            ("Forward: Q(x), a staircase", "what training and serving compute"),
            ("Backward: dQ/dx", "what the gradient is multiplied by"),
        ]
    ):
        x0 = 30 + panel * 430
        fig.heading(x0, 26, title)
        fig.note(x0, 44, subtitle)
        fig.line(x0, 190, x0 + 380, 190, color=GREY)
        fig.line(x0 + 190, 60, x0 + 190, 310, color=GREY)
    v = torch.linspace(-7.5, 7.5, 601)
    rows = torch.zeros(len(v), 32)
    rows[:, 0], rows[:, 1] = v, 4.0  # 4 holds the scale of every row at 1 up to 8
    y = fake_quant(rows, "ascend950")[:, 0]
    unit = 24.0
    fig.path([(220 + a * unit, 190 - a * 15) for a in (-7.5, 7.5)], color=GREY, dash="4 3", width=1)
    fig.path(
        [(220 + a * unit, 190 - b * 15) for a, b in zip(v.tolist(), y.tolist(), strict=True)],
        color=BLUE,
        width=2.5,
    )
    fig.text(412, 76, "x", color=GREY)
    fig.text(372, 122, "clipped at 6", size=11, color=BLUE)
    middle = 650
    fig.line(middle - 180, 110, middle + 180, 110, color=GREEN, width=3)
    fig.text(middle + 20, 100, "straight-through: 1 everywhere", color=GREEN, anchor="start")
    fig.line(middle - 180, 190, middle + 180, 190, color=RED, width=3)
    fig.text(middle + 12, 212, "true: 0 almost everywhere,", color=RED, anchor="start")
    fig.text(middle + 12, 228, "so nothing behind it learns", color=RED, anchor="start")
    fig.text(middle - 8, 114, "1", anchor="end", size=11)
    fig.text(middle - 8, 204, "0", anchor="end", size=11)
    return fig


def quant_linear() -> Figure:
    """What a quantised linear with an adapter computes, forward and backward."""
    fig = Figure(860, 330, "Data flow of a quantised linear with a LoRA adapter")
    fig.box(20, 130, 80, 44, ["x", "16 bits"], fill="#ffffff", stroke=INK)
    fig.box(170, 60, 110, 44, ["Q(x)", "4-bit values"], fill=LIGHT_ORANGE, stroke=ORANGE)
    fig.box(350, 60, 130, 44, ["Q(x) Q(W)ᵀ + b", "frozen"], fill=LIGHT_ORANGE, stroke=ORANGE)
    fig.box(350, 8, 130, 34, "Q(W), quantised once", fill=LIGHT_ORANGE, stroke=ORANGE, size=11)
    fig.line(415, 42, 415, 58, arrow=True)
    fig.box(170, 200, 110, 44, ["A", "r × in, fp32"], fill=LIGHT_GREEN, stroke=GREEN)
    fig.box(350, 200, 130, 44, ["B", "out × r, fp32"], fill=LIGHT_GREEN, stroke=GREEN)
    fig.box(540, 200, 90, 44, "× alpha / r", fill=LIGHT_GREEN, stroke=GREEN)
    fig.circle(700, 152, 16, fill="#ffffff", stroke=INK)
    fig.text(700, 158, "+", size=18)
    fig.box(760, 130, 80, 44, ["y", "16 bits"], fill="#ffffff", stroke=INK)
    fig.path([(100, 145), (135, 145), (135, 82), (168, 82)], arrow=True)
    fig.path([(100, 160), (135, 160), (135, 222), (168, 222)], arrow=True)
    fig.line(280, 82, 348, 82, arrow=True)
    fig.line(280, 222, 348, 222, arrow=True)
    fig.line(480, 222, 538, 222, arrow=True)
    fig.path([(480, 82), (700, 82), (700, 134)], arrow=True)
    fig.path([(630, 222), (700, 222), (700, 170)], arrow=True)
    fig.line(716, 152, 758, 152, arrow=True)
    fig.text(590, 74, "base: what the NPU multiplies", size=11, color=ORANGE)
    fig.text(
        220,
        264,
        "adapter: reads the 16-bit x, as the serving engine's does",
        size=11,
        color=GREEN,
        anchor="start",
    )
    fig.path([(758, 290), (60, 290), (60, 178)], color=RED, dash="6 4", arrow=True)
    fig.text(
        410,
        310,
        "backward: dx = dy Q(W) + (alpha / r) · dy B A     the quantiser of x counts as the "
        "identity; W gets no gradient, A and B do",
        size=11,
        color=RED,
    )
    return fig


def aqn_schedule() -> Figure:
    """Sigma of each step of a run, with and without the clean first stage, and what bf16 keeps."""
    from npu_qat.config import NoiseConfig
    from npu_qat.noise.schedule import Schedule

    steps = 29
    fig = Figure(860, 350, "Standard deviation of the noise over the 29 steps of a run")
    fig.heading(20, 26, "Noise over a run of 29 steps, 10 stages, 0.05 to 0.0005")
    left, width, top, height = 80.0, 620.0, 50.0, 220.0

    def y(sigma: float) -> float:
        decades = torch.log10(torch.tensor(sigma)).item()
        return top + (-1.0 - decades) / 2.6 * height

    for tick in (0.1, 0.01, 0.001):
        fig.line(left, y(tick), left + width, y(tick), color=PALE)
        fig.text(left - 8, y(tick) + 4, f"{tick:g}", anchor="end", size=11, color=GREY)
    fig.text(20, top + height / 2, "sigma", anchor="start", size=12)
    for step in range(0, steps + 1, 4):
        fig.text(left + step * width / steps, top + height + 18, str(step), size=11, color=GREY)
    fig.text(left + width / 2, top + height + 38, "step", size=12)
    for zero_first, color, dash in ((True, BLUE, ""), (False, ORANGE, "6 4")):
        config = NoiseConfig(
            enabled=True,
            sigma_start=0.05,
            sigma_end=0.0005,
            num_stages=10,
            zero_first_stage=zero_first,
        )
        points = []
        for stage in Schedule(config, steps).stages():
            if stage.sigma:
                points += [
                    (left + stage.first_step * width / steps, y(stage.sigma)),
                    (left + (stage.last_step + 1) * width / steps, y(stage.sigma)),
                ]
            else:
                right = left + (stage.last_step + 1) * width / steps
                fig.rect(left, top, right - left, height, fill=LIGHT_GREEN)
                fig.text((left + right) / 2, top + height - 8, "clean", size=11, color=GREEN)
        fig.path(points, color=color, width=2.5, dash=dash)
    x = left + width + 16
    fig.line(x, 70, x + 26, 70, color=BLUE, width=2.5)
    fig.text(x + 32, 70, ["zero_first_stage:", "true"], anchor="start", size=11)
    fig.line(x, 110, x + 26, 110, color=ORANGE, width=2.5, dash="6 4")
    fig.text(x + 32, 110, ["zero_first_stage:", "false"], anchor="start", size=11)
    fig.note(
        left,
        330,
        [
            f"A norm weight of 1 held in bf16 is moved by {_kept_by_bf16(0.001):.1%} of the draws "
            f"with sigma 0.001",
            f"and {_kept_by_bf16(0.0005):.2%} of those with 0.0005: late stages need "
            "noise.norm_dtype: fp32.",
        ],
    )
    return fig


def _kept_by_bf16(sigma: float) -> float:
    """Share of N(0, sigma) draws that move a bf16 number from 1, by the normal quantiles."""
    quantiles = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    return ((1.0 + sigma * quantiles).to(torch.bfloat16) != 1.0).double().mean().item()


def dapo_step() -> Figure:
    """A step of DAPO: a rollout and its updates."""
    fig = Figure(860, 300, "One DAPO step: noise, sampling, rewards, filtering, updates")
    fig.rect(10, 36, 470, 250, fill="#fafafa", stroke=PALE, radius=8)
    fig.rect(500, 36, 350, 250, fill="#fafafa", stroke=PALE, radius=8)
    fig.text(245, 26, "Rollout: W4A4, noise on the norms", size=14, bold=True)
    fig.text(675, 26, "Updates: W4A4, noise taken away", size=14, bold=True)
    fig.box(30, 60, 120, 50, ["prompts", "generation_prompts"], size=11, fill="#ffffff", stroke=INK)
    fig.box(190, 60, 130, 50, ["G completions each", "num_generations"], size=11)
    fig.box(360, 60, 105, 50, ["rewards", "right or wrong"], size=11)
    fig.line(150, 85, 188, 85, arrow=True)
    fig.line(320, 85, 358, 85, arrow=True)
    fig.box(
        190,
        160,
        275,
        50,
        ["groups that are all right or all wrong are dropped:", "they have no gradient"],
        size=11,
        fill=LIGHT_ORANGE,
        stroke=ORANGE,
    )
    fig.line(412, 110, 412, 158, arrow=True)
    fig.path([(190, 185), (90, 185), (90, 112)], color=ORANGE, arrow=True)
    fig.text(
        100,
        206,
        ["too few left: sample more,", "max_generation_tries times"],
        size=10,
        color=ORANGE,
    )
    fig.text(245, 262, "log pi_rollout of each token is kept", size=11, color=GREY)
    fig.box(520, 60, 150, 50, ["advantage", "(r - mean) / (std + 1e-4)"], size=11)
    fig.path([(465, 185), (490, 185), (490, 85), (518, 85)], arrow=True)
    fig.box(690, 60, 145, 50, ["log pi_old, once,", "by the training pass"], size=11)
    fig.line(670, 85, 688, 85, arrow=True)
    fig.box(
        560,
        160,
        235,
        50,
        ["updates_per_rollout times: clipped loss,", "mean over all tokens of all processes"],
        size=11,
        fill=LIGHT_GREEN,
        stroke=GREEN,
    )
    fig.line(762, 110, 762, 158, arrow=True)
    fig.text(
        675,
        240,
        [
            "|log pi_old - log pi_rollout|, measured with noise off:",
            "above logp_gap_limit the run stops",
        ],
        size=11,
        color=RED,
    )
    return fig


def dapo_clip() -> Figure:
    """The loss of one token against the ratio, for both signs of the advantage."""
    from npu_qat.config import DapoConfig
    from npu_qat.training.dapo import dapo_token_loss

    config = DapoConfig()
    fig = Figure(860, 300, "The clipped loss of DAPO against the ratio of new to old probability")
    ratios = torch.linspace(0.4, 1.8, 281)
    for panel, advantage in enumerate((1.0, -1.0)):
        x0 = 60 + panel * 430
        loss = dapo_token_loss(
            ratios.log()[None],
            torch.zeros(1, len(ratios)),
            torch.tensor([[advantage]]),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )[0]
        name = (
            "better than its group (A = +1)" if advantage > 0 else "worse than its group (A = -1)"
        )
        fig.text(x0, 26, f"A completion {name}", anchor="start", size=13, bold=True)

        def at(
            ratio: float, value: float, x0: float = x0, advantage: float = advantage
        ) -> tuple[float, float]:
            base = 70 if advantage > 0 else 230
            return x0 + (ratio - 0.4) * 240, base - value * 90 if advantage < 0 else 60 - value * 90

        low, high = 1 - config.clip_low, 1 + config.clip_high
        for bound in (low, 1.0, high):
            x, _ = at(bound, 0)
            fig.line(x, 44, x, 250, color=PALE, dash="" if bound == 1.0 else "4 3")
            fig.text(x, 268, f"{bound:g}", size=11, color=GREY)
        fig.path(
            [at(r, v) for r, v in zip(ratios.tolist(), loss.tolist(), strict=True)],
            color=BLUE,
            width=2.5,
        )
        fig.text(x0 + 170, 288, "pi / pi_old", size=12)
        flat = "flat above 1 + clip_high" if advantage > 0 else "flat below 1 - clip_low"
        fig.text(
            x0 + (250 if advantage > 0 else 10),
            205 if advantage > 0 else 110,
            flat,
            size=11,
            color=RED,
            anchor="start",
        )
        fig.text(x0 - 40, 150, "loss", size=12, anchor="start")
    return fig


def parity_levels() -> Figure:
    """The four levels of parity, from codes to tokens."""
    fig = Figure(860, 320, "The four levels of parity between training and serving")
    fig.text(135, 24, "training", size=14, bold=True)
    fig.text(725, 24, "serving", size=14, bold=True)
    rows = [
        (
            "L0",
            "codes",
            ["4-bit codes and scale bytes", "of weights and inputs"],
            "none differs",
            ["bytes of the export,", "inputs by the engine's rule"],
        ),
        (
            "L1",
            "layers",
            ["each linear's output", "for recorded inputs"],
            "same bits (device: 1 ulp)",
            ["the same inputs through", "the serving path"],
        ),
        (
            "L2",
            "model",
            ["log-probabilities,", "greedy tokens"],
            "within measured noise",
            ["the same text,", "the same prompts"],
        ),
        (
            "L3",
            "checkpoint",
            ["fingerprint of the base,", "adapter, prompt tokens"],
            "all readers agree",
            ["the folder,", "read by code of its own"],
        ),
    ]
    for row, (level, name, left, passes, right) in enumerate(rows):
        y = 40 + row * 68
        fig.box(20, y, 230, 54, left, size=12)
        fig.box(610, y, 230, 54, right, size=12, fill=LIGHT_ORANGE, stroke=ORANGE)
        fig.line(252, y + 27, 350, y + 27, color=GREY, arrow=True)
        fig.line(608, y + 27, 510, y + 27, color=GREY, arrow=True)
        fig.text(430, y + 24, f"{level}  {name}", size=14, bold=True)
        fig.text(430, y + 42, passes, size=11, color=GREEN)
    fig.text(
        430,
        312,
        "A difference of codes has a cause that is named (scale, tie, clip, sign of zero, flush); "
        "a tolerance would hide it.",
        size=12,
        color=GREY,
    )
    return fig


HOUSE = (
    ("the numbers", ("numerics", "backends"), "what, and who computes", LIGHT_ORANGE, ORANGE),
    ("the model", ("layers", "noise", "sensitivity"), "how it carries them", LIGHT_BLUE, BLUE),
    (
        "learning",
        ("tasks", "training", "evaluation", "reporting"),
        "what, how, how well",
        LIGHT_GREEN,
        GREEN,
    ),
    ("leaving", ("deploy", "integrations", "parity"), "to engines and trainers", LIGHT_BLUE, BLUE),
    ("runs", ("experiments", "bench", "planning", "cluster"), "one, many, where", "#fafafa", GREY),
    ("the door", ("cli",), "one file a command", "#ffffff", INK),
)


def house() -> Figure:
    """The rooms in groups, in the order of the house; imports go up, and to the left in a row."""
    fig = Figure(
        860, 396, "The rooms of the package in groups, from the numbers to the command line"
    )
    for row, (group, rooms, says, fill, stroke) in enumerate(HOUSE):
        y = 14 + row * 60
        fig.text(20, y + 20, group, anchor="start", size=13, bold=True)
        fig.text(20, y + 36, says, anchor="start", size=10, color=GREY)
        for i, room in enumerate(rooms):
            fig.box(170 + i * 132, y, 120, 42, room, fill=fill, stroke=stroke, size=13)
        if row:
            fig.line(230, y, 230, y - 16, color=GREY, arrow=True)
    fig.box(720, 14, 120, 342, ["config", "", "assets"], fill="#f3e5f5", stroke="#6a1b9a", size=13)
    fig.note(
        20,
        384,
        "Imports go upwards, and to the left in a row; config and assets are for all rooms.",
    )
    return fig
