"""What a run is: every key, its default and its meaning, in one place.

A run is a tree of small sections. Each field's ``description`` is the documentation: the CLI's
``config show --describe`` and the reference page are printed from it, and no other module holds a
default. Unknown keys are errors (``extra="forbid"``), because a misspelt key that is silently
ignored is how experiments come to measure something else than they claim.

The sections are pure data. This module imports no torch, so that ``npu-qat --help`` and a typing
mistake in a YAML file answer at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from npu_qat.config.paths import match_path
from npu_qat.numerics.profiles import get_profile

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _check_pattern(pattern: str) -> str:
    match_path("", pattern)
    return pattern


# A module path as in docs/configuration.md, checked for the wildcards that match nothing.
PathPattern = Annotated[str, AfterValidator(_check_pattern)]


class Section(BaseModel):
    """A strict, immutable section of the configuration."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class RunSection(Section):
    """Where a run lives and on what it computes."""

    output_dir: str | None = Field(
        None, description="Run directory. Default: runs/<preset or config name>-<date>-<time>."
    )
    device: Literal["auto", "npu", "cuda", "cpu"] = Field(
        "auto", description="auto takes the first of npu, cuda, cpu that works and says which."
    )
    backend: Literal["auto", "reference", "cpu", "cuda", "npu", "ascendc"] = Field(
        "auto",
        description="Who computes the 4-bit numbers: auto takes the device's fastest that works "
        "and says which; reference is plain PyTorch. The numbers are the same.",
    )
    seed: NonNegative = Field(0, description="Seed of sampling, LoRA initialisation and noise.")
    resume: Literal["no", "auto"] = Field(
        "no",
        description="no: refuse a run directory in use. auto: go on from its newest intact "
        "checkpoint, or start if there is none.",
    )
    threads: Positive | None = Field(
        None, description="CPU threads for torch. Default: OMP_NUM_THREADS, else physical cores."
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab"], ...] = Field(
        ("tensorboard",),
        description="Who shows the metrics, besides metrics.jsonl; may be empty. wandb, mlflow and "
        "swanlab are extras of this package and take logins and offline modes from their own "
        "environment variables (docs/integrations.md).",
    )
    tracker_project: str = Field("npu-qat", description="Project or experiment in the trackers.")


class ModelConfig(Section):
    """The 16-bit checkpoint that is quantised once and then frozen."""

    path: str = Field(
        "demo",
        description="'demo' (the model in this package), a local folder, or a Hugging Face name.",
    )
    revision: str | None = Field(None, description="Hub revision; pin it for results that hold.")
    trust_remote_code: bool = Field(False, description="Passed to transformers.")
    dtype: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="Computation dtype. Adapters keep fp32 master weights in any case."
    )
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="transformers attn_implementation."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass."
    )


class Recipe(Section):
    """What is quantised, with which numbers, and when. Public API: ``npu_qat.Recipe``.

    ``injection_point`` names the quantised tensors of a linear ``y = x W^T + b``:

    ==============  ===========================  =======================
    injection_point  computes                     common name
    ==============  ===========================  =======================
    ``none``         ``x W^T + b``                W16A16
    ``weight``       ``x Q(W)^T + b``             W4A16
    ``input``        ``Q(x) W^T + b``             W16A4
    ``both``         ``Q(x) Q(W)^T + b``          W4A4 (weight + input)
    ``output``       ``Q(x W^T + b)``
    ``weight_output``  ``Q(x Q(W)^T + b)``        weight + output
    ==============  ===========================  =======================
    """

    injection_point: Literal["none", "weight", "input", "both", "output", "weight_output"] = Field(
        "both",
        description="Which tensors of each linear are quantised: weight is W4A16, input W16A4, "
        "both W4A4 (weight + input); output and weight_output quantise the result instead of the "
        "input.",
    )
    weight_profile: str = Field(
        "ascend950", description="Numerics profile of the weights (docs/numerics.md)."
    )
    activation_profile: str = Field(
        "ascend950", description="Numerics profile of inputs and outputs."
    )
    block_axis: Literal["row", "column"] = Field(
        "row",
        description="Weight blocks along 'in' (row: the contraction axis, what hardware needs) "
        "or along 'out' (column: reproduces an earlier experiment; cannot be deployed).",
    )
    rotation: Literal["none", "hadamard32"] = Field(
        "none",
        description="hadamard32: rotate each block of 32 input channels (and the weight, before it "
        "is quantised) by a Hadamard matrix, which spreads outliers. Stock vllm-ascend does not "
        "rotate inputs, so such a model cannot be exported.",
    )
    use_ste: bool = Field(
        True,
        description="Straight-through estimator for quantised inputs and outputs. False lets the "
        "gradient of rounding, which is zero, through: training fails; kept to reproduce that.",
    )
    lora_input: Literal["full", "quantised"] = Field(
        "full",
        description="What LoRA sees: the 16-bit x, as the serving stack does, or Q(x), as the "
        "earlier code did.",
    )
    lora_output: Literal["full", "quantised"] = Field(
        "full",
        description="What leaves an adapted linear: the sum of base and adapter in 16 bits, or Q "
        "of it, as the earlier code's hook behind the LoRA wrapper made it.",
    )
    apply_during: Literal["both", "training", "rollout"] = Field(
        "both",
        description="Phases in which the quantisers act. Evaluation always quantises.",
    )
    base_storage: Literal["image", "packed"] = Field(
        "image",
        description="Frozen weights as their exact 16-bit image (fast) or as 4-bit codes and "
        "scales (4.25 bits a weight for MXFP4). Same values either way.",
    )
    matmul: Literal["auto", "fused", "emulated"] = Field(
        "auto",
        description="fused: the device multiplies the 4-bit codes, as it does when it serves "
        "(Ascend 950), or as FP8 numbers (NVIDIA from Ada on: MXFP4, bf16 models; never chosen by "
        "auto). emulated: a 16-bit matmul on the values that they stand for. auto: fused where "
        "device and recipe allow it; the audit records which, and why.",
    )
    exclude: tuple[PathPattern, ...] = Field(
        ("lm_head",),
        description="Module paths left in 16 bits. Dot-separated, matched segment by segment "
        "from any segment on; * stands for one segment: 'lm_head', 'layers.0', "
        "'layers.*.mlp.down_proj'. 'layers.2' never matches layers.20.",
    )
    target_layers: tuple[int, ...] | None = Field(
        None, description="Decoder layers to quantise. Default: all."
    )

    @field_validator("weight_profile", "activation_profile")
    @classmethod
    def _known_profile(cls, name: str) -> str:
        get_profile(name)
        return name

    @model_validator(mode="after")
    def _profiles_fit_the_axes(self) -> Recipe:
        axes = {-1: "row", -2: "column"}
        axis = axes.get(get_profile(self.weight_profile).forced_axis or 0)
        if self.quantizes_weight and axis not in (None, self.block_axis):
            raise ValueError(
                f"weight_profile {self.weight_profile!r} has its blocks along the {axis}s only; "
                f"set block_axis: {axis}"
            )
        along_rows = get_profile(self.activation_profile).forced_axis in (None, -1)
        if (self.quantizes_input or self.quantizes_output) and not along_rows:
            raise ValueError(
                f"activation_profile {self.activation_profile!r} has its blocks along the columns, "
                "which activations have none of; use e.g. 'fork-nvfp4-row'"
            )
        return self

    @model_validator(mode="after")
    def _activations_can_use_profile(self) -> Recipe:
        quantizes_activations = self.quantizes_input or self.quantizes_output
        if quantizes_activations and get_profile(self.activation_profile).weights_only:
            raise ValueError(
                f"activation_profile {self.activation_profile!r} is defined for weights only; "
                "use the profile that serves the activations, e.g. 'ascend950'"
            )
        if self.rotates and self.lora_input == "quantised":
            raise ValueError(
                "lora_input: quantised would hand LoRA the rotated channels; with "
                f"rotation: {self.rotation} use lora_input: full"
            )
        if self.rotates and self.block_axis != "row":
            raise ValueError(
                f"rotation: {self.rotation} mixes channels along the rows; set block_axis: row"
            )
        if self.lora_input == "quantised" and not self.quantizes_input:
            raise ValueError(
                "lora_input: quantised needs a quantised input (injection_point input or both), "
                f"but injection_point is {self.injection_point!r}"
            )
        if self.lora_output == "quantised" and not self.quantizes_output:
            raise ValueError(
                "lora_output: quantised needs a quantised output (injection_point output or "
                f"weight_output), but injection_point is {self.injection_point!r}"
            )
        return self

    @property
    def rotates(self) -> bool:
        return self.rotation != "none"

    @property
    def quantizes_weight(self) -> bool:
        return self.injection_point in ("weight", "both", "weight_output")

    @property
    def quantizes_input(self) -> bool:
        return self.injection_point in ("input", "both")

    @property
    def quantizes_output(self) -> bool:
        return self.injection_point in ("output", "weight_output")

    def active_in(self, phase: str) -> bool:
        """Whether quantisers act in ``phase`` (training, rollout or evaluation)."""
        return phase == "evaluation" or self.apply_during in ("both", phase)


class LoraSection(Section):
    """The trained part: low-rank adapters, ``y += (alpha / r) B(A(x))``."""

    r: Positive = Field(32, description="Rank.")
    alpha: Positive = Field(16, description="Scale; the adapter's output is times alpha / r.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input, in training.")
    init: Literal["default", "quantisation_error"] = Field(
        "default",
        description="default: B = 0, the adapter adds nothing. quantisation_error: the best "
        "low-rank estimate, from calibration data, of what the quantised linear misses "
        "(docs/training.md). Arms in 16 bits have no such error and start by default.",
    )
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="All linears of the decoder layers, quantised or not, or the last path "
        "segments of those to adapt, e.g. [q_proj, v_proj].",
    )


class LayerSigma(Section):
    """Layer multipliers of the noise (``layer_sigma_config`` of the design documents)."""

    enabled: bool = Field(
        True,
        description="False: every multiplier is 1. Without a layers section it is false.",
    )
    default_multiplier: float = Field(1.0, ge=0.0, description="Layers that are not listed.")
    layer_multipliers: dict[int, Annotated[float, Field(ge=0.0)]] = Field(
        default_factory=dict, description="Decoder layer index -> multiplier of sigma."
    )
    normalize: bool = Field(
        False, description="Divide by the mean multiplier, so that guidance adds no total noise."
    )
    zone_schedule: ZoneSchedule | None = Field(
        None, description="Multipliers by zone and phase of training."
    )


class ZoneSchedule(Section):
    """Edge and middle layers get their own multipliers, before and after a phase boundary."""

    edge_layers: tuple[NonNegative, ...] = Field(description="Layer indices of the edge zone.")
    middle_layers: tuple[NonNegative, ...] = Field(description="Layer indices of the middle zone.")
    phase_boundary_ratio: Fraction = Field(0.5, description="Share of total steps that is early.")
    early_edge_multiplier: float = Field(1.0, ge=0.0, description="Edge zone, early.")
    early_middle_multiplier: float = Field(1.0, ge=0.0, description="Middle zone, early.")
    late_edge_multiplier: float = Field(1.0, ge=0.0, description="Edge zone, late.")
    late_middle_multiplier: float = Field(0.5, ge=0.0, description="Middle zone, late.")


class NoiseConfig(Section):
    """AQN: adaptive quantisation noise on the RMSNorm weights during rollouts."""

    enabled: bool = Field(False, description="Add noise.")
    sigma_start: float = Field(0.01, gt=0.0, description="Sigma of the first noisy stage.")
    sigma_end: float = Field(0.0001, gt=0.0, description="Sigma of the last stage.")
    num_stages: Positive = Field(
        10, description="Equal intervals of the run, each with one sigma, falling exponentially."
    )
    zero_first_stage: bool = Field(True, description="First interval without noise, as in QeRL.")
    epoch_aware: bool = Field(
        False, description="Split the decay at epoch boundaries and restart the stages in each."
    )
    stages_per_epoch: Positive = Field(5, description="Stages of each epoch if epoch_aware.")
    apply_during: Literal["rollout", "training", "both"] = Field(
        "rollout", description="Phases with noise. Never in evaluation."
    )
    norm_dtype: Literal["model", "fp32"] = Field(
        "fp32",
        description="dtype that holds the norm weights. At weight 1 bf16 swallows a sigma of "
        "5e-4; stages below the dtype's resolution are reported as inert.",
    )
    target_modules: tuple[str, ...] = Field(
        (), description="Last path segments of the norms to change. Empty: every RMSNorm."
    )
    exclude: tuple[PathPattern, ...] = Field(
        (), description="Norm paths left alone (as quant.exclude)."
    )
    layers: LayerSigma = Field(default_factory=lambda: LayerSigma(enabled=False))

    @model_validator(mode="after")
    def _stages_make_a_schedule(self) -> NoiseConfig:
        stages = self.stages_per_epoch if self.epoch_aware else self.num_stages
        key = "stages_per_epoch" if self.epoch_aware else "num_stages"
        if self.enabled and self.zero_first_stage and stages < 2:
            raise ValueError(
                f"{key}: {stages} with zero_first_stage: true leaves no stage with noise; "
                f"set {key} to 2 or more, or zero_first_stage: false"
            )
        if self.enabled and self.sigma_end > self.sigma_start:
            raise ValueError(
                f"sigma_end {self.sigma_end:g} is above sigma_start {self.sigma_start:g}; "
                "the schedule decays"
            )
        return self


class TaskConfig(Section):
    """What is learnt."""

    name: Literal["word_problems", "gsm8k"] = Field(
        "word_problems", description="Generated arithmetic word problems, or GSM8K."
    )
    path: str | None = Field(
        None, description="GSM8K: local JSONL or Parquet file or folder, or a hub name."
    )
    levels: tuple[Positive, ...] = Field((1, 2, 3), description="Difficulty levels (generated).")
    train_size: Positive | None = Field(
        None, description="Training problems. Default: 4096 generated, or all of GSM8K."
    )
    test_size: Positive | None = Field(
        None, description="Held-out problems. Default: 1024 generated, or all of GSM8K."
    )
    seed: NonNegative = Field(0, description="Seed of the generated problems (not of the split).")
    prompt_suffix: str | None = Field(
        None, description="Appended to each question. Default: the task's own."
    )


class RolloutConfig(Section):
    """How completions are sampled."""

    num_generations: Positive = Field(8, description="Completions a prompt (group size G).")
    max_prompt_tokens: Positive = Field(1024, description="Longer prompts are an error.")
    max_new_tokens: Positive = Field(1024, description="Longest completion.")
    temperature: float = Field(1.0, gt=0.0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="Nucleus mass; 1 samples from all.")
    batch_size: Positive = Field(256, description="Sequences decoded together, a process.")
    engine: Literal["hf", "vllm"] = Field(
        "hf",
        description="Who samples: hf, the modules that are trained; vllm, an engine a process that "
        "loads the exported base once and gets adapter and norms each step. It must prove at the "
        "first step that it computes the trained model.",
    )
    engine_format: Literal["auto", "ascend", "compressed-tensors"] = Field(
        "auto",
        description="Format of the base that the engine loads. auto: ascend on an NPU, "
        "compressed-tensors elsewhere.",
    )
    engine_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments for vllm's LLM, e.g. gpu_memory_utilization (0.4) or enforce_eager. "
        "Keys that this program decides are refused.",
    )


class DapoConfig(Section):
    """DAPO: group advantages, dynamic sampling, clip-higher, token-mean loss; no KL term."""

    prompts_per_rollout: Positive = Field(
        128, description="Groups a rollout trains on, over all processes."
    )
    generation_prompts: Positive = Field(
        256, description="Prompts sampled in one try, over all processes."
    )
    updates_per_rollout: Positive = Field(4, description="Optimiser updates a rollout.")
    dynamic_sampling: bool = Field(
        True, description="Drop groups whose accuracies are all equal and sample more."
    )
    max_generation_tries: Positive = Field(
        5, description="Tries to fill a rollout; then it trains on what it has."
    )
    clip_low: float = Field(0.2, gt=0.0, lt=1.0, description="Ratio is clipped at 1 - clip_low.")
    clip_high: float = Field(0.28, gt=0.0, description="Ratio is clipped at 1 + clip_high.")
    clip_ratio_c: float | None = Field(
        None, gt=1.0, description="Dual clip for negative advantages; none in the DAPO paper."
    )
    overlong_filter: bool = Field(
        True,
        description="Truncated completions give no loss and do not count in the token normaliser; "
        "their rewards still count in the group's mean and deviation.",
    )
    overlong_penalty: bool = Field(True, description="Soft penalty on long completions.")
    overlong_buffer: Positive = Field(256, description="Tokens before the limit where it begins.")
    overlong_factor: float = Field(1.0, ge=0.0, description="Largest penalty.")
    tis: bool = Field(
        True, description="Truncated importance sampling: weight min(pi_old / pi_rollout, cap)."
    )
    tis_cap: float = Field(2.0, gt=0.0, description="Cap of that weight.")
    logp_gap_limit: float = Field(
        0.05,
        gt=0.0,
        description="Largest mean |log pi_old - log pi_rollout| a token with noise off; above it "
        "the run stops, because rollout and training compute different models.",
    )
    gap_prompts: Positive = Field(
        8, description="Prompts whose completions measure the noise-off gap when noise is on."
    )


class SftConfig(Section):
    """Supervised fine-tuning on the worked solutions, loss on the answer's tokens only."""

    batch_size: Positive = Field(64, description="Sequences an update, over all processes.")
    max_tokens: Positive = Field(1024, description="Longer examples are an error.")


class DistillSection(Section):
    """Distillation from a 16-bit teacher: ``(1 - weight) task + weight KL(teacher, student)`` on
    the completion's tokens (SFT: the worked solution; DAPO: what the student sampled)."""

    weight: Fraction = Field(
        0.0, description="Share of the loss that is distillation. 0: none; 1: nothing else."
    )
    teacher: Literal["base", "bf16_lora"] = Field(
        "base",
        description="base: the 16-bit model as it came. bf16_lora: with the adapter of the run's "
        "16-bit arm, which is then trained first (needs it in evaluation.baselines).",
    )
    temperature: float = Field(
        1.0, gt=0.0, description="Divides both models' logits; the term is times its square."
    )


class TrainConfig(Section):
    """The optimiser and the length of the run. A step is a rollout with all its updates (dapo)
    or one update (sft)."""

    method: Literal["dapo", "sft"] = Field("dapo", description="Training loop.")
    steps: Positive | None = Field(None, description="Steps. Default: epochs decide.")
    epochs: Positive = Field(1, description="Passes over the training problems, if steps is unset.")
    lr: float = Field(1e-5, gt=0.0, description="Learning rate after warm-up (AdamW).")
    warmup_steps: NonNegative = Field(10, description="Linear warm-up, in steps.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="After warm-up; linear and cosine fall to zero at the last step."
    )
    weight_decay: float = Field(0.1, ge=0.0, description="AdamW weight decay.")
    beta1: Fraction = Field(0.9, description="AdamW beta 1.")
    beta2: Fraction = Field(0.999, description="AdamW beta 2.")
    max_grad_norm: float = Field(1.0, gt=0.0, description="Gradient clipping.")
    loss_scale: float | None = Field(
        None,
        gt=0.0,
        description="The backward pass computes with the loss times this, so that small gradients "
        "survive fp16. Default: 1024 for model.dtype: fp16, else 1.",
    )
    micro_batch_size: Positive = Field(4, description="Sequences a forward pass, a process.")
    checkpoint_every: Positive = Field(10, description="Steps between checkpoints.")
    keep_checkpoints: Positive = Field(2, description="Newest checkpoints kept, an arm.")


class DeepSpeedSection(Section):
    """The engine under both loops."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        "auto",
        description="What is partitioned over processes. auto: 2 on several NPUs, else 0.",
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="Merged into the DeepSpeed configuration. Keys that this program decides "
        "(batch sizes, clipping, precision, stage) are refused.",
    )


class EvaluationConfig(Section):
    """How well a model does in W4A4, noise off, on held-out problems."""

    metric: Literal["accuracy", "answer_perplexity"] = Field(
        "accuracy",
        description="accuracy: answer greedily and compare. answer_perplexity: exp of the mean "
        "negative log probability of the worked solutions' tokens, end token included.",
    )

    problems: Positive | None = Field(None, description="Held-out problems. Default: all.")
    every: Positive | None = Field(
        None, description="Steps between evaluations in training. The last step always is one."
    )
    every_problems: Positive = Field(256, description="Problems of evaluations in training.")
    batch_size: Positive = Field(256, description="Sequences decoded together, a process.")
    max_new_tokens: Positive | None = Field(None, description="Default: rollout.max_new_tokens.")
    confidence: float = Field(0.95, gt=0.0, lt=1.0, description="Level of the intervals.")
    baselines: tuple[Literal["bf16", "ptq", "bf16_lora"], ...] = Field(
        ("bf16", "ptq"),
        description="bf16: the start in 16 bits. ptq: the start in W4A4. bf16_lora: train a second "
        "arm without quantisation and also serve its adapter on the W4A4 base.",
    )


class RunConfig(Section):
    """A complete run."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelConfig = Field(default_factory=ModelConfig)
    quant: Recipe = Field(default_factory=Recipe)
    lora: LoraSection = Field(default_factory=LoraSection)
    noise: NoiseConfig = Field(default_factory=NoiseConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    dapo: DapoConfig = Field(default_factory=DapoConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    distill: DistillSection = Field(default_factory=DistillSection)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    deepspeed: DeepSpeedSection = Field(default_factory=DeepSpeedSection)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    def _engine_agrees(self) -> None:
        """Refuse what a serving engine does not compute."""
        recipe, noise = self.quant, self.noise
        refused = {
            "train.method: sft has no rollout": self.train.method != "dapo",
            "quant.injection_point must not be none: nothing could be exported": (
                recipe.injection_point == "none"
            ),
            "quant.apply_during must be both: the engine always quantises": (
                recipe.apply_during != "both"
            ),
            "quant.lora_input must be full: engines feed LoRA the 16-bit input": (
                recipe.lora_input != "full"
            ),
            "quant.rotation must be none: engines do not rotate inputs": recipe.rotates,
            "model.dtype must be bf16, in which the engine computes": self.model.dtype != "bf16",
            "rollout.top_p must be 1: the engine's log-probabilities would include the cut": (
                self.rollout.top_p != 1.0
            ),
            "noise.norm_dtype must be model: the engine holds norms in 16 bits, where sigmas below "
            "about 1e-3 vanish (train --dry-run shows which stages do)": (
                noise.enabled and noise.norm_dtype != "model"
            ),
        }
        if reasons := [reason for reason, applies in refused.items() if applies]:
            raise ValueError(f"rollout.engine: vllm: {'; '.join(reasons)}")

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        d, r = self.dapo, self.rollout
        if self.train.method == "dapo":
            if d.prompts_per_rollout % d.updates_per_rollout:
                raise ValueError(
                    f"dapo.prompts_per_rollout ({d.prompts_per_rollout}) must be a multiple of "
                    f"dapo.updates_per_rollout ({d.updates_per_rollout})"
                )
            reachable = d.generation_prompts * d.max_generation_tries
            if d.dynamic_sampling and d.prompts_per_rollout > reachable:
                raise ValueError(
                    f"dapo.prompts_per_rollout ({d.prompts_per_rollout}) is more than "
                    "generation_prompts x max_generation_tries can give "
                    f"({d.generation_prompts} x {d.max_generation_tries})"
                )
            if not d.dynamic_sampling and d.prompts_per_rollout != d.generation_prompts:
                raise ValueError(
                    "without dapo.dynamic_sampling every sampled prompt trains, so "
                    f"dapo.prompts_per_rollout ({d.prompts_per_rollout}) must equal "
                    f"dapo.generation_prompts ({d.generation_prompts})"
                )
            if d.overlong_penalty and d.overlong_buffer > r.max_new_tokens:
                raise ValueError(
                    f"dapo.overlong_buffer ({d.overlong_buffer}) is longer than "
                    f"rollout.max_new_tokens ({r.max_new_tokens})"
                )
        if self.distill.weight > 0 and self.distill.teacher == "bf16_lora":
            if "bf16_lora" not in self.evaluation.baselines:
                raise ValueError(
                    "distill.teacher: bf16_lora is the adapter of the run's 16-bit arm; add "
                    "bf16_lora to evaluation.baselines"
                )
            if self.quant.injection_point == "none":
                raise ValueError(
                    "distill.teacher: bf16_lora teaches a quantised arm; set quant.injection_point"
                )
        if self.lora.init == "quantisation_error" and self.quant.injection_point == "none":
            raise ValueError(
                "lora.init: quantisation_error needs an error; set quant.injection_point, or "
                "lora.init: default"
            )
        if r.engine == "vllm":
            self._engine_agrees()
        rollout_noise = self.noise.enabled and self.noise.apply_during == "rollout"
        if self.train.method == "sft" and rollout_noise:
            raise ValueError(
                "noise.apply_during: rollout never applies with train.method: sft, which has no "
                "rollout; use apply_during: training, or noise.enabled: false"
            )
        if self.quant.base_storage == "packed" and self.quant.apply_during != "both":
            raise ValueError(
                "quant.base_storage: packed keeps no 16-bit weight, which apply_during: "
                f"{self.quant.apply_during} needs in the other phase; use base_storage: image"
            )
        return self


LayerSigma.model_rebuild()
NoiseConfig.model_rebuild()
RunConfig.model_rebuild()
