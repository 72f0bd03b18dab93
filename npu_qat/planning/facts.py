"""What a plan knows of a model: counts, all of them exact, from its shapes and its recipe.

``ModelFacts`` is made from the model on the meta device and from ``plan_linears``, the same
decision that a run carries out. Nothing in it is estimated; the formulas that use it are in
``memory.py`` and ``steps.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npu_qat.config import RunConfig

if TYPE_CHECKING:
    from npu_qat.layers.plan import PlannedLinear

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class ModelFacts:
    """Counts of one model under one recipe.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: of the architecture.
        tied: whether the embeddings are the output head, too.
        norms_of_heads: whether queries and keys are normalised (Qwen3).
        item: bytes of a number in ``model.dtype``.
        parameters: of the base; tied weights count once.
        quantized_parameters: of these in 4-bit weights.
        decoder_parameters: in the linears of the decoder layers: the matmuls of a token.
        lora_parameters: of the adapters.
        bytes_loaded: of the base as it comes, in ``model.dtype``.
        bytes_stored: of the base as it is kept, ``bytes_beside`` included.
        bytes_beside: of what a matmul of codes keeps beside the images (``plan.py``).
        saved_inputs: elements a token, over all layers, of inputs that adapters keep for their
            gradient; linears that read one tensor keep it once.
        adapted_linears: number of linears with an adapter.
        rank: of the adapters.
        largest_linear: weights of the largest quantised linear.
        packed: the 4-bit codes are what is kept.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    norms_of_heads: bool
    item: int
    parameters: int
    quantized_parameters: int
    decoder_parameters: int
    lora_parameters: int
    bytes_loaded: int
    bytes_stored: int
    saved_inputs: int
    adapted_linears: int
    rank: int
    largest_linear: int
    packed: bool
    bytes_beside: int = 0

    @property
    def query_width(self) -> int:
        """Elements of a token's queries in one layer, and of attention's result."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of a token's keys in one layer; as many of its values."""
        return self.kv_heads * self.head_dim

    @property
    def repeats_keys(self) -> bool:
        """Whether several query heads share a key head."""
        return self.heads != self.kv_heads


def model_facts(
    model: Any, architecture: Any, linears: Sequence[PlannedLinear], config: RunConfig
) -> ModelFacts:
    """The counts of ``model`` (on the meta device is enough) under ``config``.

    Raises:
        ValueError: ``lora.targets`` names no linear, or the architecture lacks a number that the
            formulas need.
    """
    from npu_qat.layers.plan import multiplies_in_fp32, sibling_groups

    item = ITEM_BYTES[config.model.dtype]
    parameters = sum(p.numel() for p in model.parameters())
    quantized = [p for p in linears if p.weight_profile is not None]
    replaced = sum(p.bytes_16bit * item // 2 for p in quantized)
    in_fp32 = multiplies_in_fp32(config.quant)
    stored = sum(_stored(p, item, in_fp32) for p in quantized)
    adapted = adapted_linears(linears, config)
    widths = {p.path: p.in_features for p in adapted}
    a = architecture
    heads = _number(a, "num_attention_heads")
    return ModelFacts(
        layers=_number(a, "num_hidden_layers"),
        hidden=_number(a, "hidden_size"),
        intermediate=_number(a, "intermediate_size"),
        heads=heads,
        kv_heads=getattr(a, "num_key_value_heads", None) or heads,
        head_dim=getattr(a, "head_dim", None) or _number(a, "hidden_size") // heads,
        vocabulary=_number(a, "vocab_size"),
        tied=bool(getattr(a, "tie_word_embeddings", False)),
        norms_of_heads=any(path.endswith("q_norm") for path, _ in model.named_modules()),
        item=item,
        parameters=parameters,
        quantized_parameters=sum(p.in_features * p.out_features for p in quantized),
        decoder_parameters=sum(
            p.in_features * p.out_features for p in linears if p.layer is not None
        ),
        lora_parameters=config.lora.r * sum(p.in_features + p.out_features for p in adapted),
        bytes_loaded=item * parameters,
        bytes_stored=item * parameters - replaced + stored,
        saved_inputs=sum(widths[group[0]] for group in sibling_groups(widths)),
        adapted_linears=len(adapted),
        rank=config.lora.r,
        largest_linear=max((p.in_features * p.out_features for p in quantized), default=0),
        packed=any(p.storage == "packed" for p in quantized),
    )


def _stored(linear: PlannedLinear, item: int, in_fp32: bool) -> int:
    """Bytes of a quantised linear; what it keeps in ``model.dtype`` was planned as 16 bits."""
    fixed = 2 * linear.bytes_16bit if in_fp32 else 0
    if linear.storage == "packed":
        fixed = linear.bytes_stored
    return fixed + (linear.bytes_stored - fixed) * item // 2


def adapted_linears(linears: Sequence[PlannedLinear], config: RunConfig) -> list[PlannedLinear]:
    """Those with an adapter: all of the decoder layers, or the named ones.

    Raises ``ValueError`` if there is none.
    """
    targets = config.lora.targets
    adapted = [p for p in linears if p.layer is not None]
    if targets != "all-linear":
        adapted = [p for p in adapted if p.path.rpartition(".")[2] in targets]
    if not adapted:
        raise ValueError(f"lora.targets: {list(targets)} names no linear of the decoder layers")
    return adapted


def _number(architecture: Any, key: str) -> int:
    value = getattr(architecture, key, None)
    if not isinstance(value, int):
        raise ValueError(
            f"the model's configuration ({type(architecture).__name__}) has no {key}: the plan's "
            "formulas are for decoders with attention and a gated MLP in each layer"
        )
    return value
