"""CPU kernels for torch-npu's MX operators, so that the product's NPU code runs without an NPU.

    library = register()              # keep it alive as long as the operators are called
    torch_npu.npu_dynamic_mx_quant(cpu_tensor, ...)

Two things are asked of these kernels:

* **An independent witness of the numbers.** They are written from the published AscendC kernels
  and operator documents of CANN's ops-nn (read, not run on a device) and share nothing with
  ``npu_qat.numerics``: integer arithmetic on bit patterns here, floating point there. Where both
  give the same bytes, neither has a slip of its own.
* **As strict as the strictest reader of the contract.** The Meta kernels of the wheel let calls
  through that a device refuses or computes wrongly: a bf16 bias, a 3-D input, a scale that is not
  the transposed view its weight is. Each of these is an error here.

Refused, because the product has no use for them: FP8 and E1M2 results, block sizes other than 32,
``dst_type_max`` other than 0, 6 and 7, fp32 input (which needs a newer CANN than the oldest one
supported), smooth scales, offsets, ``y_scale``.

Letters: K reduction, M rows, N columns, B = K / 32 blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

E2M1 = 296  # torch_npu.float4_e2m1fn_x2
E8M0 = 293  # torch_npu.float8_e8m0fnu
BLOCK = 32
NAN_SCALE = 0xFF
ACL_FORMAT_FRACTAL_NZ = 29
LONGEST = 65535  # last dimension of x1, and of x2 as it is stored, in elements

# c10::ScalarType numbers, which is what the operators' integer dtypes below 256 are.
SCALAR_TYPES = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
# Largest exponent of a block: from the pattern of its maximum plus this (dst_type_max -> addend).
ALG2_ADDEND = {0.0: 0x3F, 6.0: 0x3F, 7.0: 0x1F}
HALVES_TO_INDEX = torch.tensor([0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7], dtype=torch.uint8)
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def require(condition: bool, message: str) -> None:
    """Raise what torch-npu raises for a call that it refuses."""
    if not condition:
        raise RuntimeError(message)


# --- quantisation ---------------------------------------------------------------------------------


def npu_dynamic_mx_quant(
    input: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = E2M1,
    block_size: int = BLOCK,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Codes packed along the last dimension and paired scale bytes; both plain uint8."""
    require(input.dtype in (torch.bfloat16, torch.float16), f"input dtype {input.dtype}")
    require(1 <= input.dim() <= 7, f"input must have 1 to 7 dimensions, not {input.dim()}")
    require(-input.dim() <= axis < input.dim(), f"axis {axis} is out of range")
    require(dst_type == E2M1, f"dst_type {dst_type}: give the integer {E2M1}")
    require(block_size == BLOCK, f"block_size {block_size}")
    require(scale_alg in (0, 2), f"scale_alg {scale_alg}: FP4_E2M1 takes 0 and 2")
    require(scale_alg == 2 or dst_type_max == 0, "dst_type_max goes with scale_alg 2")
    require(dst_type_max in ALG2_ADDEND, f"dst_type_max {dst_type_max} is not emulated")
    require(max_low_bound == 0, "max_low_bound does not exist in the oldest supported release")
    require(input.shape[-1] % 2 == 0, "the last dim of input must be divisible by 2")
    codes, scales = quantize_along(input, axis, round_mode, scale_alg, dst_type_max)
    return pack_last(codes), pair(scales, axis)


def npu_dynamic_mx_quant_with_dual_axis(
    input: Tensor,
    *,
    round_mode: str = "rint",
    dst_type: int = E2M1,
    scale_alg: int = 0,
    dst_type_max: float | None = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two independent quantisations: along the last axis and along the one before."""
    rows, columns = (
        npu_dynamic_mx_quant(
            input,
            axis=axis,
            round_mode=round_mode,
            dst_type=dst_type,
            scale_alg=scale_alg,
            dst_type_max=dst_type_max or 0.0,
        )
        for axis in (-1, -2)
    )
    return *rows, *columns


def npu_dynamic_dual_level_mx_quant(
    input: Tensor, *, smooth_scale: Tensor | None = None, round_mode: str = "rint"
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [.., K/2], level-0 fp32 [.., ceil(K/512)], level-1 bytes [.., ceil(K/64), 2]."""
    require(input.dtype in (torch.bfloat16, torch.float16), f"input dtype {input.dtype}")
    require(smooth_scale is None, "smooth_scale is not emulated")
    require(input.shape[-1] % 2 == 0, "the last dim of input must be divisible by 2")
    level0 = level0_scales(input)
    divisor = level0.repeat_interleave(512, -1)[..., : input.shape[-1]]
    quotient = (input.float() / divisor).to(input.dtype)
    quotient = torch.where(input == 0, input, quotient)
    codes, scales = quantize_along(quotient, -1, round_mode, 0, 0.0)
    return pack_last(codes), level0, pair(scales, -1)


def level0_scales(x: Tensor) -> Tensor:
    """fp32(largest finite magnitude of 512) * fp32(1/6); a subnormal result becomes 0."""
    magnitude = x.float().abs()
    finite = torch.where(torch.isfinite(magnitude), magnitude, 0.0)
    groups = torch.nn.functional.pad(finite, (0, -x.shape[-1] % 512)).unflatten(-1, (-1, 512))
    sixth = torch.tensor(0x3E2AAAAB, dtype=torch.int32).view(torch.float32)
    scale = groups.amax(-1) * sixth
    normal = scale.view(torch.int32) >= 0x00800000
    return torch.where(normal, scale, 0.0)


def quantize_along(
    x: Tensor, axis: int, round_mode: str, scale_alg: int | None, dst_type_max: float
) -> tuple[Tensor, Tensor]:
    """E2M1 codes in the shape of ``x``, and one scale byte a block along ``axis``."""
    last = x.movedim(axis, -1)
    length = last.shape[-1]
    padded = torch.nn.functional.pad(last, (0, -length % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK))
    # What the scale sees of fp16 is its bf16 form: cut off for alg 0, to nearest even for alg 2.
    patterns = blocks.float() if scale_alg == 0 else blocks.to(torch.bfloat16).float()
    largest = (patterns.view(torch.int32) >> 16 & 0x7FFF).amax(-1, keepdim=True)
    scale = scale_bytes(largest, scale_alg, dst_type_max)
    codes = round_elements(scaled(blocks, scale), round_mode)
    codes = torch.where(scale == NAN_SCALE, 0, codes).to(torch.uint8)
    codes = codes.flatten(-2)[..., :length]
    return codes.movedim(-1, axis), scale.squeeze(-1).to(torch.uint8).movedim(-1, axis)


def scale_bytes(largest: Tensor, scale_alg: int | None, dst_type_max: float) -> Tensor:
    """E8M0 bytes (int32) from the bf16 patterns of the blocks' largest magnitudes.

    The exponent minus 2, since E2M1's largest binade is [4, 8). alg 2 lets an addend carry into
    the exponent where the maximum would be clipped: 0x3F beyond 1.5 * 2^e, 0x1F beyond 1.75 * 2^e.
    Exponents of 2 and below leave no scale: byte 0, and the block's elements become zeros.
    """
    addend = ALG2_ADDEND[dst_type_max] if scale_alg == 2 else 0
    exponent = (largest + addend) >> 7
    scale = torch.where(exponent <= 2, 0, exponent - 2)
    return torch.where(largest >> 7 == 0xFF, NAN_SCALE, scale)


def scaled(blocks: Tensor, scale: Tensor) -> Tensor:
    """Quotients, fp32: for bf16 as the kernel multiplies, in bf16; for fp16 in fp32.

    The reciprocal 2^(127 - scale) has the exponent field 254 - scale. Byte 0 has the reciprocal 0.
    """
    reciprocal = torch.where(scale == 0, 0, (254 - scale) << 23).to(torch.int32).view(torch.float32)
    if blocks.dtype == torch.bfloat16:
        return (blocks * reciprocal.to(torch.bfloat16)).float()
    return blocks.float() * reciprocal


def round_elements(v: Tensor, round_mode: str) -> Tensor:
    """E2M1 codes (uint8) of fp32 numbers: a grid of step 1/2 below 2, 1 below 4, 2 above."""
    a = torch.nan_to_num(v.abs(), nan=0.0)
    negative = torch.signbit(v)
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    q = a / step
    if round_mode == "rint":
        q = q.round()
    elif round_mode == "round":
        q = (q + 0.5).floor()
    elif round_mode == "floor":  # towards minus infinity: magnitudes of negative numbers grow
        q = torch.where(negative, q.ceil(), q.floor())
    else:
        raise RuntimeError(f"round_mode {round_mode!r}: FP4 takes rint, floor and round")
    halves = (2 * q * step).clamp(max=12).to(torch.int64)
    return HALVES_TO_INDEX[halves] | (negative.to(torch.uint8) << 3)


def pack_last(codes: Tensor) -> Tensor:
    """Two codes a byte along the last dimension, the even element in the low nibble."""
    return fresh(codes[..., 0::2] | (codes[..., 1::2] << 4))


def unpack_last(packed: Tensor) -> Tensor:
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 0x0F, packed >> 4), -1).flatten(-2)


def pair(scales: Tensor, axis: int) -> Tensor:
    """Scale bytes as the operators return them: pairs along ``axis``, in a new last dimension."""
    last = scales.movedim(axis, -1)
    last = torch.nn.functional.pad(last, (0, last.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return fresh(last.movedim(-2, axis - 1 if axis < 0 else axis))


def fresh(x: Tensor) -> Tensor:
    """A copy with the strides of a new tensor, also along dimensions of size 1."""
    return x.clone(memory_format=torch.contiguous_format)


# --- dequantisation and products ------------------------------------------------------------------


def npu_anti_mx_quant(
    x: Tensor,
    mxscale: Tensor,
    *,
    axis: int | None = -1,
    dst_type: int | None = 15,
    src_type: int | None = 292,
) -> Tensor:
    """element * scale in the dtype with ScalarType number ``dst_type``; ``axis``: the blocked."""
    require(src_type == E2M1, f"src_type {src_type}: give {E2M1} for FP4 (the default is FP8)")
    require(x.dtype == torch.uint8 and mxscale.dtype == torch.uint8, "codes and scales are uint8")
    require(dst_type in SCALAR_TYPES, f"dst_type {dst_type}")
    require(axis is not None and -x.dim() <= axis < x.dim(), f"axis {axis}")
    return decode(unpack_last(x), mxscale, axis).to(SCALAR_TYPES[dst_type])


def decode(codes: Tensor, pairs: Tensor, axis: int) -> Tensor:
    """fp32 values of codes [..] under paired scales; a NaN scale makes its block NaN."""
    axis %= codes.dim()
    blocks = -(-codes.shape[axis] // BLOCK)
    wanted = [*codes.shape, 2]
    wanted[axis] = -(-blocks // 2)
    require(
        list(pairs.shape) == wanted, f"scales must have shape {wanted}, not {list(pairs.shape)}"
    )
    flat = pairs.movedim(axis, -2).flatten(-2)
    require(bool((flat[..., blocks:] == 0).all()), "the scale beside an odd last block must be 0")
    exponent = flat.to(torch.float64) - 127
    factor = torch.where(flat == NAN_SCALE, torch.nan, torch.exp2(exponent))
    spread = factor[..., :blocks].repeat_interleave(BLOCK, -1)[..., : codes.shape[axis]]
    sign = torch.where(codes >= 8, -1.0, 1.0)
    values = VALUES[(codes & 7).long()] * sign
    return (values * spread.movedim(-1, axis)).float()


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """MXFP4 x MXFP4 [M, N]: fp32 sum of exact products, + fp32 bias, one cast.

    ``x1`` [M, K/2] with ``pertoken_scale`` [M, ceil(K/64), 2]. ``x2`` either the transposed *view*
    [K/2, N] of a weight [N, K/2], then ``scale`` is the transposed view [ceil(K/64), N, 2] of
    [N, ceil(K/64), 2]; or a weight [K, N/2] blocked along K as it is, with its scales as they are.
    Which of the two it is can be told by the strides alone.
    """
    dtypes = (x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype)
    require(dtypes == (E2M1, E2M1, E8M0, E8M0), f"x1, x2, pertoken_scale, scale dtypes {dtypes}")
    require(group_sizes == [1, 1, BLOCK], f"group_sizes must be [1, 1, {BLOCK}], not {group_sizes}")
    require(output_dtype in SCALAR_TYPES, f"output_dtype {output_dtype} (left out it is int8)")
    require(offset is None and y_scale is None, "offset and y_scale do not belong to MX")
    require(pertoken_scale is not None, "pertoken_scale is missing")
    tensors = (x1, x2, scale, pertoken_scale)
    require(all(t.dtype == torch.uint8 for t in tensors), "codes and scales are plain uint8")
    require(x1.dim() == 2 and x2.dim() == 2, "x1Scale should be 3 but was 4: flatten x to 2-D")
    require(x1.is_contiguous(), "x1 must be contiguous")
    require(2 < 2 * x1.shape[1] <= LONGEST, f"K must be greater than 2 and at most {LONGEST}")
    left = decode(unpack_last(x1), pertoken_scale, -1)
    right = matmul_weight(x2, scale, x1.shape[1])
    return finish(multiply(left, right), bias, output_dtype)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """fp32 [M, N] of fp32 [M, K] and [K, N], in whatever order this machine sums."""
    return left @ right


def matmul_weight(x2: Tensor, scale: Tensor, packed_k: int) -> Tensor:
    """fp32 [K, N] of a weight in either of its two forms."""
    same_k = "k dim of x1 and x2 need be same"
    if x2.t().is_contiguous() and x2.shape[0] == packed_k:
        require(scale.dim() == 3, f"scale must have 3 dimensions, not {scale.dim()}")
        require(
            scale.transpose(0, 1).is_contiguous(),
            "x2 is a transposed view, so scale must be one too (not made contiguous)",
        )
        return decode(unpack_last(x2.t()), scale.transpose(0, 1), -1).t()
    require(x2.is_contiguous(), "x2 is neither contiguous nor the transposed view of a weight")
    require(x2.shape[0] == 2 * packed_k, same_k)
    # Of a transposed weight the last dimension is K: aclnnQuantMatmulV5 counts before the view.
    require(2 * x2.shape[1] <= LONGEST, f"N of an untransposed weight must be at most {LONGEST}")
    require(scale.is_contiguous(), "scale must lie as x2 does")
    return decode(unpack_last(x2), scale, 0)


def npu_dual_level_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    *,
    bias: Tensor | None = None,
    output_dtype: int = 15,
) -> Tensor:
    """Dual-level MXFP4 [M, N]: per 512 of K, an fp32 partial sum times both level-0 scales.

    ``x2`` [N, K/2] int8 in FRACTAL_NZ; ``x2_level0_scale`` transposed, [ceil(K/512), N].
    """
    require(x1.dim() == 2 and x2.dim() == 2, "two dimensions only")
    require(x2.dtype == torch.int8, "x2 must be viewed as int8 before it is cast to FRACTAL_NZ")
    require(output_dtype in (5, 15), f"output_dtype {output_dtype}")
    require(x1.shape[1] == x2.shape[1], "k dim of x1 and x2 need be same")
    groups = -(-2 * x1.shape[1] // 512)
    want0 = ((x1.shape[0], groups), (groups, x2.shape[0]))
    have0 = (tuple(x1_level0_scale.shape), tuple(x2_level0_scale.shape))
    require(have0 == want0, f"level-0 scales must have shapes {want0}, not {have0}")
    level0 = (x1_level0_scale, x2_level0_scale)
    require(all(s.dtype == torch.float32 for s in level0), "level-0 scales are fp32")
    left = decode(unpack_last(x1), x1_level1_scale, -1)
    right = decode(unpack_last(from_fractal_nz(x2)), x2_level1_scale, -1)
    total = torch.zeros(x1.shape[0], x2.shape[0])
    for g, (a, b) in enumerate(zip(left.split(512, 1), right.split(512, 1), strict=True)):
        total += (a @ b.t()) * (x1_level0_scale[:, g, None] * x2_level0_scale[g])
    return finish(total, bias, output_dtype)


def finish(total: Tensor, bias: Tensor | None, output_dtype: int | None) -> Tensor:
    """+ bias, and the one cast. The operator document allows an fp32 bias alone."""
    if bias is not None:
        require(bias.dtype == torch.float32, f"bias must be float32, not {bias.dtype}")
        require(bias.shape == total.shape[-1:], f"bias shape {tuple(bias.shape)}")
        total = total + bias
    return total.to(SCALAR_TYPES[output_dtype or 0])


def npu_format_cast(
    self: Tensor,
    acl_format: int,
    *,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> Tensor:
    """FRACTAL_NZ of an int8 matrix: tiles of 16 x 32 bytes, column of tiles by column of tiles.

    As on a device, the shape stays and the storage changes: it is padded to whole tiles, and its
    bytes are moved. So a matmul that is given a matrix in the wrong format computes wrong numbers.
    """
    require(acl_format == ACL_FORMAT_FRACTAL_NZ, f"acl_format {acl_format}")
    require(self.dtype == torch.int8 and self.dim() == 2, "an int8 matrix is expected")
    rows, columns = self.shape
    padded = torch.nn.functional.pad(self, (0, -columns % 32, 0, -rows % 16))
    tiles = padded.unflatten(1, (-1, 32)).unflatten(0, (-1, 16))  # [N/16, 16, K/32, 32]
    stored = tiles.permute(2, 0, 1, 3).flatten()
    return stored.as_strided((rows, columns), (columns, 1))


def from_fractal_nz(x: Tensor) -> Tensor:
    """Inverse of ``npu_format_cast``, from the storage."""
    rows, columns = x.shape
    tiles = (-(-columns // 32), -(-rows // 16), 16, 32)
    size = x.untyped_storage().nbytes()
    require(size == math.prod(tiles), f"x2 is not in FRACTAL_NZ: {size} bytes, tiles {tiles}")
    stored = x.as_strided((size,), (1,), 0).reshape(tiles)
    return stored.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)[:rows, :columns]


KERNELS: dict[str, Callable[..., object]] = {
    kernel.__name__: kernel
    for kernel in (
        npu_dynamic_mx_quant,
        npu_dynamic_mx_quant_with_dual_axis,
        npu_dynamic_dual_level_mx_quant,
        npu_anti_mx_quant,
        npu_quant_matmul,
        npu_dual_level_quant_matmul,
        npu_format_cast,
    )
}


def register(names: Iterable[str] = tuple(KERNELS)) -> torch.library.Library:
    """Register CPU kernels for ``torch.ops.npu``; needs ``import torch_npu`` before.

    The registration ends with the life of the library that is returned.
    """
    library = torch.library.Library("npu", "IMPL", "CPU")
    for name in names:
        library.impl(name, KERNELS[name])
    return library
