"""What a writer of one format is, and the few facts about serving engines that both share.

Serving engines build one matmul of q, k and v and one of gate and up, and with tensor parallelism
cut the weights of o_proj and down_proj along K, all others along N. What follows from that for a
checkpoint is checked by the writers before they write, and by ``validate`` afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from npu_qat.config import Recipe
from npu_qat.deploy.core import PackedCore, Value
from npu_qat.layers.plan import PlannedLinear

# Linears whose K is cut by tensor parallelism, in Llama-like decoders.
ROW_PARALLEL = ("o_proj", "down_proj")
RECORD = "npu_qat_export.json"


@dataclass(frozen=True)
class Activations:
    """What inputs of quantised linears were rounded to in training, and are in serving.

    Attributes:
        trained: profile, or "16 bits".
        served: profile, "16 bits", or a format that has no profile.
    """

    trained: str
    served: str

    @property
    def same(self) -> bool:
        return self.trained == self.served

    def as_dict(self) -> dict[str, Any]:
        return {"trained": self.trained, "served": self.served, "same": self.same}


class Writer(Protocol):
    """One checkpoint format."""

    format: str
    stem: str
    scheme: str
    tensor_parallel: int

    def check(self, core: PackedCore) -> None:
        """Raise ValueError if this format's readers cannot serve ``core``."""

    def tensors(self, core: PackedCore, name: str, value: Value) -> dict[str, torch.Tensor]:
        """The stored tensors of one entry; works on the meta device, too."""

    def activations(self, recipe: Recipe) -> Activations:
        """What this format's readers make of the inputs."""

    def sign(
        self, folder: Path, core: PackedCore, config: dict[str, Any], owner: Mapping[str, str]
    ) -> dict[str, Any]:
        """Write the files that tell the format; returns what ``config.json`` shall hold.

        ``owner`` maps each stored tensor to the entry of the core that it came from.
        """


def trained_activations(recipe: Recipe) -> str:
    """What training rounded the inputs of quantised linears to."""
    if recipe.quantizes_output:
        return f"{recipe.activation_profile} on outputs"
    return recipe.activation_profile if recipe.quantizes_input else "16 bits"


def length_per_shard(path: str, inputs: int, tensor_parallel: int) -> float:
    """K of linear ``path`` on each device; a fraction if it cannot be cut evenly."""
    parts = tensor_parallel if path.rpartition(".")[2] in ROW_PARALLEL else 1
    return inputs / parts


def check_shards(
    plan: Iterable[PlannedLinear], multiple: int, tensor_parallel: int, why: str
) -> None:
    """Raise ValueError for a linear whose K a shard is no multiple of ``multiple``."""
    for p in plan:
        length = length_per_shard(p.path, p.in_features, tensor_parallel)
        if p.quantized and length % multiple:
            cut = f" cut in {tensor_parallel}" if length != p.in_features else ""
            raise ValueError(
                f"{p.path} has {p.in_features} inputs{cut}: {length:g} are no multiple of "
                f"{multiple}, which {why}. "
                + ("Lower --tensor-parallel" if cut else f"Add {p.path!r} to quant.exclude")
            )
