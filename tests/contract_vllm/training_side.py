"""The training side of a comparison: prepared modules, and what goes through each linear."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from npu_qat.config import Recipe
from npu_qat.layers import QuantizedModel, prepare_model

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SHARED = {part: (fused, i) for fused, parts in FUSED.items() for i, part in enumerate(parts)}


@dataclass(frozen=True)
class Call:
    """What a linear was given and what it gave, [T, K] and [T, N]."""

    x: torch.Tensor
    y: torch.Tensor


def trained(source: Path | str, recipe: Recipe | None = None) -> QuantizedModel:
    """The checkpoint in ``source`` as training prepares it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    return prepare_model(model.eval(), recipe or Recipe())


@torch.no_grad()
def logits(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    """fp32 [T, V] of one sequence."""
    return model(torch.tensor([tokens])).logits[0].float()


def recorded(model: nn.Module, paths: list[str], tokens: list[int]) -> dict[str, Call]:
    """Input and output of the linears at ``paths`` in a forward pass of one sequence."""
    calls: dict[str, Call] = {}

    def keep(path: str) -> object:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            calls[path] = Call(args[0][0].detach().clone(), y[0].detach().clone())

        return model.get_submodule(path).register_forward_hook(hook)

    handles = [keep(path) for path in paths]
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    return calls


def engine_module(path: str) -> tuple[str, int]:
    """Path of the engine's (fused) linear that computes ``path``, and which part of it."""
    parent, _, name = path.rpartition(".")
    fused, part = SHARED.get(name, (name, 0))
    return f"{parent}.{fused}", part


def part_sizes(model: nn.Module, path: str) -> list[int]:
    """Output features of all parts of the engine's linear that computes ``path``."""
    parent, _, name = path.rpartition(".")
    fused = SHARED.get(name, (name, 0))[0]
    return [
        model.get_submodule(f"{parent}.{part}").out_features for part in FUSED.get(fused, (name,))
    ]


def difficult(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    """bf16 [rows, K] that hits the corners of the quantiser: outliers, ties, zeros, tiny blocks.

    Not so tiny that products become subnormal: a CPU's bf16 matmul counts those as zero, its fp32
    matmul does not.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    x[:, 3] *= 64  # an outlier channel, so that the rest of its block falls near zero
    x[1] = 0.0
    x[2] = torch.arange(k) % 25 / 4 - 3.0  # on the grid and half between
    x[3] = -0.0
    x[4] *= 2.0**-90
    return x.bfloat16()
