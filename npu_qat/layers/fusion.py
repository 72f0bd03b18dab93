"""RMSNorm and SiLU * up that quantise what they produce, so that the linears need not.

In a decoder layer every quantised linear but one reads what a norm or the MLP's product wrote a
moment ago. A kernel that makes ``y`` and ``Q(y)`` in one pass saves reading ``y`` again, and saves
the fp32 intermediates of the norm: quantised training then costs less than 16-bit training with
separate operations. The 16-bit ``y`` is still written, because LoRA reads it.

``fuse`` gives the norms and MLPs of a prepared model a subclass with another ``forward``;
parameters, module paths and the state dict stay as they are. ``Q(y)`` goes to the linears by
``SharedInput.prime``. Noise on a norm's weight (``noise/``) needs nothing special: the kernel reads
the weight.

**Gradient.** The straight-through estimator hands the gradient of ``Q(y)`` to ``y``; both reach the
producer, whose backward kernel adds them in fp32 (autograd would add them in 16 bits). It keeps its
inputs and nothing else, which is what 16-bit training keeps, or less.

What is given up: the norm's sum of squares has a fixed order of its own, so ``y`` may differ from
the replaced module's in its last bit. It does so alike in training, rollout and evaluation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from npu_qat.layers.quant_linear import QuantLinear, QuantState
from npu_qat.numerics.profiles import get_profile

# Modules of transformers that compute exactly what the kernels compute; Gemma's norms, for
# instance, do not.
NORMS = ("Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm")
MLPS = ("Qwen2MLP", "Qwen3MLP", "LlamaMLP", "MistralMLP")
# The linears that read a norm of a decoder layer.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@runtime_checkable
class NormBackend(Protocol):
    """A backend with a fused RMSNorm; shapes as in ``backends.cuda.producers``."""

    def fuses(self, x: torch.Tensor, profile: str | None, *, row: bool) -> bool:
        """Whether ``rms_norm`` (``row``) or ``silu_mul`` take ``x`` with this profile."""
        ...

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        profile: str | None = None,
        tensor_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(y, Q(y) without a tensor scale; None without a profile)."""
        ...

    def rms_norm_backward(
        self,
        grad_y: torch.Tensor | None,
        grad_q: torch.Tensor | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        slope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """dx from dy + slope * dq."""
        ...


@runtime_checkable
class ProducerBackend(NormBackend, Protocol):
    """A backend with a fused SiLU * up, too."""

    def silu_mul(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        profile: str | None = None,
        tensor_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(y, Q(y)) of y = SiLU(gate) * up."""
        ...

    def silu_mul_backward(
        self,
        grad_y: torch.Tensor | None,
        grad_q: torch.Tensor | None,
        gate: torch.Tensor,
        up: torch.Tensor,
        slope: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(d_gate, d_up) from dy + slope * dq."""
        ...


@dataclass(frozen=True)
class Quantizing:
    """What a producer quantises its result with; both None: not at all."""

    profile: str | None = None
    tensor_scale: torch.Tensor | None = None

    @property
    def slope(self) -> torch.Tensor | None:
        """dQ/dy: Q comes without its tensor scale."""
        return None if self.tensor_scale is None else 1 / self.tensor_scale


PLAIN = Quantizing()


class Handover:
    """Between one producer and the quantised linears that read its result."""

    def __init__(
        self, state: QuantState, backend: NormBackend, readers: tuple[QuantLinear, ...]
    ) -> None:
        self.state, self.backend, self.readers = state, backend, readers

    def quantizing(self) -> Quantizing:
        """How the readers want their input now."""
        state, recipe = self.state, self.state.recipe
        if (
            not self.readers
            or not state.active
            or not (recipe.quantizes_input and recipe.use_ste)
            or recipe.rotates
            or state.matmul.fused
            or get_profile(recipe.activation_profile).level0_block
        ):
            return PLAIN
        # Siblings share their tensor scale.
        return Quantizing(recipe.activation_profile, self.readers[0].input_scale())

    def give(self, y: torch.Tensor, q: torch.Tensor) -> None:
        """Hand ``q``, which is Q(y), to whoever reads ``y`` next."""
        for shared in {id(r.shared): r.shared for r in self.readers}.values():
            shared.prime(y, q)


class _RmsNorm(torch.autograd.Function):
    """(y, Q(y)), or y alone, with dx from the gradients of both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        backend: NormBackend,
        how: Quantizing,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.backend, ctx.how = eps, backend, how
        ctx.set_materialize_grads(False)
        y, q = backend.rms_norm(x, weight, eps, how.profile, how.tensor_scale)
        return y if q is None else (y, q)

    @staticmethod
    def backward(
        ctx: Any, grad_y: torch.Tensor | None, grad_q: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, None, None, None, None]:
        if grad_y is None and grad_q is None:
            return None, None, None, None, None
        x, weight = ctx.saved_tensors
        dx = ctx.backend.rms_norm_backward(grad_y, grad_q, x, weight, ctx.eps, ctx.how.slope)
        return dx, None, None, None, None


class _SiluMul(torch.autograd.Function):
    """(y, Q(y)), or y alone, of y = SiLU(gate) * up."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        backend: ProducerBackend,
        how: Quantizing,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(gate, up)
        ctx.backend, ctx.how = backend, how
        ctx.set_materialize_grads(False)
        y, q = backend.silu_mul(gate, up, how.profile, how.tensor_scale)
        return y if q is None else (y, q)

    @staticmethod
    def backward(
        ctx: Any, grad_y: torch.Tensor | None, grad_q: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        if grad_y is None and grad_q is None:
            return None, None, None, None
        gate, up = ctx.saved_tensors
        d_gate, d_up = ctx.backend.silu_mul_backward(grad_y, grad_q, gate, up, ctx.how.slope)
        return d_gate, d_up, None, None


def fuse(model: nn.Module, state: QuantState) -> list[str]:
    """Fuse what can be fused in a prepared ``model``, in place; the paths of what was fused.

    Nothing, where the backend has no such kernels. Modules that the kernels do not stand for (other
    classes, other activations) are left alone.
    """
    backend = state.backend
    if not isinstance(backend, NormBackend):
        return []
    readers: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        for norm, names in READERS.items():
            if hasattr(module, norm):
                prefix = f"{path}." if path else ""
                readers[prefix + norm] = tuple(prefix + name for name in names)
    fused = []
    modules = dict(model.named_modules())
    for path, module in modules.items():
        kind = type(module).__name__
        make: Any  # functools.cache hides its type
        if kind in NORMS:
            wanted, make = readers.get(path, ()), _norm_class
        elif kind in MLPS and _is_silu(module.act_fn) and isinstance(backend, ProducerBackend):
            wanted, make = (f"{path}.down_proj",), _mlp_class
        else:
            continue
        layers = tuple(m for m in map(modules.get, wanted) if isinstance(m, QuantLinear))
        module.__class__ = make(type(module))
        object.__setattr__(module, "_handover", Handover(state, backend, layers))
        fused.append(path)
    return fused


def _is_silu(activation: Any) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


@functools.cache
def _norm_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a norm whose forward is the kernel's, where the kernel takes the input."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        handover: Handover = self._handover
        how, x, weight = handover.quantizing(), hidden_states, self.weight
        if weight.requires_grad or not handover.backend.fuses(x, how.profile, row=True):
            plain: torch.Tensor = cls.forward(self, x)
            return plain
        result = _RmsNorm.apply(x, weight, self.variance_epsilon, handover.backend, how)
        return _handed_over(handover, result)

    return type(f"Fused{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__})


@functools.cache
def _mlp_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a gated MLP whose product is the kernel's, where the kernel takes it."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        handover: Handover = self._handover
        gate, up = self.gate_proj(x), self.up_proj(x)
        how = handover.quantizing()
        if handover.backend.fuses(gate, how.profile, row=False):
            y = _handed_over(handover, _SiluMul.apply(gate, up, handover.backend, how))
        else:
            y = self.act_fn(gate) * up
        out: torch.Tensor = self.down_proj(y)
        return out

    return type(f"Fused{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__})


def _handed_over(handover: Handover, result: Any) -> torch.Tensor:
    """``y``, after Q(y) has gone to its readers, if the producer made one."""
    if isinstance(result, torch.Tensor):
        return result
    y, q = result
    handover.give(y, q)
    return y
