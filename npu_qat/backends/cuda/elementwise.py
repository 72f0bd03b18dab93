"""Fake-quantise, quantise and pack, unpack and dequantise: from tensors to kernel launches."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from npu_qat.backends.cuda import kernels
from npu_qat.backends.cuda.launch import INT32_LIMIT, CachedLaunch, interpreted, launch
from npu_qat.backends.cuda.tiles import GIVEN_RULES, Numerics, numerics_of
from npu_qat.numerics import scales
from npu_qat.numerics.profiles import Profile

# Elements of a tile (fake-quant; codes) and warps of a program. Of 18 settings that were measured
# for fake-quant on an H100, this one is within 1 % of the best at every shape.
TILE_ELEMENTS, CODES_ELEMENTS, WARPS = 4096, 2048, 8
# Blocks that a program unpacks, and its warps.
UNPACK_TILE, UNPACK_WARPS = 128, 4

_unpacks: dict[int, CachedLaunch] = {}
_rotations: dict[tuple[torch.dtype, int, float, bool], CachedLaunch] = {}
_flat_launches: dict[tuple[str, torch.dtype, int, bool, float], CachedLaunch] = {}
_flat_decodes: dict[tuple[str, torch.dtype, int, bool, bool], CachedLaunch] = {}


def fake_quant(
    x: Tensor,
    profile: Profile,
    axis: int,
    tensor_scale: Tensor | None = None,
    apply_tensor_scale: bool = True,
    rotation: float = 0.0,
) -> Tensor:
    """``numerics.fake_quant`` of a checked ``x`` along ``axis`` >= 0: contiguous, shape of ``x``.

    With a ``rotation`` (last axis, a multiple of 32) of ``layers.rotation.rotate_blocks`` by that
    factor instead.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    if profile.level0_block:
        _dual_level(x, profile, out=out)
        return out
    if (
        axis == x.dim() - 1
        and x.shape[-1] % profile.block_size == 0
        and x.is_contiguous()
        and profile.scale_rule not in GIVEN_RULES
        and x.numel() < INT32_LIMIT
        and x.data_ptr() % 16 == 0
    ):
        _fake_quant_flat(x, out, profile, tensor_scale, apply_tensor_scale, rotation)
        return out
    numerics = numerics_of(profile)
    view = BlockedView(x, axis, numerics.block, TILE_ELEMENTS)
    args, constants = _arguments(view, profile, numerics, tensor_scale)
    launch(
        kernels.fake_quant_kernel,
        view.grid,
        (view.x, out, *args),
        **view.constants,
        APPLY_TENSOR_SCALE=apply_tensor_scale,
        ROTATE=rotation,
        **constants,
        num_warps=WARPS,
    )
    return out


def _fake_quant_flat(
    x: Tensor,
    out: Tensor,
    profile: Profile,
    tensor_scale: Tensor | None,
    apply: bool,
    rotation: float,
) -> None:
    device = x.device.index or 0
    # The name stands for the profile: hashing all its fields would take longer than the launch.
    key = (profile.name, x.dtype, device, apply, rotation)
    cached = _flat_launches.get(key)
    tile = TILE_ELEMENTS // profile.block_size
    if cached is None:
        cached = _flat_launches[key] = CachedLaunch(
            kernels.fake_quant_kernel,
            {"MODE": "flat", "TILE": tile, "APPLY_TENSOR_SCALE": apply, "ROTATE": rotation}
            | constants_of(numerics_of(profile)),
            num_warps=WARPS,
        )
    blocks = x.numel() // profile.block_size
    scale = tensor_scale if profile.tensor_scale else None
    cached((-(-blocks // tile), 1, 1), (x, out, None, scale, blocks, 1, 1, 1, 1, 1), device)


def rotate(x: Tensor, factor: float) -> Tensor:
    """``layers.rotation.rotate_blocks`` of ``x`` [.., K], K a multiple of 32: contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    device, wide = x.device.index or 0, x.data_ptr() % 16 == 0
    key = (x.dtype, device, factor, wide)
    cached = _rotations.get(key)
    tile = TILE_ELEMENTS // 32
    if cached is None:
        constants = {"FACTOR": factor, "TILE": tile}
        cached = _rotations[key] = CachedLaunch(
            kernels.rotate_kernel, constants, cached=wide, num_warps=WARPS
        )
    blocks = x.numel() // 32
    cached((-(-blocks // tile), 1, 1), (x, out, blocks), device)
    return out


def quantize(
    x: Tensor,
    profile: Profile,
    axis: int,
    tensor_scale: Tensor | None = None,
    *,
    pack: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale bytes, level-0 scales or None) of a checked ``x`` along ``axis`` >= 0.

    ``codes``: uint8, one code a byte in the shape of ``x``, or with ``pack`` two along ``axis``.
    """
    numerics = numerics_of(profile)
    n = x.shape[axis]
    shapes = []
    for length in ((n + 1) // 2 if pack else n, -(-n // numerics.block)):
        shapes.append([*x.shape[:axis], length, *x.shape[axis + 1 :]])
    codes, scale_bytes = (torch.empty(s, dtype=torch.uint8, device=x.device) for s in shapes)
    level0 = None
    if profile.level0_block:
        groups = [*x.shape[:-1], -(-n // profile.level0_block)]
        level0 = torch.empty(groups, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return codes, scale_bytes, level0
    if level0 is not None:
        _dual_level(x, profile, codes=codes, scale_bytes=scale_bytes, level0=level0, pack=pack)
        return codes, scale_bytes, level0
    view = BlockedView(x, axis, numerics.block)
    args, constants = _arguments(view, profile, numerics, tensor_scale)
    launch(
        kernels.quantize_kernel,
        view.grid,
        (view.x, codes, scale_bytes, *args),
        **view.constants,
        PACK=pack,
        E4M3_480=numerics.e4m3_480,
        **constants,
        num_warps=WARPS,
    )
    return codes, scale_bytes, None


def dequantize(
    codes: Tensor,
    scale_bytes: Tensor,
    shape: tuple[int, ...],
    profile: Profile,
    axis: int,
    dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
    level0_scales: Tensor | None = None,
    *,
    packed: bool,
) -> Tensor:
    """``numerics.dequantize`` from codes of either form; a tensor scale is applied if given."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    codes, scale_bytes = codes.contiguous(), scale_bytes.contiguous()
    flat = (
        axis == len(shape) - 1
        and shape[-1] % profile.block_size == 0
        and level0_scales is None  # whose groups end with a row
        and out.numel() < INT32_LIMIT
        and codes.data_ptr() % 16 == 0
        and scale_bytes.data_ptr() % 16 == 0
    )
    args = (codes, scale_bytes, tensor_scale, level0_scales, out)
    if flat:
        table = packed and dtype == torch.bfloat16 and not interpreted()
        if table and profile.block_size == 32 and numerics_of(profile).e8m0:
            _unpack(codes, scale_bytes, out)
        else:
            _dequantize_flat(args, profile, packed)
        return out
    view = BlockedView(out, axis, profile.block_size)
    view.flat = view.flat and level0_scales is None
    constants = _decoding(profile, tensor_scale, level0_scales, packed)
    launch(
        kernels.dequantize_kernel,
        view.grid,
        (*args, view.blocks, view.n, view.inner),
        **view.constants,
        **constants,
        num_warps=WARPS,
    )
    return out


def _unpack(packed: Tensor, scale_bytes: Tensor, out: Tensor) -> None:
    """bf16 ``out`` of packed MXFP4 blocks, by the kernel that looks magnitudes up."""
    device = out.device.index or 0
    launch_unpack = _unpacks.get(device)
    if launch_unpack is None:
        launch_unpack = _unpacks[device] = CachedLaunch(
            kernels.unpack_kernel, {"TILE": UNPACK_TILE, "HALF": 16}, num_warps=UNPACK_WARPS
        )
    blocks = scale_bytes.numel()
    grid = (-(-blocks // UNPACK_TILE), 1, 1)
    launch_unpack(grid, (packed, scale_bytes, out.view(torch.int32), blocks), device)


def _dequantize_flat(args: tuple[Any, ...], profile: Profile, packed: bool) -> None:
    tensor_scale, out = args[2], args[4]
    device = out.device.index or 0
    key = (profile.name, out.dtype, device, packed, tensor_scale is None)
    tile = CODES_ELEMENTS // profile.block_size
    cached = _flat_decodes.get(key)
    if cached is None:
        constants = {"MODE": "flat", "TILE": tile}
        constants |= _decoding(profile, tensor_scale, None, packed)
        cached = CachedLaunch(kernels.dequantize_kernel, constants, num_warps=WARPS)
        _flat_decodes[key] = cached
    blocks = out.numel() // profile.block_size
    cached((-(-blocks // tile), 1, 1), (*args, blocks, 1, 1), device)


def _decoding(
    profile: Profile, tensor_scale: Tensor | None, level0_scales: Tensor | None, packed: bool
) -> dict[str, Any]:
    """The compile-time constants of decoding."""
    numerics = numerics_of(profile)
    return {
        "PACKED": packed,
        "BLOCK": numerics.block,
        "E8M0": numerics.e8m0,
        "E4M3_480": numerics.e4m3_480,
        "TWO_LEVEL": tensor_scale is not None,
        "LEVEL0_BLOCKS": 0 if level0_scales is None else profile.level0_block // numerics.block,
    }


def constants_of(numerics: Numerics) -> dict[str, Any]:
    """The compile-time constants of ``tiles.to_grid``, in the order of the kernels' signatures."""
    return {
        "BLOCK": numerics.block,
        "RULE": numerics.rule,
        "BUMP": numerics.bump,
        "LAST": numerics.last,
        "ROUNDING": numerics.rounding,
        "FLUSH": numerics.flush,
        "INF_SATURATES": numerics.inf_saturates,
        "DIVIDES": numerics.divides,
        "TWO_LEVEL": numerics.two_level,
    }


class BlockedView:
    """A tensor as [R, n, I] around its blocked axis, with strides; copied where it has no such.

    Whole blocks that lie one behind the other are one long row: ``flat``.
    """

    def __init__(self, x: Tensor, axis: int, block: int, elements: int = CODES_ELEMENTS) -> None:
        rows, inner = (_merged(x, dims) for dims in (range(axis), range(axis + 1, x.dim())))
        if rows is None or inner is None:
            x = x.contiguous()
            size = prod(x.shape[axis + 1 :])
            rows, inner = (prod(x.shape[:axis]), x.shape[axis] * size), (size, 1)
        self.x, self.n, self.block = x, x.shape[axis], block
        self._tile = elements // block
        self.rows, self.inner = rows[0], inner[0]
        self.strides = (rows[1], x.stride(axis), inner[1])
        self.flat = self.inner == 1 and self.n % block == 0 and x.is_contiguous()

    @property
    def blocks(self) -> int:
        """Number of blocks, not counting ``inner``."""
        return self.rows * -(-self.n // self.block)

    @property
    def constants(self) -> dict[str, Any]:
        mode = "columns" if self.inner > 1 else "flat" if self.flat else "rows"
        return {"MODE": mode, "TILE": self._tile}

    @property
    def grid(self) -> tuple[int, int, int]:
        if self.inner > 1:
            return self.blocks, -(-self.inner // self._tile), 1
        return -(-self.blocks // self._tile), 1, 1


def _merged(x: Tensor, dims: range) -> tuple[int, int] | None:
    """(size, stride) of ``dims`` as one dimension, or None if strides do not allow that."""
    size, stride = 1, 1
    for dim in reversed(dims):
        if x.shape[dim] == 1:
            continue
        if size == 1:
            stride = x.stride(dim)
        elif x.stride(dim) != stride * size:
            return None
        size *= x.shape[dim]
    return size, stride


def _arguments(
    view: BlockedView, profile: Profile, numerics: Numerics, tensor_scale: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the two encoding kernels take beside their pointers: arguments and constants."""
    given = _given_bytes(view, profile) if numerics.rule == "given" else None
    scale = tensor_scale if numerics.two_level else None
    args = (given, scale, view.blocks, view.n, view.inner, *view.strides)
    return args, constants_of(numerics)


def _given_bytes(view: BlockedView, profile: Profile) -> Tensor:
    """Scale bytes of a rule that only weights use, by ``numerics``: once in a weight's life."""
    assert profile.scale_rule in GIVEN_RULES
    block = profile.block_size
    sizes = (view.rows, view.n, view.inner)
    x = view.x.as_strided(sizes, view.strides, view.x.storage_offset())
    padding = x.new_zeros(view.rows, -view.n % block, view.inner)
    a = torch.cat((x, padding), 1).abs().float().reshape(-1, block, view.inner)
    amax_bits = a.view(torch.int32).amax(1, keepdim=True)
    bytes_R1I = scales.scale_bytes(
        scales.block_scales(profile, a, amax_bits, view.x.dtype), profile
    )
    return bytes_R1I.contiguous()


def _dual_level(
    x: Tensor,
    profile: Profile,
    *,
    out: Tensor | None = None,
    codes: Tensor | None = None,
    scale_bytes: Tensor | None = None,
    level0: Tensor | None = None,
    pack: bool = False,
) -> None:
    view = BlockedView(x, x.dim() - 1, profile.block_size)
    numerics = numerics_of(profile)
    constants = constants_of(numerics)
    del constants["DIVIDES"], constants["TWO_LEVEL"]
    groups = view.rows * -(-view.n // profile.level0_block)
    launch(
        kernels.dual_level_kernel,
        (groups, 1, 1),
        (view.x, out, codes, scale_bytes, level0, view.n, *view.strides[:2]),
        FAKE=out is not None,
        PACK=pack,
        GROUP=profile.level0_block,
        **constants,
    )
