"""How much memory a device needs, part by part, in the phases of a run.

The phases follow each other, so what counts is the largest of their sums:

``load``        the base in 16 bits is on the device before it is quantised; with packed storage its
                weights come from the host's memory in turns
``baseline``    the 16-bit arms of a run: evaluated, and perhaps trained
``compensate``  with ``lora.init: quantisation_error``: both models, and statistics
``shard``       the quantised base before ZeRO-3 has shared it out
``update``      base, adapters, gradients, Adam, activations, logits
``rollout``     base (whole at any stage), adapters, Adam, keys and values, what prefill works with

**Activations.** What a token leaves for the backward pass, counted from the code. The base is
frozen, so its matmuls keep nothing but what adapters read. In elements of ``model.dtype``, a token
and a layer::

    inputs of adapted linears    h (q, k, v share it) + q (o) + h (gate, up share it) + f (down)
    inputs of the two norms      2 h        (twice that in bytes where the norms are not fused)
    attention                    q + 2 k + o, o being what the o projection reads; with a padding
                                 mask keys and values are repeated to q each
    gate, up                     2 f        (3 f where SiLU * up is not fused)
    products of rank r           r a linear

h hidden, f intermediate, q and k the widths of queries and keys. With gradient checkpointing a
layer keeps its input, h, and one layer at a time has all of the above. A test counts the tensors
that autograd really saves against these formulas.

**Logits.** Those of completion tokens are kept in 16 bits, and so is their gradient; a piece of
``CHUNK_ELEMENTS`` at a time, at least a row, is worked on in fp32 (``training/batches.py``). All
rows in one piece keep their log-softmax in fp32 instead.

**ZeRO** with adapters: what can be shared out is the adapters' state, which is small, and at stage
3 the base. DeepSpeed takes a bucket of ``reduce_bucket_size`` (5e8) fp32 gradients at stages 1 to
3, which is 1.9 GiB and often more than the stage saves; stage 3 keeps up to
``stage3_max_live_parameters`` (1e9) parameters whole. Before an update the whole base was on the
device (``load``, ``shard``), and in a rollout it is again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from npu_qat.planning.facts import ModelFacts

GIB = 2**30
# DeepSpeed's defaults (deepspeed/runtime/zero/config.py, read in 0.19.8), in elements.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
PREFETCH_BUCKET = 50_000_000
FP32 = 4
# Of the pass that starts adapters from the quantisation error (``lora.init``). At most, or one
# linear's if that is larger.
COMPENSATION_STATISTICS = 2 * GIB
# fp32 tensors of a piece of logits at a time in the backward pass: the log-softmax, its gradient,
# and the gradient of what went into it.
PIECE_COPIES = 3
# Sampling works on fp32 logits, log-probabilities, probabilities and two fp64 sums of them.
SAMPLING_BYTES = 4 + 4 + 4 + 8 + 8


@dataclass(frozen=True)
class Load:
    """What passes through the model on one device.

    Attributes:
        sequences: of a micro-batch.
        tokens: of a sequence, prompt and completion.
        completion: of these, tokens that the loss looks at.
        rollout_rows: sequences decoded together; 0 without rollouts.
        prompt: tokens of a prompt.
        new_tokens: room for the completion.
        evaluation_rows: sequences that an evaluation decodes together.
        padded: sequences of a micro-batch differ in length, so that attention has a mask.
    """

    sequences: int
    tokens: int
    completion: int
    rollout_rows: int = 0
    prompt: int = 0
    new_tokens: int = 0
    evaluation_rows: int = 0
    padded: bool = True


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over devices.

    Attributes:
        devices: processes, one a device.
        zero: ZeRO stage.
        checkpointing: gradient checkpointing.
        bucket: ``reduce_bucket_size``, elements.
        fused: norms and SiLU * up are the backend's fused kernels (CUDA).
        teacher: a second model in 16 bits is there for distillation.
        baseline: what the run does with the 16-bit model (``evaluation.baselines``).
        compensation: adapters start from the quantisation error (``lora.init``), which needs the
            16-bit model beside the quantised one for a while.
    """

    devices: int = 1
    zero: int = 0
    checkpointing: bool = False
    bucket: int = REDUCE_BUCKET
    fused: bool = True
    teacher: bool = False
    baseline: Literal["none", "evaluated", "trained"] = "none"
    compensation: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one device: part -> bytes, for each phase."""

    phases: dict[str, dict[str, int]] = field(default_factory=dict)

    def total(self, phase: str) -> int:
        """Of all parts of ``phase``."""
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of tensors at the worst moment."""
        return self.total(self.peak_phase)


def predict_memory(facts: ModelFacts, layout: Layout, load: Load) -> Memory:
    """Bytes of tensors on one device in each phase."""
    phases = {"load": _loading(facts)}
    if layout.baseline != "none":
        phases["baseline"] = _baseline(facts, layout, load)
    if layout.compensation:
        phases["compensate"] = {
            "base": facts.bytes_stored,
            "LoRA, fp32 master": FP32 * facts.lora_parameters,
            "base in 16 bits": facts.bytes_loaded,
            "statistics of inputs": _compensation_work(facts),
        }
    if layout.zero == 3:
        phases["shard"] = {"base, whole": facts.bytes_stored, **adapter_states(facts, layout)}
    phases["update"] = {
        **_base(facts, layout),
        **adapter_states(facts, layout),
        **activations(facts, layout, load),
    }
    if load.rollout_rows:
        phases["rollout"] = {
            "base, whole": facts.bytes_stored,
            **adapter_states(facts, layout, gathered=True),
            "keys and values": kv_cache(facts, load),
            "prefill and sampling": _rollout_work(facts, load),
        }
    if layout.teacher:
        for name in phases:
            phases[name]["teacher in 16 bits"] = facts.bytes_loaded
    return Memory(phases)


# ---------------------------------------------------------------- what stays


def _loading(facts: ModelFacts) -> dict[str, int]:
    """The base, and one weight's codes, image and two fp32 copies while it is quantised. A packed
    base comes in turns: two 16-bit weights (gate and up) at a time."""
    work = facts.largest_linear * (1 + facts.item + 2 * FP32)
    if facts.packed:
        work += 2 * facts.item * facts.largest_linear
        return {"base": facts.bytes_stored, "quantising a weight": work}
    return {"base in 16 bits": facts.bytes_loaded, "quantising a weight": work}


def _compensation_work(facts: ModelFacts) -> int:
    """fp64 sums of a group of linears, and the three f x f matrices that are solved for one.

    The largest linear is ``down``: its sums are f x f and h x f (``layers/compensation.py``).
    """
    f, h = facts.intermediate, facts.hidden
    return max(COMPENSATION_STATISTICS, 8 * f * (f + h)) + 24 * f * f


def _baseline(facts: ModelFacts, layout: Layout, load: Load) -> dict[str, int]:
    """The worse of evaluating the 16-bit model and, where it is an arm, training it."""
    facts = replace(facts, bytes_stored=facts.bytes_loaded, packed=False)
    load = replace(load, rollout_rows=load.evaluation_rows)
    parts = {"base in 16 bits": facts.bytes_loaded}
    evaluation = parts | {
        "keys and values": kv_cache(facts, load),
        "prefill and sampling": _rollout_work(facts, load),
    }
    if layout.baseline == "evaluated":
        return evaluation
    states, work = adapter_states(facts, layout), activations(facts, layout, load)
    training = (parts if layout.zero < 3 else _base(facts, layout)) | states | work
    return max(evaluation | states, training, key=lambda found: sum(found.values()))


def _base(facts: ModelFacts, layout: Layout) -> dict[str, int]:
    """The base in an update: whole, or a share and what stage 3 has gathered."""
    if layout.zero < 3:
        return {"base": facts.bytes_stored}
    a_parameter = facts.bytes_stored / facts.parameters
    live = min(facts.parameters, MAX_LIVE_PARAMETERS + PREFETCH_BUCKET)
    return {
        "base, this device's share": facts.bytes_stored // layout.devices,
        "base, gathered": round(live * a_parameter),
    }


def adapter_states(facts: ModelFacts, layout: Layout, *, gathered: bool = False) -> dict[str, int]:
    """fp32 master weights, gradients and Adam's moments of the adapters.

    Stage 0 has all of them whole. Stages 1 and 2 keep the weights whole, a second fp32 copy of this
    device's share, and its moments and gradients; stage 3 shares out the weights, too.
    """
    whole = FP32 * facts.lora_parameters
    if layout.zero == 0:
        return {
            "LoRA, fp32 master": whole,
            "LoRA, fp32 gradients": whole,
            "LoRA, Adam moments": 2 * whole,
        }
    share = -(-whole // layout.devices)
    weights = whole if layout.zero < 3 else share + (whole if gathered else 0)
    return {
        "LoRA, fp32 master": weights + share,
        "LoRA, fp32 gradients": share,
        "LoRA, Adam moments": 2 * share,
        "gradient bucket": FP32 * layout.bucket,
    }


# ---------------------------------------------------------------- what an update adds


def activations(facts: ModelFacts, layout: Layout, load: Load) -> dict[str, int]:
    """Saved for the backward pass, and what the loss or one layer works with at the peak.

    The loss works while all layers have saved their tensors; a layer works while those of the
    layers before it are there. Both are not there at once.
    """
    tokens = load.sequences * load.tokens
    mask = _mask(facts, load)
    layer = tokens * _saved_by_layer(facts, layout, load) + mask + _casts(facts) // facts.layers
    rotary = 2 * tokens * facts.head_dim * facts.item
    last_norm = tokens * facts.hidden * (facts.item if layout.fused else FP32)
    once = rotary + last_norm + mask // facts.item
    working = _layer_work(facts, tokens)
    loss = loss_work(facts, load)
    if layout.checkpointing:
        saved = facts.layers * tokens * facts.hidden * facts.item + once
        return {
            "layer inputs": saved,
            "logits, or one layer": max(loss, layer + working),
        }
    # The first layer's norm reads the embeddings, which have no gradient.
    first = tokens * facts.hidden * (facts.item if layout.fused else FP32)
    return {
        "activations": facts.layers * layer - first + once,
        "logits, or one layer": max(loss, working),
    }


def saved_by_layers(facts: ModelFacts, layout: Layout, load: Load) -> int:
    """Bytes that all layers save for the backward pass of a micro-batch, without checkpointing."""
    tokens = load.sequences * load.tokens
    return facts.layers * tokens * _saved_by_layer(facts, layout, load)


def _saved_by_layer(facts: ModelFacts, layout: Layout, load: Load) -> int:
    """Bytes a token that one layer keeps for its backward pass."""
    norm_item = facts.item if layout.fused else FP32
    repeated = load.padded and load.sequences > 1 and facts.repeats_keys
    keys = facts.query_width if repeated else facts.kv_width
    inputs = facts.saved_inputs // facts.layers
    per_linear = facts.adapted_linears // facts.layers
    kept = inputs + facts.query_width + 2 * keys + per_linear * facts.rank
    kept += (2 if layout.fused else 3) * facts.intermediate
    norms = 2 * facts.hidden
    if facts.norms_of_heads:
        norms += facts.query_width + facts.kv_width
    sums = FP32 * facts.heads  # attention's log-sum-exp
    return facts.item * kept + norm_item * norms + sums


def _mask(facts: ModelFacts, load: Load) -> int:
    """Bytes of a layer's attention bias, which a padding mask becomes."""
    if not (load.padded and load.sequences > 1):
        return 0
    return load.sequences * load.tokens**2 * facts.item


def _casts(facts: ModelFacts) -> int:
    """The 16-bit images of the adapters that their matmuls keep."""
    return facts.item * facts.lora_parameters


def _layer_work(facts: ModelFacts, tokens: int) -> int:
    """The backward pass of an MLP: gradients of the product (twice, from base and adapter), of gate
    and up, and of the layer's result; and the decoded weight of a packed layer."""
    weight = facts.item * facts.largest_linear if facts.packed else 0
    return tokens * facts.item * (4 * facts.intermediate + 2 * facts.hidden) + weight


def loss_work(facts: ModelFacts, load: Load) -> int:
    """Bytes of the logits of completion tokens and of the piece of them in fp32."""
    from npu_qat.training.batches import CHUNK_ELEMENTS

    row = load.completion * facts.vocabulary
    if row == 0:
        return 0
    rows = max(1, CHUNK_ELEMENTS // row)
    if rows >= load.sequences:  # one piece: what is kept is its log-softmax
        return PIECE_COPIES * FP32 * load.sequences * row
    # In the last piece the gradients of all others are there beside the logits.
    whole, piece = load.sequences * row, rows * row
    return facts.item * (2 * whole - piece) + PIECE_COPIES * FP32 * piece


# ---------------------------------------------------------------- what a rollout adds


def kv_cache(facts: ModelFacts, load: Load) -> int:
    """Keys and values of all rows, for the longest completion; room in multiples of 8 tokens."""
    capacity = load.prompt + load.new_tokens
    capacity += -capacity % 8
    return 2 * facts.item * facts.layers * facts.kv_width * capacity * load.rollout_rows


def _rollout_work(facts: ModelFacts, load: Load) -> int:
    """The larger of: one layer of the prefill (gate, up, their product and its quantised form, the
    residual stream and the mask), and sampling from the logits."""
    tokens = load.rollout_rows * load.prompt
    prefill = tokens * facts.item * (4 * facts.intermediate + 3 * facts.hidden)
    prefill += load.rollout_rows * load.prompt**2 * (1 + facts.item)
    sampling = load.rollout_rows * facts.vocabulary * (facts.item + SAMPLING_BYTES)
    return max(prefill, sampling)
