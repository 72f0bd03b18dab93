"""The packed core: a 16-bit checkpoint becomes the very bytes that training computed with.

Both formats that can be written hold the same numbers under different names, so the numbers are
made once, here, and a writer only renames them. Training freezes ``Q(W)`` when the model is
prepared and never changes it; the run's recipe and ``numerics.quantize`` give the same codes and
scales again, from the same 16-bit weights and with the same tensor scales. A test compares them
with what ``QuantLinear`` holds, bit for bit.

Memory: linears that share a tensor scale (q, k, v; gate, up) are read together, everything else
one tensor at a time; nothing is kept. That is about one decoder layer for a model of any size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from npu_qat.config import Recipe
from npu_qat.config.paths import layer_index
from npu_qat.deploy.checkpoint import PIECE, Checkpoint
from npu_qat.layers.plan import PlannedLinear, plan_linears, sibling_groups
from npu_qat.numerics import QuantizedTensor, dequantize, nvfp4_tensor_scale, quantize
from npu_qat.numerics.profiles import Profile, get_profile

if TYPE_CHECKING:
    from npu_qat.deploy.adapter import Adapter

Value = QuantizedTensor | torch.Tensor
# A calibrated static scale of a linear's input travels as an entry of its own (NVFP4).
INPUT_SCALE = "input_tensor_scale"
# Sums of squares differ in the last digits between devices and thread counts.
ERROR_TOLERANCE = 1e-5


@dataclass(frozen=True)
class PackedCore:
    """The tensors of a quantised model, made one at a time from a checkpoint.

    Attributes:
        checkpoint: the 16-bit source.
        recipe: of the run, or for post-training quantisation.
        merge: an adapter that is added to the 16-bit weights before they are quantised, or None.
        input_scales: linear -> calibrated fp32 tensor scale of its input, for activation profiles
            with one (NVFP4).
        trained_errors: linear -> ||W - Q(W)|| / ||W|| as the audit of a run without a fingerprint
            measured it; where it is given, ``entries`` raises ValueError if the checkpoint's
            weights have another one.
        plan: what becomes of each linear.
        survival: what quantisation left of a merged adapter, by linear; filled by ``entries``.

    Raises:
        ValueError: no serving stack reads the result of the recipe (``docs/deploy.md``).
    """

    checkpoint: Checkpoint
    recipe: Recipe
    merge: Adapter | None = None
    input_scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    trained_errors: Mapping[str, float] = field(default_factory=dict)
    plan: tuple[PlannedLinear, ...] = field(init=False)
    survival: dict[str, Survival] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        refuse_recipe(self.recipe)
        plan = tuple(plan_linears(self.checkpoint.model, self.recipe))
        object.__setattr__(self, "plan", plan)
        refuse_plan(plan, self.profile)
        if self.merge is not None:
            self.merge.check({p.path: (p.out_features, p.in_features) for p in plan})

    @property
    def profile(self) -> Profile:
        """The weights' numerics profile."""
        return get_profile(self.recipe.weight_profile)

    @property
    def quantized(self) -> list[str]:
        """Paths of the quantised linears, in module order."""
        return [p.path for p in self.plan if p.quantized]

    def entries(self) -> Iterator[tuple[str, Value]]:
        """(tensor name, value) of the whole model, in module order.

        The weight of a quantised linear is a ``QuantizedTensor`` [N, K] blocked along K; all else
        is a tensor in the run's 16-bit dtype, but for input scales, which are fp32 scalars.
        """
        return self._walk(self.checkpoint.read, self._quantize_group)

    def outline(self) -> Iterator[tuple[str, Value]]:
        """The same names, shapes and dtypes as ``entries`` on the meta device, without reading."""
        return self._walk(self._empty, self._outline_group)

    def _walk(
        self,
        read: Callable[[Iterable[str]], dict[str, torch.Tensor]],
        quantize_group: Callable[[dict[str, torch.Tensor]], dict[str, QuantizedTensor]],
    ) -> Iterator[tuple[str, Value]]:
        group_of = {g[0]: g for g in sibling_groups(self.quantized)}
        linears = {p.path for p in self.plan if p.quantized}
        for name in self.checkpoint.names:
            path, _, kind = name.rpartition(".")
            if kind != "weight" or path not in linears:
                yield name, self._merged(read([name]))[name]
                continue
            # A group is made when its first member comes, in one go; the others are passed by.
            if path not in group_of:
                continue
            for member in group_of[path]:
                if member in self.input_scales:
                    yield f"{member}.{INPUT_SCALE}", self.input_scales[member].reshape(())
            yield from quantize_group(read(f"{m}.weight" for m in group_of[path])).items()

    def _merged(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.merge is None:
            return tensors
        return {n: self.merge.added_to(n.removesuffix(".weight"), t) for n, t in tensors.items()}

    def _quantize_group(self, weights: dict[str, torch.Tensor]) -> dict[str, QuantizedTensor]:
        base = _quantize_together(weights, self.profile)
        for name, q in base.items():
            self._check_trained(name.removesuffix(".weight"), weights[name], q)
        if self.merge is None:
            return base
        packed = _quantize_together(self._merged(weights), self.profile)
        for name, q in packed.items():
            path = name.removesuffix(".weight")
            if path in self.merge.paths:
                change = self.merge.delta(path)
                self.survival[path] = _survival(weights[name], change, base[name], q)
        return packed

    def _check_trained(self, path: str, weight: torch.Tensor, q: QuantizedTensor) -> None:
        if path not in self.trained_errors:
            return
        expected = self.trained_errors[path]
        error = (weight.float() - dequantize(q, weight.dtype).float()).norm()
        found = float(error / weight.float().norm().clamp_min(1e-30))
        if abs(found - expected) > ERROR_TOLERANCE * max(found, expected):
            raise ValueError(
                f"{path}: rounding to 4 bits changes this checkpoint's weight by {found:.6f} of "
                f"its norm, but in the run it was {expected:.6f}; {self.checkpoint.folder} is not "
                "the model that was trained. Restore it, or export it without the run (--model)"
            )

    def _empty(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        source = self.checkpoint
        return {n: torch.empty(source.shapes[n], dtype=source.dtype, device="meta") for n in names}

    def _outline_group(self, weights: dict[str, torch.Tensor]) -> dict[str, QuantizedTensor]:
        scale = torch.empty((), device="meta") if self.profile.scale_format == "e4m3" else None
        return {
            name: QuantizedTensor(
                codes=torch.empty(w.shape, dtype=torch.uint8, device="meta"),
                scales=torch.empty(
                    (w.shape[0], -(-w.shape[1] // self.profile.block_size)),
                    dtype=torch.uint8,
                    device="meta",
                ),
                profile=self.profile,
                axis=1,
                tensor_scale=scale,
            )
            for name, w in weights.items()
        }


def _quantize_together(
    weights: Mapping[str, torch.Tensor], profile: Profile
) -> dict[str, QuantizedTensor]:
    """Quantise siblings as ``prepare_model`` does: one tensor scale for all of them."""
    scale = None
    if profile.tensor_scale:
        amax = torch.stack([w.abs().amax().float() for w in weights.values()]).amax()
        scale = nvfp4_tensor_scale(amax)
    packed = {n: quantize(w, profile, -1, tensor_scale=scale) for n, w in weights.items()}
    if profile.scale_format == "e4m3" and scale is None:
        # The file format has a tensor scale; a profile without one means 1.
        packed = {n: replace(q, tensor_scale=torch.ones(())) for n, q in packed.items()}
    return packed


# --- what becomes of a merged adapter ---------------------------------------------------------


@dataclass(frozen=True)
class Survival:
    """What quantisation left of a merged update ``D = s B A`` in one linear.

    With ``E = Q(W + D) - Q(W)``, the change that the served weights really see:

        kept   = <E, D> / <D, D>            1: all of D is there on average; 0: nothing
        noise  = ||E - kept D|| / ||D||     what came with it, as a multiple of the adapter
        size   = ||D|| / ||W||

    An update far below the grid's step is kept on average, by flipping a few codes by a whole
    step each, which is why the noise grows as the update shrinks.

    Attributes:
        dd, ed, ee, ww: the sums of squares and products behind the ratios, so that they can be
            added over linears.
    """

    dd: float
    ed: float
    ee: float
    ww: float

    @property
    def kept(self) -> float:
        return self.ed / self.dd if self.dd else 0.0

    @property
    def noise(self) -> float:
        rest = self.ee - self.ed * self.kept
        return (max(rest, 0.0) / self.dd) ** 0.5 if self.dd else 0.0

    @property
    def size(self) -> float:
        return (self.dd / self.ww) ** 0.5 if self.ww else 0.0

    def __add__(self, other: Survival) -> Survival:
        return Survival(
            self.dd + other.dd, self.ed + other.ed, self.ee + other.ee, self.ww + other.ww
        )

    def as_dict(self) -> dict[str, float]:
        return {"kept": self.kept, "noise": self.noise, "size": self.size}


def _survival(
    weight: torch.Tensor, change: torch.Tensor, before: QuantizedTensor, after: QuantizedTensor
) -> Survival:
    effect = dequantize(after) - dequantize(before)
    return Survival(
        dd=_product(change, change),
        ed=_product(effect, change),
        ee=_product(effect, effect),
        ww=_product(weight.float(), weight.float()),
    )


def _product(a: torch.Tensor, b: torch.Tensor) -> float:
    pieces = zip(a.reshape(-1).split(PIECE), b.reshape(-1).split(PIECE), strict=True)
    return sum(float(x.double() @ y.double()) for x, y in pieces)


# --- the base's name --------------------------------------------------------------------------


class Fingerprint:
    """SHA-256 over all that a base computes with, the same for every format and sharding.

    Each tensor gets a digest: of packed codes, scale bytes and the divisor of a tensor scale, or
    of a float tensor as fp32, which 16-bit numbers become without loss. The fingerprint is the
    digest of the sorted lines ``name digest``.
    """

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, value: Value) -> None:
        """Take in one entry of a core."""
        digest = hashlib.sha256(repr(tuple(value.shape)).encode())
        if isinstance(value, QuantizedTensor):
            digest.update(raw_bytes(value.packed))
            digest.update(raw_bytes(value.scales))
            if value.tensor_scale is not None:
                digest.update(raw_bytes(divisor(value.tensor_scale)))
        else:
            value = divisor(value) if name.endswith(f".{INPUT_SCALE}") else value
            for piece in value.reshape(-1).split(PIECE):
                digest.update(raw_bytes(piece.float()))
        self._lines[name] = f"{name} {digest.hexdigest()}\n"

    def hexdigest(self, *, input_scales: bool = True) -> str:
        """64 hexadecimal digits; with ``input_scales=False`` without calibrated input scales, which
        only some formats store."""
        lines = [
            line
            for name, line in self._lines.items()
            if input_scales or not name.endswith(f".{INPUT_SCALE}")
        ]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def fingerprint_of(core: PackedCore) -> Fingerprint:
    """The fingerprint of ``core``, tensor by tensor."""
    fingerprint = Fingerprint()
    for name, value in core.entries():
        fingerprint.add(name, value)
    return fingerprint


def divisor(tensor_scale: torch.Tensor) -> torch.Tensor:
    """The fp32 number [1] to divide by, as files store it, instead of the one to multiply with.

    The reciprocal of a reciprocal's reciprocal is the first one again (a test tries every fp32
    mantissa), so that a value read back from a file gives the same divisor.
    """
    return tensor_scale.float().reciprocal().reshape(1)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, row-major, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


# --- what no stack serves ---------------------------------------------------------------------


def refuse_recipe(recipe: Recipe) -> None:
    """Raise ValueError if no serving stack reads what ``recipe`` makes."""
    if not recipe.quantizes_weight:
        raise ValueError(
            f"quant.injection_point {recipe.injection_point!r} leaves the weights in 16 bits: "
            "there is nothing to export; serve the 16-bit model with the adapter as it is"
        )
    if recipe.block_axis != "row":
        raise ValueError(
            "quant.block_axis: column cannot be deployed: hardware needs the blocks of a weight "
            "along 'in', the axis that the matmul sums over. Train with block_axis: row"
        )
    if recipe.rotates:
        raise ValueError(
            f"quant.rotation: {recipe.rotation} is not servable by stock vllm-ascend, which does "
            "not rotate the inputs of a linear; train with rotation: none to export"
        )
    profile = get_profile(recipe.weight_profile)
    if profile.level0_block or profile.scale_format == "e4m3_480":
        raise ValueError(
            f"quant.weight_profile {profile.name!r} has scales that no checkpoint format holds; "
            "train with 'ascend950' (Ascend), 'compressed-tensors' or 'nvfp4' (GPU)"
        )


def refuse_plan(plan: Iterable[PlannedLinear], profile: Profile) -> None:
    """Raise ValueError if no serving stack reads these linears in weight profile ``profile``."""
    linears = list(plan)
    for p in linears:
        if p.quantized and layer_index(p.path) is None:
            raise ValueError(
                f"{p.path} is quantised, but serving engines keep linears outside of the decoder "
                f"layers in 16 bits; add {p.path!r} to quant.exclude"
            )
        if p.quantized and p.in_features % profile.block_size:
            raise ValueError(
                f"{p.path} has {p.in_features} inputs, not a multiple of the block of "
                f"{profile.block_size}; no checkpoint format holds a partial block. Add it to "
                "quant.exclude"
            )
    quantized = {p.path: p.quantized for p in linears}
    for group in sibling_groups(quantized):
        if len({quantized[path] for path in group}) > 1:
            left = [path for path in group if not quantized[path]]
            raise ValueError(
                f"{', '.join(left)} in 16 bits and the rest of {', '.join(group)} in 4: serving "
                "engines fuse them into one matmul. Exclude all of them or none"
            )
