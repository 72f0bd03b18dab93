"""How long a step takes: work that is counted, times efficiencies that were measured.

**Counted.** A micro-batch of T tokens, of which T_c are completions; P weights in the linears of
the decoder layers, L in the adapters, h hidden, V vocabulary, S tokens a sequence, q the width of
the queries::

    forward      2 T (P + L) + 2 T_c h V + 4 T S q layers     (half of the last without a mask)
    backward     2 T P + 4 T L + 2 T_c h V + 10 T S q layers  no gradient of frozen weights
    recompute    2 T (P + L) + 4 T S q layers                 with gradient checkpointing

    bytes of activations    what is saved for the backward pass (``memory.py``), a third of it for
                            each of forward, backward twice, and recompute
    bytes of logits         fp32, T_c V, moved ``LOGIT_MOVES`` times forward and twice that backward
    bytes of weights        a packed base is decoded in each pass: read 0.53, write 2, read 2 bytes

    decoding a token        every stored weight once, all room of the keys and values, 2 (P + h V)
                            flop a row, fp32 logits of all rows; a packed base above 64 rows is
                            decoded first

**Measured.** ``Efficiency`` has one number for each kind of work: the share of the peak that
matmuls reach, how often a byte of activations is moved at the memory's full bandwidth, and what
Python and launches cost a layer. A pass takes the longer of device and host::

    seconds = max(flop / (matmul peak) + (activation bytes a + logit bytes l + weights) / bandwidth,
                  layers (forward passes host_f + backward passes host_b))

**Communication.** Stages 0 to 2 add up the gradients of the adapters once an update,
``2 (n - 1) / n`` times their bytes over the link; stage 3 gathers the base in each pass,
``(n - 1) / n`` times its bytes, and runs hooks around each module, on one device too.

**A step** of DAPO: rollouts (prefill, then as many decoding steps as the longest completion, for
each batch of rows), the log-probabilities of the policy before the first update if there are
several updates, and the updates. Sequences are shared over the devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from npu_qat.config import RunConfig
from npu_qat.planning.efficiency import Efficiency
from npu_qat.planning.facts import ModelFacts
from npu_qat.planning.hardware import Hardware
from npu_qat.planning.memory import FP32, Layout, Load, kv_cache, saved_by_layers

# Rows up to which a kernel multiplies packed weights as they are (``backends/cuda/matmul.py``).
PACKED_ROWS = 64
DECODED_BYTES = 4  # a decoded 16-bit weight is written and read


@dataclass(frozen=True)
class Work:
    """What one pass over a micro-batch, or one decoding step, has to do.

    Attributes:
        flops: of matmuls.
        activations, logits, weights: bytes, see the module.
        layer_forwards, layer_backwards: layers times passes, for the host.
        gathered: bytes of the base that stage 3 gathers.
    """

    flops: float
    activations: float
    logits: float
    weights: float
    layer_forwards: int
    layer_backwards: int = 0
    gathered: float = 0.0

    @property
    def layer_passes(self) -> int:
        """Of both kinds."""
        return self.layer_forwards + self.layer_backwards


@dataclass(frozen=True)
class StepTime:
    """Seconds of the parts of one training step on one device.

    ``micro_batches`` and ``decoding_steps`` are how many of them there are.
    """

    prefill: float
    decode: float
    old_policy: float
    forward_backward: float
    optimizer: float
    communication: float
    micro_batches: int
    decoding_steps: int

    @property
    def rollout(self) -> float:
        return self.prefill + self.decode

    @property
    def total(self) -> float:
        update = self.old_policy + self.forward_backward + self.optimizer
        return self.rollout + update + self.communication

    @property
    def generation_share(self) -> float:
        """Of the step that is spent in rollouts."""
        return self.rollout / self.total


# ---------------------------------------------------------------- work


def micro_batch_work(
    facts: ModelFacts, layout: Layout, load: Load, *, backward: bool = True
) -> Work:
    """Forward and backward of one micro-batch, or its forward pass alone."""
    tokens = load.sequences * load.tokens
    scored = load.sequences * load.completion
    layers = facts.decoder_parameters + facts.lora_parameters
    masked = load.padded and load.sequences > 1
    pairs = tokens * load.tokens * facts.query_width * facts.layers * (1.0 if masked else 0.5)
    head = 2 * scored * facts.hidden * facts.vocabulary
    forward = 2.0 * tokens * layers + 4 * pairs
    again = backward and layout.checkpointing
    flops = forward * (1 + again) + head
    if backward:
        base, lora = facts.decoder_parameters, facts.lora_parameters
        flops += tokens * (2.0 * base + 4.0 * lora) + head + 10 * pairs
    passes = 1 + 2 * backward + again
    decoded = 1 + backward + again
    read = facts.bytes_stored if layout.zero == 3 and layout.devices > 1 else 0
    return Work(
        flops=flops,
        activations=saved_by_layers(facts, layout, load) * passes / 3,
        logits=float(FP32 * scored * facts.vocabulary * (3 if backward else 1)),
        weights=_decoding(facts) * decoded,
        layer_forwards=facts.layers * (1 + again),
        layer_backwards=facts.layers * backward,
        gathered=read * decoded * (layout.devices - 1) / layout.devices,
    )


def prefill_work(facts: ModelFacts, layout: Layout, load: Load) -> Work:
    """The prompts of all rows of a rollout batch at once."""
    prompts = Load(load.rollout_rows, load.prompt, 0, padded=True)
    whole = replace(layout, zero=0)
    return micro_batch_work(facts, whole, prompts, backward=False)


def token_work(facts: ModelFacts, load: Load) -> Work:
    """One decoding step of all rows."""
    rows = load.rollout_rows
    matmuls = facts.decoder_parameters + facts.lora_parameters + facts.hidden * facts.vocabulary
    weights = facts.bytes_stored - facts.bytes_beside + facts.item * facts.lora_parameters
    if not facts.tied:
        weights -= facts.item * facts.hidden * facts.vocabulary  # embeddings: a few rows are read
    if rows > PACKED_ROWS:
        weights += DECODED_BYTES * (facts.quantized_parameters if facts.packed else 0)
    return Work(
        flops=2.0 * rows * matmuls,
        activations=float(kv_cache(facts, load)),
        logits=float(FP32 * rows * facts.vocabulary),
        weights=float(weights),
        layer_forwards=facts.layers,
    )


def _decoding(facts: ModelFacts) -> float:
    """Bytes that decoding a packed base moves in one pass."""
    if not facts.packed:
        return 0.0
    loaded = facts.item * facts.quantized_parameters
    packed = facts.bytes_stored - (facts.bytes_loaded - loaded)
    return float(packed + DECODED_BYTES * facts.quantized_parameters)


# ---------------------------------------------------------------- seconds


def pass_seconds(work: Work, hardware: Hardware, efficiency: Efficiency) -> float:
    """Of a micro-batch."""
    assert hardware.flops and hardware.bandwidth
    device = work.flops / (efficiency.matmul * hardware.flops)
    moved = work.activations * efficiency.activation_moves
    moved += work.logits * efficiency.logit_moves + work.weights
    device += moved / hardware.bandwidth
    host = work.layer_forwards * efficiency.forward_host_seconds
    host += work.layer_backwards * efficiency.backward_host_seconds
    return max(device, host)


def gathering_seconds(
    work: Work, hardware: Hardware, efficiency: Efficiency, layout: Layout
) -> float:
    """What stage 3 adds to a micro-batch."""
    if layout.zero < 3:
        return 0.0
    assert efficiency.zero3_layer_seconds is not None
    hooks = work.layer_passes * efficiency.zero3_layer_seconds
    if not work.gathered:
        return hooks
    assert hardware.link
    return hooks + work.gathered / (efficiency.link * hardware.link)


def token_seconds(work: Work, hardware: Hardware, efficiency: Efficiency) -> float:
    """Of one decoding step."""
    assert hardware.flops and hardware.bandwidth
    moved = work.weights * efficiency.decode_weight_moves
    moved += work.activations * efficiency.decode_cache_moves
    moved += work.logits * efficiency.decode_logit_moves
    fixed = work.layer_passes * efficiency.decode_layer_seconds
    return fixed + moved / hardware.bandwidth + work.flops / (efficiency.matmul * hardware.flops)


def optimizer_seconds(facts: ModelFacts, hardware: Hardware, efficiency: Efficiency) -> float:
    """AdamW on the adapters: two tensors a linear."""
    assert hardware.bandwidth
    states = 4 * FP32 * facts.lora_parameters
    return 2 * facts.adapted_linears * efficiency.adapter_step_seconds + states / hardware.bandwidth


def gradient_seconds(
    facts: ModelFacts, layout: Layout, hardware: Hardware, efficiency: Efficiency
) -> float:
    """Adding up the adapters' gradients over the devices, once an update."""
    if layout.devices == 1:
        return 0.0
    assert hardware.link
    n = layout.devices
    return 2 * (n - 1) / n * FP32 * facts.lora_parameters / (efficiency.link * hardware.link)


# ---------------------------------------------------------------- a step


def predict_step(
    facts: ModelFacts,
    layout: Layout,
    load: Load,
    config: RunConfig,
    hardware: Hardware,
    efficiency: Efficiency,
) -> StepTime:
    """A training step of ``config`` whose every completion has ``load.new_tokens`` tokens, with one
    try of sampling."""
    dapo = config.train.method == "dapo"
    d = config.dapo
    updates = d.updates_per_rollout if dapo else 1
    trained = config.sft.batch_size
    if dapo:
        trained = d.prompts_per_rollout * config.rollout.num_generations
    per_update = math.ceil(trained / updates / layout.devices)
    micro = math.ceil(per_update / load.sequences)
    work = micro_batch_work(facts, layout, load)
    forward = micro_batch_work(facts, layout, load, backward=False)
    gathering = gathering_seconds(work, hardware, efficiency, layout)
    old_policy = pass_seconds(forward, hardware, efficiency) if updates > 1 else 0.0
    adding = gradient_seconds(facts, layout, hardware, efficiency)
    prefill, decode, steps = _rollout(facts, layout, load, config, hardware, efficiency)
    return StepTime(
        prefill=prefill,
        decode=decode,
        old_policy=old_policy * micro * updates,
        forward_backward=updates * micro * pass_seconds(work, hardware, efficiency),
        optimizer=updates * optimizer_seconds(facts, hardware, efficiency),
        communication=updates * (micro * gathering + adding),
        micro_batches=micro * updates,
        decoding_steps=steps,
    )


def _rollout(
    facts: ModelFacts,
    layout: Layout,
    load: Load,
    config: RunConfig,
    hardware: Hardware,
    efficiency: Efficiency,
) -> tuple[float, float, int]:
    """Seconds of prefill and of decoding, and decoding steps."""
    if config.train.method != "dapo":
        return 0.0, 0.0, 0
    d = config.dapo
    asked = d.generation_prompts if d.dynamic_sampling else d.prompts_per_rollout
    rows = math.ceil(asked / layout.devices) * config.rollout.num_generations
    batches = math.ceil(rows / load.rollout_rows)
    prefill = pass_seconds(prefill_work(facts, layout, load), hardware, efficiency)
    token = token_seconds(token_work(facts, load), hardware, efficiency)
    return batches * prefill, batches * load.new_tokens * token, batches * load.new_tokens
