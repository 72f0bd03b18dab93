"""LoRA on a frozen 4-bit base: PEFT's adapters, in the dtypes that keep small updates alive.

``y = base(x) + (alpha / r) B A x`` with ``x`` in 16 bits, as serving engines compute it. The
adapter's weights are fp32: they are the master weights, at every ZeRO stage, because AdamW on bf16
weights at lr 1e-5 rounds most updates away. Each forward pass computes with their 16-bit image, so
training, rollout, evaluation and export all use the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn
from torch.nn import functional as F

from npu_qat.config import LoraSection
from npu_qat.config.paths import layer_index
from npu_qat.layers.quant_linear import QuantLinear
from npu_qat.layers.straight_through import quantize_activation

ADAPTER = "default"


class MasterLinear(nn.Linear):
    """fp32 weights that compute in the dtype of their input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class QatLoraLinear(PeftLoraLinear):
    """PEFT's LoRA layer with 16-bit compute over fp32 weights and a choice of what LoRA sees."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        for part in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
            part.__class__ = MasterLinear
            part.float()

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a merged weight would be another 4-bit weight than the one trained on."""
        raise ValueError("these adapters are not merged; save them and serve them beside the base")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.get_base_layer()
        if self._in_one_step(base, x):
            name = self.active_adapters[0]
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            return _adapted(x, a, b, base, self.scaling[name])
        y = base(x)
        if self.disable_adapters:
            return y
        quantized = isinstance(base, QuantLinear) and base.state.active
        if quantized and base.state.recipe.lora_input == "quantised":
            x = base.quantized_input(x)
        for name in self.active_adapters:
            a, b = self.lora_A[name], self.lora_B[name]
            y = y + _scaled(b, a(self.lora_dropout[name](x)), self.scaling[name])
        if quantized and base.state.recipe.lora_output == "quantised":
            y = _quantize_output(base, y)
        return y

    def _in_one_step(self, base: nn.Module, x: torch.Tensor) -> bool:
        """Whether ``_AdaptedLinear`` computes this layer: what training does by default."""
        names = self.active_adapters
        if self.disable_adapters or len(names) != 1:
            return False
        parts = [m[names[0]] for m in (self.lora_A, self.lora_B, self.lora_dropout)]
        return (
            (isinstance(parts[2], nn.Identity) or not self.training)
            # A hook waits for a call: an observer's, or ZeRO-3's, which gathers the weight.
            and not any(m._forward_hooks or m._forward_pre_hooks for m in parts)
            and (
                base.has_input_gradient and x.dtype == base.dtype
                if isinstance(base, QuantLinear)
                else _is_frozen(base, x)
            )
        )


def _is_frozen(base: nn.Module, x: torch.Tensor) -> bool:
    return (
        isinstance(base, nn.Linear)
        and base.weight.dtype == x.dtype
        and not any(p.requires_grad for p in base.parameters())
    )


def _adapted(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, base: nn.Module, scaling: float
) -> torch.Tensor:
    """``base(x) + scaling B A x``, with gradients where they are wanted."""
    if torch.is_grad_enabled():
        y: torch.Tensor = _AdaptedLinear.apply(x, a, b, base, scaling)
        return y
    return _add_adapter(base(x), x, a.to(x.dtype), b.to(x.dtype), scaling)[0]


def _add_adapter(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(``y`` [.., N] plus ``scaling B A x``, in place; ``A x`` [M, r])."""
    rank_x = F.linear(x, a).view(-1, len(a))
    _add_product(y.view(-1, len(b)), rank_x, b.t(), scaling)
    return y, rank_x


def _add_product(
    y: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float = 1.0
) -> torch.Tensor:
    """``y`` [M, N] plus ``scaling * left @ right``, in place.

    On a GPU the matmul adds. On a CPU such a matmul rounds a row differently with the number of
    rows, and what a token gets shall not depend on the size of its batch.
    """
    if y.is_cuda:
        return y.addmm_(left, right, alpha=scaling)
    if _is_power_of_two(scaling):
        return y.add_((left if scaling == 1 else left * scaling) @ right)
    return y.add_((left @ right).mul_(scaling))


def _is_power_of_two(scaling: float) -> bool:
    return math.frexp(scaling)[0] == 0.5


class _AdaptedLinear(torch.autograd.Function):
    """A frozen linear and its adapter as one step of the graph.

    The adapter is added to the base's result by the matmul that makes it, and so are the two
    gradients of ``x``: two passes fewer over [.., N] and over [.., K], and one node where autograd
    would have six. It keeps ``x`` and ``A x``, as separate steps would.

        y = base(x) + s (x A^T) B^T        g = s dy B
        dx = dy W + g A                    dA = g^T x        dB = s dy^T (x A^T)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        base: nn.Module,
        scaling: float,
    ) -> torch.Tensor:
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        y, rank_x = _add_adapter(base(x), x, a16, b16, scaling)
        ctx.save_for_backward(x, rank_x, a16, b16)
        ctx.base, ctx.scaling, ctx.dtypes = base, scaling, (a.dtype, b.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rank_x, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, b.shape[0])
        g = dy @ b
        if ctx.scaling != 1:
            g *= ctx.scaling
        da = (g.t() @ x.reshape(-1, x.shape[-1])).to(ctx.dtypes[0])
        db = dy.t() @ rank_x
        if ctx.scaling != 1:
            db *= ctx.scaling
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _add_product(_input_gradient(ctx.base, dy), g, a).view(x.shape)
        return dx, da, db.to(ctx.dtypes[1]), None, None


def _input_gradient(base: nn.Module, dy: torch.Tensor) -> torch.Tensor:
    if isinstance(base, QuantLinear):
        return base.input_gradient(dy)
    assert isinstance(base, nn.Linear)
    return dy @ base.weight


def _scaled(b: nn.Module, rank_x: torch.Tensor, scaling: float) -> torch.Tensor:
    """``b(rank_x) * scaling``, B x [.., r] to [.., N].

    A power of two, which alpha / r mostly is, commutes with every rounding; multiplying the few
    numbers of rank r instead spares two passes over [.., N].
    """
    out: torch.Tensor
    if _is_power_of_two(scaling):
        out = b(rank_x if scaling == 1 else rank_x * scaling)
    else:
        out = b(rank_x) * scaling
    return out


def _quantize_output(base: QuantLinear, y: torch.Tensor) -> torch.Tensor:
    """``Q(base(x) + LoRA(x))``, with or without the straight-through estimator."""
    recipe, backend = base.state.recipe, base.state.backend
    return quantize_activation(
        y,
        lambda t: backend.fake_quant(t, recipe.activation_profile),
        use_ste=recipe.use_ste,
    )


def add_lora(model: nn.Module, section: LoraSection, seed: int) -> PeftModel:
    """Wrap the linears of the decoder layers of ``model`` with fresh adapters (B = 0).

    Args:
        model: a prepared model, or a 16-bit one for a baseline.
        section: rank, scale, dropout, targets.
        seed: of the initialisation of A; the same on every rank.

    Raises:
        ValueError: a target names no linear of the decoder layers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, _peft_config(model, section))
    return peft_model


def load_lora(model: nn.Module, folder: str, *, trainable: bool = False) -> PeftModel:
    """Put the adapter saved in ``folder`` (PEFT format) on ``model``."""
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = not trainable
    config._register_custom_module({nn.Linear: QatLoraLinear})
    return PeftModel.from_pretrained(
        model, folder, config=config, is_trainable=trainable, adapter_name=ADAPTER
    )


def _peft_config(model: nn.Module, section: LoraSection) -> LoraConfig:
    names = {
        path.rpartition(".")[2]
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear) and layer_index(path) is not None
    }
    targets = sorted(names) if section.targets == "all-linear" else list(section.targets)
    unknown = sorted(set(targets) - names)
    if unknown or not targets:
        raise ValueError(
            f"lora.targets: {unknown or targets} is no linear of the decoder layers; "
            f"choose from {sorted(names)}"
        )
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
        # PEFT's class for language models asks for what a plain module lacks.
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    # PEFT's documented hook for layer types of one's own; it covers subclasses of nn.Linear.
    config._register_custom_module({nn.Linear: QatLoraLinear})
    return config
