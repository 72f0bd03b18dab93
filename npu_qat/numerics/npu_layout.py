"""The byte layout of the NPU's MX operators, and the way to and from ours.

`npu_dynamic_mx_quant(x, axis=a)` returns two uint8 tensors (CANN 9, read and checked against the
operator's shape function):

* **codes** are packed along the *last* dimension, whatever the blocked axis: shape
  [..., n_last / 2], element 2i in the low nibble. The last dimension must be even.
* **scales** come in pairs. Rank + 1: the axis has ceil(ceil(n / 32) / 2) entries and a trailing
  dimension of 2 is added; block b sits at [..., b // 2, ..., b % 2]. An odd number of blocks is
  padded with byte 0. For axis = -1 the pairs lie side by side, so the flat order is the natural
  one; for another axis they interleave.

Example, x [1536, 8960]: axis -1 gives codes [1536, 4480], scales [1536, 140, 2]; axis 0 gives
codes [1536, 4480], scales [24, 8960, 2]. A weight for `npu_quant_matmul` is such a pair for
axis -1, transposed as a view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_qat.numerics.codec import QuantizedTensor
from npu_qat.numerics.packing import pack, unpack
from npu_qat.numerics.profiles import Profile, get_profile


def to_npu_layout(q: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """(packed codes, paired scales) of an MX tensor as the operator returns them, both uint8.

    Raises ValueError for scales that are not E8M0 and for an odd last dimension.
    """
    _require_e8m0(q.profile)
    if q.shape[-1] % 2:
        raise ValueError(
            f"the operator packs two codes a byte along the last dimension, so that must be "
            f"even; this tensor has shape {tuple(q.shape)}"
        )
    return pack(q.codes, -1), pair_scales(q.scales, q.axis)


def from_npu_layout(
    packed: Tensor, scales: Tensor, profile: str | Profile, axis: int = -1
) -> QuantizedTensor:
    """Inverse of `to_npu_layout`: codes packed along the last dimension, paired scales.

    Raises ValueError where the shapes do not fit each other.
    """
    if isinstance(profile, str):
        profile = get_profile(profile)
    _require_e8m0(profile)
    codes = unpack(packed, 2 * packed.shape[-1], -1)
    if not -codes.dim() <= axis < codes.dim():
        raise ValueError(f"axis {axis} does not exist in a tensor of {codes.dim()} dimension(s)")
    axis %= codes.dim()
    blocks = -(-codes.shape[axis] // profile.block_size)
    wanted = [*codes.shape, 2]
    wanted[axis] = (blocks + 1) // 2
    if list(scales.shape) != wanted or scales.dtype != torch.uint8:
        raise ValueError(
            f"codes for shape {tuple(codes.shape)} blocked along axis {axis} need uint8 scales of "
            f"shape {tuple(wanted)}, not {scales.dtype} {tuple(scales.shape)}"
        )
    return QuantizedTensor(codes, unpair_scales(scales, axis, blocks), profile, axis)


def pair_scales(scales: Tensor, axis: int) -> Tensor:
    """Scale bytes with one entry a block along `axis` to the operator's pairs [..., 2]."""
    axis %= scales.dim()
    if scales.shape[axis] % 2:
        padding = list(scales.shape)
        padding[axis] = 1
        scales = torch.cat((scales, scales.new_zeros(padding)), dim=axis)
    return scales.unflatten(axis, (-1, 2)).movedim(axis + 1, -1).contiguous()


def unpair_scales(scales: Tensor, axis: int, blocks: int) -> Tensor:
    """Inverse of `pair_scales`; `blocks`: number of blocks along `axis` (drops the padding)."""
    axis %= scales.dim() - 1
    return scales.movedim(-1, axis + 1).flatten(axis, axis + 1).narrow(axis, 0, blocks).contiguous()


def _require_e8m0(profile: Profile) -> None:
    if profile.scale_format != "e8m0" or profile.level0_block:
        raise ValueError(
            f"profile {profile.name!r} has no NPU layout: the operators take E8M0 scales of "
            "one level"
        )
