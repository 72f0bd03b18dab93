"""A linear layer whose forward pass computes the 4-bit result.

``y = Q_a(x) @ Q_w(W)^T + b`` with a frozen base: ``Q_w(W)`` is computed once, when the layer is
made, and the 16-bit weight is dropped. Two storages hold the same values:

* ``image``: a 16-bit tensor. E2M1 times a power of two is exact in bf16 (and E2M1 times an E4M3
  scale is, too), so the image loses nothing, and a forward pass costs one matmul.
* ``packed``: the 4-bit codes and scale bytes, 4.25 bits a weight for MXFP4. The backend's
  ``linear`` reads them; the backward pass decodes them.

And two ways of multiplying (``layers/matmul.py``):

* ``emulated``: ``Q_a(x)`` and ``Q_w(W)`` as 16-bit tensors, one 16-bit matmul.
* ``fused``: the device multiplies the codes. The forward pass is then what serving computes; the
  backward pass is the same as in the other mode, ``dx = dy Q_w(W)``.

What others do instead is overwrite ``weight.data`` in a forward hook and restore it afterwards.
That leaves the weight quantised after every forward pass without a backward pass, and under
gradient checkpointing; nothing is ever overwritten here.

Shapes: B = any leading dimensions, K = in_features, N = out_features.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from npu_qat.backends import (
    Backend,
    BackendUnavailable,
    EmulationBackend,
    EncodedInput,
    FusedBackend,
    PackedWeight,
)
from npu_qat.config import Recipe
from npu_qat.layers.matmul import EMULATED, MatmulMode
from npu_qat.layers.plan import multiplies_in_fp32
from npu_qat.layers.rotation import (
    INPUT_FACTOR,
    RotatingBackend,
    quantize_rotated_input,
    rotate_blocks,
    rotate_input,
)
from npu_qat.layers.straight_through import FrozenLinear, quantize_activation
from npu_qat.numerics import QuantizedTensor, get_profile, nvfp4_tensor_scale

PHASES = ("training", "rollout", "evaluation")
Result = TypeVar("Result")


class Observer(Protocol):
    """Sees what a layer quantised: x to ``operand()``, ``result`` to y. The audit is one."""

    def __call__(
        self,
        layer: QuantLinear,
        x: torch.Tensor,
        operand: Callable[[], torch.Tensor],
        result: torch.Tensor,
        y: torch.Tensor,
    ) -> None: ...


@dataclass
class QuantState:
    """What all quantised layers of one model share."""

    recipe: Recipe
    backend: Backend
    phase: str = "evaluation"
    observer: Observer | None = None
    calibrating: bool = False
    matmul: MatmulMode = EMULATED

    def __post_init__(self) -> None:
        recipe = self.recipe
        if recipe.quantizes_input or recipe.quantizes_output:
            self.backend.check_profile(recipe.activation_profile)
        # Weights are encoded once. A profile that the device's op does not compute (weights as
        # msmodelslim rounds them, say) is still one that its matmul can read.
        self.weight_encoder: Backend = self.backend
        try:
            self.backend.check_profile(recipe.weight_profile)
        except BackendUnavailable:
            self.weight_encoder = EmulationBackend()

    def describe(self) -> dict[str, str]:
        """Who computes, for the audit."""
        encoder = self.weight_encoder.name
        return {
            **self.backend.describe(),
            "matmul": self.matmul.name,
            "matmul_reason": self.matmul.reason,
            **({"weights_encoded_by": encoder} if self.recipe.quantizes_weight else {}),
        }

    @property
    def active(self) -> bool:
        """Whether layers quantise now."""
        return not self.calibrating and self.recipe.active_in(self.phase)


class SharedInput(Generic[Result]):
    """Quantises a tensor once for all linears that read it (q, k, v; gate, up).

    The siblings of a group are called one after another with the same tensor object. The result
    is kept from the first call to the last reader's and no longer, so that it costs no memory
    between layers. A tensor that was changed in place has a new version and is quantised again;
    one made in inference mode has no version, so nothing is kept for it.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._key: tuple[weakref.ref[torch.Tensor], int, bool] | None = (
            None  # tensor, version, graph
        )
        self._result: Result | None = None
        self._left = 0

    def get(self, x: torch.Tensor, quantize: Callable[[torch.Tensor], Result]) -> Result:
        if x.is_inference():
            return quantize(x)
        if self._holds(x):
            assert self._result is not None
            result = self._result
        else:
            result = quantize(x)
            self.prime(x, result)
        self._left -= 1
        if self._left <= 0:
            self._key = self._result = None
        return result

    def prime(self, x: torch.Tensor, operand: Result) -> None:
        """Hand over ``operand``, the quantised ``x``, to the linears that will read ``x`` next.

        For a producer that computes both in one go (a fused RMSNorm or SiLU * up). ``operand`` must
        carry the gradient that the quantiser of the layers would give it: with ``x`` in a graph it
        is an output of the producer's autograd function, and the gradients of both add up. In
        inference mode nothing is kept, and the linears quantise ``x`` themselves.
        """
        if x.is_inference():
            return
        self._key = (weakref.ref(x), x._version, _builds_graph(x))
        self._result, self._left = operand, self.readers

    def _holds(self, x: torch.Tensor) -> bool:
        if self._key is None:
            return False
        source, version, graph = self._key
        # What carries a gradient serves a caller who wants none, too.
        return source() is x and version == x._version and (graph or not _builds_graph(x))


def _builds_graph(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _bytes(stored: torch.Tensor) -> torch.Tensor:
    """uint8, which ZeRO-3 stores as int8 where the communication library has no uint8."""
    data = stored.data
    return data if data.dtype == torch.uint8 else data.view(torch.uint8)


def _frozen(
    x: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
    weight: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """``product(x)``; with the gradient of ``FrozenLinear`` where one is wanted."""
    if not _builds_graph(x):
        return product(x)
    y: torch.Tensor = FrozenLinear.apply(x, product, weight)
    return y


@dataclass
class CallCounts:
    """How often a layer ran in each phase, and how often it quantised."""

    total: Counter[str] = field(default_factory=Counter)
    quantized: Counter[str] = field(default_factory=Counter)


class QuantLinear(nn.Linear):
    """A frozen linear layer in a quantised model; made by ``prepare_model``.

    A subclass of ``nn.Linear`` so that PEFT and everything else that looks for linears finds it.
    It has no ``weight`` parameter: ``weight`` is a property that returns the 16-bit values the
    matmul uses.

    Args:
        linear: the 16-bit layer; not changed, not kept.
        path: its module path, for messages and the audit.
        state: shared by all layers of the model.
        shared: quantises the input once for a group of siblings.
        encoded: the same for the codes of the input, in fused mode.
        rotated: the same for the rotated input; the weight of ``linear`` is then a rotated one.
        weight_amax: largest magnitude over the group's weights, for profiles with a tensor scale
            (siblings share one, as serving engines fuse them). Default: of this weight.

    Raises:
        ValueError: the image of the weight is not exact in the weight's dtype, or a tensor scale
            meets fp16.
    """

    # Present only where the activation profile has a tensor scale; NaN until calibrated.
    input_tensor_scale: torch.Tensor

    def __init__(
        self,
        linear: nn.Linear,
        path: str,
        state: QuantState,
        shared: SharedInput[torch.Tensor] | None = None,
        weight_amax: torch.Tensor | None = None,
        encoded: SharedInput[EncodedInput] | None = None,
        rotated: SharedInput[torch.Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.path, self.state = path, state
        self.shared: SharedInput[torch.Tensor] = shared or SharedInput(1)
        # In fused mode the siblings share codes, too; one that shares nothing encodes for itself.
        self.encoded: SharedInput[EncodedInput] = encoded or SharedInput(1)
        self.rotated: SharedInput[torch.Tensor] = rotated or SharedInput(1)
        self._prepared: tuple[tuple[int, int], object] | None = None
        self.calls = CallCounts()
        self.dtype = linear.weight.dtype
        if self.dtype == torch.float16 and self._has_tensor_scale:
            # Operands of up to 6 * 448 each: a sum of few products leaves fp16.
            raise ValueError(f"{path}: NVFP4 needs model.dtype bf16 or fp32; fp16 overflows")
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)
        self._store_weight(linear.weight.detach(), weight_amax)
        if (
            state.recipe.quantizes_input
            and get_profile(state.recipe.activation_profile).tensor_scale
        ):
            # Static: a dynamic one would make a token's value depend on its neighbours.
            unset = torch.full((), float("nan"), device=linear.weight.device)
            self.register_buffer("input_tensor_scale", unset)
        self.input_amax = 0.0
        self._calibrated: int | None = None  # version of the tensor scale that was found set

    # --- the weight -------------------------------------------------------------------------

    def _store_weight(self, weight: torch.Tensor, amax: torch.Tensor | None) -> None:
        recipe = self.state.recipe
        if not recipe.quantizes_weight:
            self.weight_image = nn.Parameter(weight.clone(), False)
            return
        q = self.quantize_weight(weight, amax)
        if q.tensor_scale is not None:
            self.register_buffer("weight_tensor_scale", q.tensor_scale.float().clone())
        image = self._image(q)
        packed = recipe.base_storage == "packed"
        if not packed:
            self.weight_image = nn.Parameter(image, False)
        if packed or self.state.matmul.fused:
            self.weight_packed = nn.Parameter(q.packed, False)
            self.weight_scale = nn.Parameter(q.scales, False)
            if q.level0_scales is not None:
                self.register_buffer("weight_level0", q.level0_scales)
        if recipe.apply_during != "both":
            self.weight_full = nn.Parameter(weight.clone(), False)

    def quantize_weight(
        self, weight: torch.Tensor, amax: torch.Tensor | None = None
    ) -> QuantizedTensor:
        """Codes and scales of a 16-bit ``weight`` [N, K] by this layer's recipe."""
        recipe = self.state.recipe
        tensor_scale = None
        if get_profile(recipe.weight_profile).tensor_scale:
            tensor_scale = nvfp4_tensor_scale(weight.abs().amax() if amax is None else amax)
        return self.state.weight_encoder.quantize(
            weight, recipe.weight_profile, self.weight_axis, tensor_scale=tensor_scale
        )

    @property
    def _has_tensor_scale(self) -> bool:
        recipe = self.state.recipe
        used = {recipe.weight_profile} if recipe.quantizes_weight else set()
        used |= {recipe.activation_profile} if recipe.quantizes_input else set()
        return any(get_profile(name).tensor_scale for name in used)

    @property
    def weight_axis(self) -> int:
        """The blocked axis of the weight [N, K]: -1 along K, 0 along N."""
        return -1 if self.state.recipe.block_axis == "row" else 0

    def packed_weight(self) -> PackedWeight:
        """The stored codes and block scales (``packed`` storage, or fused mode).

        Without the tensor scale, which goes to the result.
        """
        return PackedWeight(
            _bytes(self.weight_packed),
            _bytes(self.weight_scale),
            shape=(self.out_features, self.in_features),
            profile=self.state.recipe.weight_profile,
            axis=self.weight_axis % 2,
            level0_scales=self._buffers.get("weight_level0"),
        )

    @functools.cached_property
    def operand_dtype(self) -> torch.dtype:
        """dtype of both operands of the emulated matmul: the layer's, which holds them exactly, or
        fp32 where a profile has fp32 scales inside the sum (dual-level)."""
        return torch.float32 if multiplies_in_fp32(self.state.recipe) else self.dtype

    def _image(self, q: QuantizedTensor) -> torch.Tensor:
        """Element x block scale in the operands' dtype; the tensor scale goes to the result."""
        q = replace(q, tensor_scale=None)
        image = self.state.backend.dequantize(q, self.operand_dtype)
        exact = self.state.backend.dequantize(q, torch.float32)
        if not torch.equal(image.float().nan_to_num(), exact.nan_to_num()):
            raise ValueError(
                f"{self.path}: the values of profile {self.state.recipe.weight_profile!r} are not "
                f"exact in {self.dtype}; use model.dtype: bf16 or fp32"
            )
        return image

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """[N, K] in the layer's dtype: the values of the matmul in the current phase (of a rotated
        layer: the rotated ones)."""
        if hasattr(self, "weight_full") and not self.state.active:
            return self.weight_full
        image, scale = self.weight_operand(), self._buffers.get("weight_tensor_scale")
        return (image if scale is None else image.float() * scale).to(self.dtype)

    def weight_operand(self) -> torch.Tensor:
        """[N, K] in ``operand_dtype``: the stored weight as it enters the matmul, without a tensor
        scale."""
        image = self._parameters.get("weight_image")
        if image is not None:
            return image
        return self.state.backend.dequantize(self.packed_weight(), self.operand_dtype)

    @property
    def storage_bytes(self) -> int:
        """Bytes of all stored tensors of this layer."""
        tensors = (*self.parameters(recurse=False), *self.buffers(recurse=False))
        return sum(t.numel() * t.element_size() for t in tensors)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> QuantLinear:
        # The buffers are fp32 scales: a cast of the whole model moves but never rounds them.
        exact = {name: scale for name, scale in self._buffers.items() if scale is not None}
        super()._apply(fn, recurse)
        for name, scale in exact.items():
            self._buffers[name] = scale.to(self.get_buffer(name).device)
        return self

    # --- the forward pass -------------------------------------------------------------------

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """``Q_a(x)`` [B, K] as the matmul sees it, quantised once for all siblings.

        For NVFP4 this is element x block scale, without the static tensor scale.
        """
        return self.shared.get(x, self._quantize_input)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """``Q_a(x)`` [B, K] with all its scales: what else than the matmul may read."""
        operand, scale = self.quantize_input(x), self.input_scale()
        return (operand if scale is None else operand.float() * scale).to(x.dtype)

    def _quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        recipe, backend = self.state.recipe, self.state.backend
        if self.state.matmul.backend is not None:
            decode = partial(self.state.matmul.backend.decode_input, self._encoded(x))
            return quantize_activation(x, lambda _: decode(), use_ste=recipe.use_ste)
        scale = self.input_scale()
        if scale is None:
            return quantize_activation(x, self._fake_quant, use_ste=recipe.use_ste)

        def quantizer(t: torch.Tensor) -> torch.Tensor:
            return backend.fake_quant(
                t, recipe.activation_profile, tensor_scale=scale, apply_tensor_scale=False
            )

        return quantize_activation(x, quantizer, use_ste=recipe.use_ste, slope=1 / scale)

    def _quantizes_rotated(self, x: torch.Tensor) -> bool:
        """Whether the backend rotates ``x`` as it quantises it, which saves passes over memory."""
        state, recipe = self.state, self.state.recipe
        return (
            state.active
            and recipe.quantizes_input
            and recipe.use_ste
            and isinstance(state.backend, RotatingBackend)
            and state.backend.rotates(x, recipe.activation_profile)
        )

    def _quantize_rotated(self, x: torch.Tensor) -> torch.Tensor:
        backend = self.state.backend
        assert isinstance(backend, RotatingBackend)
        return quantize_rotated_input(x, self.state.recipe.activation_profile, backend)

    def _fake_quant(self, x: torch.Tensor) -> torch.Tensor:
        backend, profile = self.state.backend, self.state.recipe.activation_profile
        if self.operand_dtype == x.dtype:
            return backend.fake_quant(x, profile)
        return backend.dequantize(backend.quantize(x, profile), self.operand_dtype)

    def _encoded(self, x: torch.Tensor) -> EncodedInput:
        """The codes of ``x``, once for all siblings (fused mode)."""
        fused = self.state.matmul.backend
        assert fused is not None
        profile = self.state.recipe.activation_profile
        return self.encoded.get(x, lambda t: fused.encode_input(t.detach(), profile))

    def input_scale(self) -> torch.Tensor | None:
        """The input's static tensor scale, or None without one; ValueError if it is not set."""
        scale = self._buffers.get("input_tensor_scale")
        # To look at the value makes the host wait for the device: once for each that is set.
        if scale is not None and scale._version != self._calibrated:
            if torch.isnan(scale):
                raise ValueError(
                    f"{self.path}: profile {self.state.recipe.activation_profile!r} has a static "
                    "tensor scale for activations that was not calibrated; run "
                    "QuantizedModel.calibrate on some prompts first"
                )
            self._calibrated = scale._version
        return scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, recipe = self.state, self.state.recipe
        if torch.is_autocast_enabled(x.device.type):
            self._check_autocast(torch.get_autocast_dtype(x.device.type))
        given = x
        in_one_pass = recipe.rotates and self._quantizes_rotated(x)
        if recipe.rotates and not in_one_pass:
            x = self.rotated.get(x, rotate_input)
        if state.calibrating:
            self.input_amax = max(self.input_amax, self._finite_amax(x))
            return self._full_precision(x)
        self.calls.total[state.phase] += 1
        if not state.active:
            return self._full_precision(x)
        self.calls.quantized[state.phase] += 1
        operand: Callable[[], torch.Tensor]
        if state.matmul.backend is not None:
            encoded = self._encoded(x)
            y = result = self._fused_matmul(x, encoded, state.matmul.backend)
            operand = partial(state.matmul.backend.decode_input, encoded)
        else:
            seen = x
            if in_one_pass:
                seen = self.shared.get(x, self._quantize_rotated)
            elif recipe.quantizes_input:
                seen = self.quantize_input(x)
            y = result = self._matmul(seen)
            operand = partial(torch.Tensor.detach, seen)
        if recipe.quantizes_output:
            y = quantize_activation(
                result,
                lambda t: state.backend.fake_quant(t, recipe.activation_profile),
                use_ste=recipe.use_ste,
            )
        if state.observer is not None:
            state.observer(self, given, operand, result, y)
        return y

    def _check_autocast(self, dtype: torch.dtype) -> None:
        if dtype != self.dtype:
            raise ValueError(
                f"autocast computes in {dtype}, but the layers were prepared in {self.dtype}; load "
                f"the model in {dtype}, or switch autocast off"
            )

    def _finite_amax(self, x: torch.Tensor) -> float:
        amax = x.detach().abs().amax().item()
        if not math.isfinite(amax):
            raise ValueError(f"{self.path}: the calibration fed NaN or Inf")
        return amax

    def _full_precision(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight_full if hasattr(self, "weight_full") else self.weight
        return F.linear(x, weight, self.bias)

    def _matmul(self, operand: torch.Tensor) -> torch.Tensor:
        """The 16-bit matmul, or fp32 for a dual-level profile; result in the layer's dtype."""
        scale = self.result_scale()
        image = self._parameters.get("weight_image")
        if (
            image is not None
            and scale is None
            and operand.dtype == image.dtype == self.dtype
            and not hasattr(image, "ds_id")
        ):
            # PyTorch's own linear keeps no input for a frozen weight either, and costs the host
            # less. Under ZeRO-3 it would keep the gathered weight.
            return F.linear(operand, image, self.bias)
        added = None if scale is not None or self.bias is None else self.bias
        bias = None if added is None else added.to(self.operand_dtype)
        operand = operand.to(self.operand_dtype)
        product = partial(self._product, bias=bias)
        y = _frozen(operand, product, self.weight_operand)
        if scale is not None:
            y = y.float() * scale
            y = y if self.bias is None else y + self.bias.float()
        return y.to(self.dtype)

    def _product(self, operand: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        image = self._parameters.get("weight_image")
        if image is not None:
            return F.linear(operand, image, bias)
        return self.state.backend.linear(operand, self.packed_weight(), bias)

    def _fused_matmul(
        self, x: torch.Tensor, encoded: EncodedInput, backend: FusedBackend
    ) -> torch.Tensor:
        """The device's matmul of codes; straight-through for ``x``."""
        if not self.state.recipe.use_ste:
            x = quantize_activation(x, torch.Tensor.detach, use_ste=False)
        return _frozen(
            x,
            lambda _: backend.fused_linear(encoded, self._prepared_weight(backend), self.bias),
            self.weight_operand,
        )

    @property
    def has_input_gradient(self) -> bool:
        """Whether ``input_gradient`` is this layer's gradient now."""
        state, recipe = self.state, self.state.recipe
        return (
            state.active
            and not recipe.quantizes_output
            and (recipe.use_ste or not recipe.quantizes_input)
            and recipe.lora_input == "full"
            and recipe.lora_output == "full"
        )

    def input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """dx [M, K] of the layer where it quantises, straight-through, from dy [M, N]."""
        weight = self.weight_operand()
        # The tensor scale of the input goes into the result and out of the operand again.
        scale = self._buffers.get("weight_tensor_scale")
        if scale is not None:
            grad = grad.float() * scale
        dx = (grad.to(weight.dtype) @ weight).to(self.dtype)
        if not self.state.recipe.rotates:
            return dx
        backend, profile = self.state.backend, self.state.recipe.activation_profile
        if isinstance(backend, RotatingBackend) and backend.rotates(dx, profile):
            return backend.rotate(dx, INPUT_FACTOR)
        return rotate_blocks(dx, INPUT_FACTOR)

    def _prepared_weight(self, backend: FusedBackend) -> object:
        """The stored codes in the device's layout, made again when they moved.

        Raises ValueError for a weight that the device's layout cannot hold.
        """
        if hasattr(self.weight_packed, "ds_id"):
            # ZeRO-3 frees the gathered parameter after use; what is kept here would keep it alive.
            return self._prepare_weight(backend)
        key = (self.weight_packed.data_ptr(), self.weight_scale.data_ptr())
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = (key, self._prepare_weight(backend))
        return self._prepared[1]

    def _prepare_weight(self, backend: FusedBackend) -> object:
        try:
            resident = self.state.recipe.base_storage == "image"
            return backend.prepare_weight(self.packed_weight(), resident=resident)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; set quant.matmul: auto") from error

    def result_scale(self) -> torch.Tensor | None:
        """fp32 product of the tensor scales of weight and input, or None without any."""
        scales = [
            s
            for name in ("weight_tensor_scale", "input_tensor_scale")
            if (s := self._buffers.get(name)) is not None
        ]
        return torch.stack(scales).prod() if scales else None

    def extra_repr(self) -> str:
        recipe = self.state.recipe
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, injection_point={recipe.injection_point}, "
            f"weight={recipe.weight_profile}, activation={recipe.activation_profile}, "
            f"storage={recipe.base_storage}"
        )
