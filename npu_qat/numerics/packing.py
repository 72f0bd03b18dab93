"""Two 4-bit codes a byte: the element with the even index in the low nibble.

Packing runs along the blocked axis; an odd length is padded with code 0. Every public FP4 packer
uses this order. (The NPU op always packs along the last dimension: see `npu_layout`.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, axis: int = -1) -> Tensor:
    """Pack uint8 codes 0..15 in pairs along `axis`: length n becomes ceil(n / 2) bytes.

    Raises ValueError for another dtype. The upper nibble of a code must be zero.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, one code a byte, not {codes.dtype}")
    codes = codes.movedim(axis, -1)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.movedim(-1, axis).contiguous()


def unpack(packed: Tensor, length: int, axis: int = -1) -> Tensor:
    """Inverse of `pack`: uint8 codes, `length` of them along `axis`.

    Raises ValueError if the number of bytes along `axis` is not ceil(length / 2), or for another
    dtype than uint8.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be uint8, not {packed.dtype}")
    if packed.shape[axis] != (length + 1) // 2:
        raise ValueError(
            f"{length} codes take {(length + 1) // 2} bytes along axis {axis}, "
            f"but the packed tensor has {packed.shape[axis]} there (shape {tuple(packed.shape)})"
        )
    packed = packed.movedim(axis, -1)
    codes = torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)[..., :length]
    return codes.movedim(-1, axis).contiguous()
