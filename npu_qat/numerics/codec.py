"""Quantise, dequantise, and both at once.

    fake_quant(x, profile) == dequantize(quantize(x, profile), x.dtype)        for every x

Both go through one pipeline (`_to_grid`), so they cannot drift apart. Shape letters: a tensor
with n numbers along the blocked axis is seen as [R, B, I]: B = block size, R = product of the
dimensions before the axis, times ceil(n / B); I = product of the dimensions after it. Per block:
largest magnitude, scale, quotient, rounding to the E2M1 grid; then multiply and put the sign back.

Cost. A training step calls `fake_quant` hundreds of times, so the pipeline counts passes: each
statement of the common path is one elementwise pass or works on one number a block. On a CPU a
large tensor goes through it in chunks that stay in the cache.

NaN is NaN: its sign and payload bits are not part of the contract. Gradients are not this room's
business: inputs are detached, and nothing here is differentiable (see `layers`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from npu_qat.numerics import e2m1, scales
from npu_qat.numerics.dual_level import level0_quotient
from npu_qat.numerics.packing import pack, unpack
from npu_qat.numerics.profiles import Profile, get_profile
from npu_qat.numerics.scales import BlockScales

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_CHUNK = 1 << 18  # elements; measured: 2^17 and 2^18 are best, 2^15 and 2^20 clearly worse


@dataclass(frozen=True)
class QuantizedTensor:
    """4-bit codes with their block scales.

    Attributes:
        codes: uint8, one E2M1 code (0..15) a byte, the shape of the quantised tensor.
        scales: uint8, one byte a block: the tensor's shape with ceil(n / block) along `axis`.
            E8M0 (exponent + 127) or the bits of an E4M3 number, as the profile says.
        profile: the profile that made it.
        axis: the blocked axis, counted from 0.
        tensor_scale: fp32 scalar of two-level formats, else None.
        level0_scales: fp32, ceil(n / level0_block) along `axis`, of dual-level formats, else None.
    """

    codes: Tensor
    scales: Tensor
    profile: Profile
    axis: int
    tensor_scale: Tensor | None = None
    level0_scales: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that the codes stand for."""
        return self.codes.shape

    @property
    def packed(self) -> Tensor:
        """Two codes a byte along the blocked axis, even index in the low nibble (uint8)."""
        return pack(self.codes, self.axis)

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        scales: Tensor,
        *,
        shape: tuple[int, ...],
        profile: str | Profile,
        axis: int = -1,
        tensor_scale: Tensor | None = None,
        level0_scales: Tensor | None = None,
    ) -> QuantizedTensor:
        """Rebuild a quantised tensor of `shape` from packed codes and scale bytes (both uint8).

        Raises ValueError where shapes or dtypes do not fit the profile.
        """
        profile = get_profile(profile) if isinstance(profile, str) else profile
        axis = _blocked_axis(len(shape), profile, axis)
        wanted = list(shape)
        wanted[axis] = -(-shape[axis] // profile.block_size)
        if scales.dtype != torch.uint8 or list(scales.shape) != wanted:
            raise ValueError(
                f"profile {profile.name!r} needs uint8 scales of shape {tuple(wanted)} for a "
                f"tensor of shape {tuple(shape)} blocked along axis {axis}; got "
                f"{scales.dtype} {tuple(scales.shape)}"
            )
        codes = unpack(packed, shape[axis], axis)
        if codes.shape != tuple(shape):
            raise ValueError(
                f"packed codes of shape {tuple(packed.shape)} do not make a tensor of shape "
                f"{tuple(shape)} packed along axis {axis}"
            )
        if profile.tensor_scale and tensor_scale is None:
            raise ValueError(f"profile {profile.name!r} needs tensor_scale")
        if profile.level0_block and level0_scales is None:
            raise ValueError(f"profile {profile.name!r} needs level0_scales")
        return cls(codes, scales, profile, axis, tensor_scale, level0_scales)


def fake_quant(
    x: Tensor,
    profile: str | Profile,
    axis: int | None = None,
    *,
    tensor_scale: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Round `x` to the numbers that `profile` can store along `axis`.

    Args:
        x: fp32, bf16 or fp16; any rank from 1, any length, contiguous or not. The last block
            along the axis is padded with zeros if it is not full.
        profile: a name from `profiles.PROFILES`, or a `Profile`.
        axis: the blocked axis; default: the last one (or the only one that the profile allows).
        tensor_scale: fp32 scalar for profiles with a tensor scale; default: from `x` itself.
        generator: source of randomness, needed by stochastic rounding and used by nothing else.

    Returns a contiguous tensor of `x`'s shape and dtype, detached. Equal bit for bit to
    `dequantize(quantize(x, ...), x.dtype)`. Raises ValueError for what the profile cannot take.
    """
    profile = get_profile(profile) if isinstance(profile, str) else profile
    if profile.level0_block:  # two multiplications in fp32: no shortcut is worth its code
        q = quantize(x, profile, axis, tensor_scale=tensor_scale, generator=generator)
        return dequantize(q, x.dtype)
    job = _Job.prepare(x, profile, axis, tensor_scale, generator)
    out = torch.empty(job.blocks.shape, dtype=x.dtype, device=x.device)
    with torch.no_grad():
        for x_RBI, out_RBI in _chunks(job.blocks, out):
            v, block = _to_grid(x_RBI, job)
            _put_with_signs_(out_RBI, v.mul_(block.value), x_RBI)
    return _uncut(out, job.shape, job.axis)


def quantize(
    x: Tensor,
    profile: str | Profile,
    axis: int | None = None,
    *,
    tensor_scale: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> QuantizedTensor:
    """Codes and scale bytes of `x` under `profile`; arguments as for `fake_quant`.

    Elements of a block that decodes to NaN have code 0.
    """
    job = _Job.prepare(x, profile, axis, tensor_scale, generator)
    rows, _, inner = job.blocks.shape
    codes = torch.empty(job.blocks.shape, dtype=torch.uint8, device=x.device)
    scale_bytes = torch.empty((rows, 1, inner), dtype=torch.uint8, device=x.device)
    with torch.no_grad():
        for x_RBI, codes_RBI, bytes_R1I in _chunks(job.blocks, codes, scale_bytes):
            v, block = _to_grid(x_RBI, job)
            negative = torch.signbit(x_RBI).logical_and_(~block.value.isnan())
            codes_RBI.copy_(e2m1.codes_from_grid(v).bitwise_or_(negative.to(torch.uint8) << 3))
            bytes_R1I.copy_(scales.scale_bytes(block, job.profile))
    return QuantizedTensor(
        codes=_uncut(codes, job.shape, job.axis),
        scales=job.scales_in_shape(scale_bytes),
        profile=job.profile,
        axis=job.axis,
        tensor_scale=job.tensor_scale,
        level0_scales=job.level0_scales,
    )


def dequantize(
    q: QuantizedTensor, dtype: torch.dtype = torch.float32, *, apply_tensor_scale: bool = True
) -> Tensor:
    """The numbers that `q` stands for: element * scale (* tensor scale) in fp32, cast to `dtype`.

    With `apply_tensor_scale=False` a two-level tensor comes back as element * block scale, which
    is exact in bf16; the caller then applies `q.tensor_scale` to the result of the matmul.
    """
    profile = q.profile
    blocks = _cut(q.codes, q.axis, profile.block_size)
    rows, _, inner = blocks.shape
    value = scales.values_from_bytes(q.scales, profile)
    if q.tensor_scale is not None and apply_tensor_scale:
        value = value * q.tensor_scale
    factors = [value.reshape(rows, 1, inner)]
    if q.level0_scales is not None:
        repeats = profile.level0_block // profile.block_size
        spread = q.level0_scales.repeat_interleave(repeats, -1)[..., : value.shape[-1]]
        factors.append(spread.reshape(rows, 1, inner))
    out = torch.empty(blocks.shape, dtype=dtype, device=blocks.device)
    with torch.no_grad():
        for codes_RBI, out_RBI, *factors_R1I in _chunks(blocks, out, *factors):
            v = e2m1.values_from_codes(codes_RBI)
            for factor in factors_R1I:
                v.mul_(factor)
            out_RBI.copy_(v)
    return _uncut(out, q.shape, q.axis)


@dataclass(frozen=True)
class _Job:
    """One checked call: the blocks of the tensor and all that the pipeline must know."""

    profile: Profile
    axis: int
    shape: torch.Size
    blocks: Tensor  # [R, B, I], contiguous
    tensor_scale: Tensor | None
    rescue: Tensor | None  # power of two that lifts a tiny tensor into fp32's comfortable range
    level0_scales: Tensor | None
    generator: torch.Generator | None

    @classmethod
    def prepare(
        cls,
        x: Tensor,
        profile: str | Profile,
        axis: int | None,
        tensor_scale: Tensor | None,
        generator: torch.Generator | None,
    ) -> _Job:
        """Check the arguments and cut `x` into blocks."""
        profile = get_profile(profile) if isinstance(profile, str) else profile
        if x.dtype not in INPUT_DTYPES:
            raise ValueError(
                f"cannot quantise {x.dtype}: give fp32, bf16 or fp16 (convert the tensor first)"
            )
        axis = _blocked_axis(x.dim(), profile, axis)
        shape, x = x.shape, x.detach()
        if profile.nan == "error" and not torch.isfinite(x).all():
            raise ValueError(
                f"profile {profile.name!r} is for finite tensors, but this one of shape "
                f"{tuple(shape)} holds NaN or Inf; look for the layer that produced them"
            )
        if profile.rounding == "stochastic" and generator is None:
            raise ValueError(
                "stochastic rounding needs generator=torch.Generator(...), so that the result "
                "does not depend on the global random state"
            )
        rescue = level0_scales = None
        if profile.tensor_scale:
            tensor_scale, rescue = _tensor_scale(x, tensor_scale)
        elif tensor_scale is not None:
            raise ValueError(f"profile {profile.name!r} has no tensor scale; leave it out")
        if profile.level0_block:
            x, level0_scales = level0_quotient(x, profile.level0_block)
        blocks = _cut(x, axis, profile.block_size)
        return cls(profile, axis, shape, blocks, tensor_scale, rescue, level0_scales, generator)

    def scales_in_shape(self, scales_R1I: Tensor) -> Tensor:
        """[R, 1, I] to the tensor's shape with one entry a block along the axis."""
        shape = list(self.shape)
        shape[self.axis] = -(-shape[self.axis] // self.profile.block_size)
        return scales_R1I.view(shape)


def _to_grid(x: Tensor, job: _Job) -> tuple[Tensor, BlockScales]:
    """Magnitudes of `x` [R, B, I] on the E2M1 grid (fp32), and the scales of its blocks."""
    profile = job.profile
    rounding = profile.rounding
    power_of_two = profile.scale_format == "e8m0"
    # Ties away from zero: cut fp32 to 16 bits, which crosses no tie; the factor lifts the ties.
    nudged = power_of_two and rounding == "half_away"
    cut = nudged and x.dtype == torch.float32
    if cut and profile.scale_rule in scales.TRUNCATION_SAFE:
        bits = x.view(torch.int32) & (e2m1.SHORT_MASK & 0x7FFFFFFF)
        a = bits.view(torch.float32)
        cut = False
    else:
        a = x.abs().float()
        bits = a.view(torch.int32)
    amax_bits = bits.amax(1, keepdim=True)
    block = scales.block_scales(profile, a, amax_bits, x.dtype, job.tensor_scale, job.rescue)
    if job.rescue is not None:
        a.mul_(job.rescue).clamp_max_(scales.FP32_MAX)
    if cut:
        bits.bitwise_and_(e2m1.SHORT_MASK)
    v = a.div_(block.factor) if block.divides else a.mul_(block.factor)
    if nudged or rounding == "half_even":
        short = power_of_two and (nudged or x.dtype != torch.float32)
        return e2m1.round_to_nearest_(v, short=short), block
    negative = torch.signbit(x)
    if rounding == "toward_minus_inf":
        v = _keep_underflow(v, x, block.factor)
    return e2m1.round_(v, rounding, negative=negative, generator=job.generator), block


def _keep_underflow(v: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Quotients for rounding downwards, where even the tiniest negative number counts.

    For bf16 the op forms the quotient in bf16, so one below 2^-134 is zero there and here. For
    other dtypes the quotient counts as exact: a non-zero one must not underflow to zero.
    """
    if x.dtype == torch.bfloat16:
        return v.to(torch.bfloat16).float()
    return v.masked_fill_((v == 0) & (x != 0) & (factor != 0), 2.0**-126)


def _put_with_signs_(out: Tensor, magnitude: Tensor, x: Tensor) -> None:
    """`magnitude` (fp32) with the signs of `x`, -0 included, into `out`."""
    if x.dtype == torch.float32:  # where copysign is not vectorised
        signs = x.view(torch.int32) & -0x80000000
        torch.bitwise_or(signs, magnitude.view(torch.int32), out=out.view(torch.int32))
    else:
        out.copy_(magnitude).copysign_(x)


def _blocked_axis(rank: int, profile: Profile, axis: int | None) -> int:
    """The blocked axis counted from 0; ValueError if there is none or the profile forbids it."""
    if rank == 0:
        raise ValueError("cannot quantise a 0-dimensional tensor: there is no axis to block")
    forced = profile.forced_axis
    if axis is None:
        axis = -1 if forced is None else forced
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} does not exist in a tensor of {rank} dimension(s)")
    if forced is not None and axis % rank != forced % rank:
        raise ValueError(
            f"profile {profile.name!r} runs its blocks along axis {forced} only, not {axis}"
        )
    return axis % rank


def _tensor_scale(x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The fp32 tensor scale on `x`'s device, and the factor that rescues a tiny tensor, if any.

    ValueError if the given one is not one finite number >= 0. Its value is looked at on a CPU
    only: elsewhere that would make the host wait, so there the factor is always applied.
    """
    if given is None:
        scale = scales.nvfp4_tensor_scale(scales.largest_finite(x))
    else:
        if given.numel() != 1:
            raise ValueError(f"tensor_scale must be one number, not shape {tuple(given.shape)}")
        scale = given.detach().to(device=x.device, dtype=torch.float32).reshape(())
    if scale.device.type == "cpu":
        number = scale.item()
        if not 0 <= number < float("inf"):
            raise ValueError(f"tensor_scale must be finite and not negative, not {number}")
        if number >= scales.TINY_TENSOR_SCALE:
            return scale, None
    return scale, torch.where(scale < scales.TINY_TENSOR_SCALE, scales.RESCUE, 1.0)


def _cut(x: Tensor, axis: int, block_size: int) -> Tensor:
    """`x` as contiguous blocks [R, B, I], the tail zero-padded."""
    tail = -x.shape[axis] % block_size
    if tail:
        padding = list(x.shape)
        padding[axis] = tail
        x = torch.cat((x, x.new_zeros(padding)), dim=axis)
    inner = prod(x.shape[axis + 1 :])
    rows = prod(x.shape[:axis]) * (x.shape[axis] // block_size)
    return x.reshape(rows, block_size, inner)


def _uncut(blocks: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """Inverse of `_cut`: [R, B, I] back to `shape`, padding dropped, contiguous."""
    if blocks.numel() == prod(shape):
        return blocks.view(shape)
    full = blocks.view(*shape[:axis], -1, *shape[axis + 1 :])
    return full.narrow(axis, 0, shape[axis]).contiguous()


def _chunks(blocks: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of tensors [R, ...] along R: cache-sized on a CPU, everything elsewhere."""
    rows, block, inner = blocks.shape
    step = max(1, CPU_CHUNK // max(1, block * inner))
    if step >= rows or blocks.device.type != "cpu":
        yield blocks, *others
        return
    for start in range(0, rows, step):
        yield tuple(t[start : start + step] for t in (blocks, *others))
