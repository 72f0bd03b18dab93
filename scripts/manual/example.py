"""The one block of 32 numbers that the manual works through: figures and tables show the same."""

from __future__ import annotations

import torch

# Activations as a linear reads them behind a norm: most below 1, one outlier. Written in bf16, so
# that the page can show their bits. 0.625 under a scale of 1/2 is a tie (1.25 lies between 1 and
# 1.5), and 3.75 is clipped by the floor rule: it is 7.5 scales, and the grid ends at 6.
VALUES = (
    *(0.31, -0.84, 0.625, 0.05, -1.23, 3.75, -0.44, 0.92),
    *(-0.09, 0.71, -0.36, 1.56, 0.18, -0.66, 0.02, -1.87),
    *(0.55, -0.27, 1.02, -0.48, 0.12, 0.875, -2.31, 0.39),
    *(-0.15, 0.60, -1.05, 0.23, -0.70, 1.41, 0.0, -0.33),
)


def block() -> torch.Tensor:
    """The block, bf16 [32]."""
    return torch.tensor(VALUES, dtype=torch.bfloat16)


def specials() -> dict[str, torch.Tensor]:
    """Blocks that tell profiles apart where ordinary numbers do not, bf16 [32] each."""
    tail = [1.0] * 30
    heads = {
        "1.75 · 2^127": [1.75 * 2.0**127, 2.0**126],
        "3 · 2^-126": [3 * 2.0**-126, 2.0**-126],
        "Inf": [float("inf"), 2.0],
        "NaN": [float("nan"), 2.0],
    }
    blocks = {name: torch.tensor([*head, *tail]) for name, head in heads.items()}
    blocks["3 · 2^-126"][2:] = 0.0
    return {name: values.to(torch.bfloat16) for name, values in blocks.items()}
