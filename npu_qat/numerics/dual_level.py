"""The first level of dual-level MX: one fp32 scale for 512 elements, before the MX blocks of 32.

What `npu_dynamic_dual_level_mx_quant` computes (public kernel of CANN ops-nn, arch35):

    s0 = fp32(largest finite |x| of 512) * fp32(1/6)      a subnormal s0 becomes 0
    t  = 16-bit(x / s0), to nearest even                   x = 0 stays 0
    then scale_alg 0 on t, in blocks of 32

The quotient keeps the input's 16-bit dtype; fp32 input, which the op does not take, uses bf16.
Numbers come back as (element * block scale) * s0 in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_qat.numerics.scales import INF_BITS

SIXTH = 0.16666667163372040  # fp32(1/6), pattern 0x3E2AAAAB
_MIN_NORMAL = 2.0**-126


def level0_quotient(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Divide groups along the last dimension by their level-0 scale.

    `x` [..., n], any float dtype. Returns (t, s0): t [..., n] in bf16 or fp16, s0 fp32
    [..., ceil(n / group)].
    """
    size = x.shape[-1]
    group = max(1, min(group, size))  # padding a short row to a full group would change nothing
    padded = torch.nn.functional.pad(x, (0, -size % group)).unflatten(-1, (-1, group))
    bits = padded.abs().float().view(torch.int32)
    amax = bits.masked_fill_(bits >= INF_BITS, 0).amax(-1, keepdim=True).view(torch.float32)
    s0 = amax * SIXTH
    s0 = s0.masked_fill_(s0 < _MIN_NORMAL, 0.0)
    dtype = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    t = (padded.float() / s0).to(dtype)
    t = torch.where(padded == 0, padded.to(dtype), t)
    return t.flatten(-2)[..., :size].contiguous(), s0.squeeze(-1)
