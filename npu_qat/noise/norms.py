"""The RMSNorms of a model: finding them, choosing some, holding their weights ready for noise.

A norm is recognised by its class name, which ends in ``RMSNorm`` in every decoder of transformers
and in torch itself; an ``isinstance`` test against one library's class finds nothing in a model
that another library built, and then no noise is added to anything. Finding none is an error.

The weights become **buffers** under their old names. The state dict stays the same, an optimizer
cannot pick them up, ZeRO-3 does not partition them, and noise can be added in place.

With ``norm_dtype: fp32`` they are held in fp32 and the norm's *output* is cast back to the dtype of
its input, by a subclass made on the fly (``Fp32Qwen2RMSNorm``), so that the rest of the model still
computes in its own dtype. With unchanged weights that is bit for bit the same model: the product of
two 16-bit floats is exact in fp32 and is rounded once either way.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npu_qat.config import NoiseConfig
from npu_qat.config.paths import layer_index, match_any, match_path

# What PEFT and DeepSpeed put in front of a path. A norm's noise must not depend on it.
_WRAPPERS = ("module.", "base_model.model.")


class NoiseError(ValueError):
    """The noise cannot be applied as configured, or was measured not to be what was asked for."""


@dataclass(frozen=True)
class Norm:
    """One RMSNorm under control: its path without wrappers, its decoder layer (None: final norm),
    and the digest of its clean weight."""

    path: str
    layer: int | None
    module: nn.Module
    digest: bytes

    @property
    def weight(self) -> Tensor:
        return self.module.get_buffer("weight")


def take_norms(model: nn.Module, config: NoiseConfig) -> list[Norm]:
    """Find, choose and check the norms, then hold their weights as buffers in ``norm_dtype``.

    Raises ``NoiseError`` before anything is changed if no norm is found or chosen, a pattern of the
    configuration selects nothing, or a weight is trainable, partitioned or not loaded.
    """
    chosen = select_norms(model, find_rms_norms(model), config)
    for path, module in chosen.items():
        _check_weight(path, module, config.norm_dtype)
    for module in chosen.values():
        _hold_as_buffer(module, config.norm_dtype)
    return [
        Norm(path, layer_index(path), module, digest(module.get_buffer("weight")))
        for path, module in chosen.items()
    ]


def find_rms_norms(model: nn.Module) -> dict[str, nn.Module]:
    """All RMSNorms with a 1-D weight, by path without wrappers."""
    found = {
        _plain_path(path): module
        for path, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm")
        and isinstance(weight := getattr(module, "weight", None), Tensor)
        and (weight.dim() == 1 or hasattr(weight, "ds_id"))
    }
    if not found:
        classes = Counter(type(module).__name__ for module in model.modules())
        norms = {name: n for name, n in classes.items() if "norm" in name.lower()} or classes
        listing = ", ".join(f"{name} ({n})" for name, n in sorted(norms.items()))
        raise NoiseError(
            "noise.enabled is true, but this model has no RMSNorm with a weight; "
            f"found: {listing}. AQN changes RMSNorm weights only: set noise.enabled: false"
        )
    return found


def _plain_path(path: str) -> str:
    """``path`` without what PEFT and DeepSpeed put in front of it."""
    for wrapper in _WRAPPERS:
        if path.startswith(wrapper):
            return _plain_path(path.removeprefix(wrapper))
    return path


def select_norms(
    model: nn.Module, found: dict[str, nn.Module], config: NoiseConfig
) -> dict[str, nn.Module]:
    """The norms that ``target_modules`` and ``exclude`` leave; the model may be on the meta device.

    Each target must name some norm. An exclusion must name some module, but not a norm: the
    earlier experiments' lists held ``lm_head`` too.
    """
    last = {path.rpartition(".")[2] for path in found}
    for name in config.target_modules:
        if name not in last:
            raise NoiseError(
                f"noise.target_modules names {name!r}, but the RMSNorms of this model are called "
                f"{', '.join(sorted(last))}"
            )
    for pattern in config.exclude:
        if not any(match_path(path, pattern) for path, _ in model.named_modules()):
            raise NoiseError(
                f"noise.exclude names {pattern!r}, which matches no module of this model; "
                f"paths of its norms look like {next(iter(found))}"
            )
    chosen = {
        path: module
        for path, module in found.items()
        if (not config.target_modules or path.rpartition(".")[2] in config.target_modules)
        and not match_any(path, config.exclude)
    }
    if not chosen:
        raise NoiseError("noise.target_modules and noise.exclude together leave no RMSNorm")
    return chosen


def _check_weight(path: str, module: nn.Module, norm_dtype: str) -> None:
    """Refuse a weight that AQN must not or cannot change, before anything is changed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if hasattr(weight, "ds_id"):
        raise NoiseError(
            f"norm {path} is already partitioned by DeepSpeed ZeRO-3; make AQN before "
            "deepspeed.initialize and load the model without zero.Init"
        )
    if weight.is_meta:
        raise NoiseError(f"norm {path} has no data (meta device); load the weights first")
    if weight.requires_grad:
        raise NoiseError(
            f"norm {path} is trainable, and noise on a weight that an optimizer also changes "
            "cannot be taken away exactly; freeze the base model before making AQN"
        )
    if norm_dtype == "model" and hasattr(type(module), "_held_in_fp32"):
        raise NoiseError(
            f"norm {path} is held in fp32 by an earlier AQN, so norm_dtype: model would not mean "
            "the model's dtype; load the model again, or use norm_dtype: fp32"
        )


def _hold_as_buffer(module: nn.Module, norm_dtype: str) -> None:
    """Make ``module.weight`` a buffer of the same name, in fp32 if asked for."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    data = weight.detach()
    if norm_dtype == "fp32" and data.dtype != torch.float32:
        data = data.float()
        cls: Any = type(module)
        module.__class__ = _fp32_class(cls)
    if "weight" in module._parameters:
        del module._parameters["weight"]
        module.register_buffer("weight", data)
    else:
        module.weight = data


@functools.cache
def _fp32_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a norm that holds its weight in fp32 and returns the dtype of its input."""

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = cls.forward(self, hidden_states, *args, **kwargs)
        return out.to(hidden_states.dtype)

    def _apply(self: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        # Engines cast whole models to bf16. Devices are followed, dtypes are not.
        exact = self.weight
        cls._apply(self, fn, recurse)
        moved = self.weight
        assert isinstance(exact, Tensor) and isinstance(moved, Tensor)
        if moved.dtype != torch.float32:
            self.weight = exact.to(moved.device)
        return self

    members = {"forward": forward, "_apply": _apply, "_held_in_fp32": True, "__doc__": cls.__doc__}
    return type(f"Fp32{cls.__name__}", (cls,), {**members, "__module__": cls.__module__})


def write(weight: Tensor, values: Tensor) -> None:
    """Copy ``values`` into ``weight`` in place.

    In place, so that views and captured graphs follow; and a backward pass that comes after the
    restore, outside of its block, fails on autograd's version counter.
    """
    with torch.no_grad():
        weight.copy_(values)


def on_cpu(weight: Tensor) -> Tensor:
    """A copy on the CPU, where float64 and the same arithmetic exist whatever the device."""
    return weight.detach().to("cpu", copy=True)


def digest(weight: Tensor) -> bytes:
    """Digest of the dtype and the bits of a weight."""
    cpu = on_cpu(weight).contiguous()
    data = cpu.view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(str(cpu.dtype).encode() + data, digest_size=16).digest()
