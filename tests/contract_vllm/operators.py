"""CPU kernels for what vllm-ascend calls: those of ``tests/contract``, and W4A8_MXFP beside them.

W4A8_MXFP serves the same 4-bit weights with 8-bit activations: FP8 E4M3 in blocks of 32 under E8M0
scales, ``scale = 2^(floor(log2 amax) - 8)``, elements to the nearest, ties to even, clipped at 448.
The product has no use for it beyond the export, so its kernels live here. They check what the call
says about its operands and compute plainly; how a device sums is not claimed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.contract import op_kernels
from tests.contract.op_kernels import BLOCK, E2M1, E8M0, decode, require, unpack_last

E4M3 = 24  # torch.float8_e4m3fn as c10::ScalarType
LARGEST, LARGEST_EXPONENT = 448.0, 8
WITH_FP8 = ("npu_dynamic_mx_quant", "npu_quant_matmul", "npu_format_cast")


def register_operators() -> list[torch.library.Library]:
    """Register all kernels for CPU tensors; they last as long as the libraries returned."""
    rest = [name for name in op_kernels.KERNELS if name not in WITH_FP8]
    library = torch.library.Library("npu", "IMPL", "CPU")
    for kernel in (npu_dynamic_mx_quant, npu_quant_matmul, npu_format_cast):
        library.impl(kernel.__name__, kernel)
    return [op_kernels.register(rest), library]


def npu_dynamic_mx_quant(input: Tensor, *, dst_type: int = E2M1, **rest: object) -> object:
    if dst_type != E4M3:
        return op_kernels.npu_dynamic_mx_quant(input, dst_type=dst_type, **rest)
    require(input.dtype in (torch.bfloat16, torch.float16), f"input dtype {input.dtype}")
    require(input.shape[-1] % BLOCK == 0, "emulated for whole blocks only")
    blocks = input.float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(amax).exponent - 1 - LARGEST_EXPONENT
    exponent = torch.where(amax == 0, -127, exponent).clamp(min=-127)
    elements = torch.ldexp(blocks, -exponent).clamp(-LARGEST, LARGEST)
    codes = elements.to(torch.float8_e4m3fn).flatten(-2)
    scales = (exponent.squeeze(-1) + 127).to(torch.uint8)
    return codes, op_kernels.pair(scales, -1)


def npu_format_cast(
    self: Tensor,
    acl_format: int,
    *,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> Tensor:
    """FRACTAL_NZ of 4-bit codes. The shape stays, and so do the bytes here: NZ is an order in the
    memory of the device that no call of vllm-ascend can see."""
    if customize_dtype != E4M3:
        return op_kernels.npu_format_cast(
            self, acl_format, customize_dtype=customize_dtype, input_dtype=input_dtype
        )
    require(acl_format == op_kernels.ACL_FORMAT_FRACTAL_NZ, f"acl_format {acl_format}")
    require(input_dtype == E2M1 and self.dtype == torch.uint8, "packed codes are expected")
    return self.clone()


def npu_quant_matmul(x1: Tensor, x2: Tensor, scale: Tensor, **rest: object) -> Tensor:
    if x1.dtype != torch.float8_e4m3fn:
        return op_kernels.npu_quant_matmul(x1, x2, scale, **rest)
    return w4a8_matmul(x1, x2, scale, **rest)  # type: ignore[arg-type]


def w4a8_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    pertoken_scale: Tensor,
    bias: Tensor | None = None,
    output_dtype: int,
    x2_dtype: int,
    pertoken_scale_dtype: int,
    scale_dtype: int,
    group_sizes: list[int],
    **unused: object,
) -> Tensor:
    """[M, N]: x1 E4M3 [M, K], x2 the transposed view [K/2, N] of packed codes."""
    require(all(v is None for v in unused.values()), f"unknown arguments {unused}")
    dtypes = (x2_dtype, pertoken_scale_dtype, scale_dtype)
    require(dtypes == (E2M1, E8M0, E8M0), f"x2, pertoken_scale, scale dtypes {dtypes}")
    require(group_sizes == [0, 0, BLOCK], f"group_sizes {group_sizes}")
    require(x2.t().is_contiguous(), "x2 must be a transposed view")
    require(scale.transpose(0, 1).is_contiguous(), "scale must be a transposed view")
    factor = torch.exp2(pertoken_scale.flatten(-2).float() - 127).repeat_interleave(BLOCK, -1)
    left = x1.float() * factor[:, : x1.shape[1]]
    right = decode(unpack_last(x2.t()), scale.transpose(0, 1), -1)
    total = left @ right.t()
    if bias is not None:
        require(bias.dtype in (torch.bfloat16, torch.float16), f"bias {bias.dtype}: 16 bits")
        total = total + bias.float()
    return total.to(op_kernels.SCALAR_TYPES[output_dtype])
