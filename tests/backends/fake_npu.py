"""A torch_npu in Python that is as strict as its operators' contract, for tests without the wheel.

The numbers come from ``npu_qat.numerics``, so these tests show how the operators are called and
what is done with what they return. That the numbers are the operators' is shown elsewhere: by the
golden cases of ``numerics`` and by ``tests/contract``, whose kernels are written independently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_qat.backends.npu import NpuBackend, NpuOps
from npu_qat.backends.npu.ops import PASSED
from npu_qat.numerics import (
    QuantizedTensor,
    dequantize,
    from_npu_layout,
    get_profile,
    quantize,
    to_npu_layout,
)
from npu_qat.numerics.npu_layout import pair_scales, unpair_scales
from npu_qat.numerics.packing import pack, unpack

DTYPES = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
PROFILE = {
    (0, 0.0): "ascend950",
    (2, 0.0): "ascend950-alg2",
    (2, 7.0): "ascend950-alg2-max7",
}
SUFFIX = {"round": "", "rint": "-rint", "floor": "-floor"}


class FakeNpu:
    """The functions of ``torch_npu`` that the backend may call. ``calls`` counts them."""

    __version__ = "2.9.0.post2"

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def npu_dynamic_mx_quant(
        self,
        input: Tensor,
        *,
        axis: int,
        round_mode: str,
        dst_type: int,
        block_size: int,
        scale_alg: int,
        dst_type_max: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        self._count("npu_dynamic_mx_quant")
        assert type(dst_type) is int and dst_type == 296 and block_size == 32
        assert input.dtype in (torch.bfloat16, torch.float16) and input.is_contiguous()
        assert not input.requires_grad or not torch.is_grad_enabled()
        assert input.shape[-1] % 2 == 0
        name = PROFILE[scale_alg, dst_type_max] + SUFFIX[round_mode]
        return to_npu_layout(quantize(input, name, axis))

    def npu_dynamic_dual_level_mx_quant(
        self, input: Tensor, *, round_mode: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._count("npu_dynamic_dual_level_mx_quant")
        assert round_mode == "rint" and input.is_contiguous() and input.shape[-1] % 2 == 0
        q = quantize(input, "ascend950-dual")
        assert q.level0_scales is not None
        return pack(q.codes, -1), q.level0_scales, pair_scales(q.scales, -1)

    def npu_anti_mx_quant(
        self, x: Tensor, mxscale: Tensor, *, axis: int, dst_type: int, src_type: int
    ) -> Tensor:
        self._count("npu_anti_mx_quant")
        assert axis == -1 and type(src_type) is int and src_type == 296
        assert x.dtype == mxscale.dtype == torch.uint8 and x.is_contiguous()
        return dequantize(from_npu_layout(x, mxscale, "ascend950"), DTYPES[dst_type])

    def npu_quant_matmul(
        self,
        x1: Tensor,
        x2: Tensor,
        scale: Tensor,
        *,
        pertoken_scale: Tensor,
        bias: Tensor | None,
        output_dtype: int,
        x1_dtype: int,
        x2_dtype: int,
        pertoken_scale_dtype: int,
        scale_dtype: int,
        group_sizes: list[int],
    ) -> Tensor:
        self._count("npu_quant_matmul")
        codes = (x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype, output_dtype)
        assert all(type(code) is int for code in codes) and codes[:4] == (296, 296, 293, 293)
        assert group_sizes == [1, 1, 32] and isinstance(group_sizes, list)
        assert x1.dim() == 2 and x1.is_contiguous()
        assert x2.shape[0] == x1.shape[1] and x2.stride()[0] == 1, "x2 must stay a strided view"
        assert scale.transpose(0, 1).is_contiguous(), "the scale must stay a strided view"
        assert pertoken_scale.dim() == scale.dim() == 3 and scale.shape[2] == 2
        assert pertoken_scale.shape[1] == scale.shape[0], "x1Scale K and x2Scale K differ"
        assert bias is None or bias.dtype == torch.float32
        left = dequantize(from_npu_layout(x1, pertoken_scale, "ascend950"), torch.float32)
        right = from_npu_layout(x2.transpose(0, 1), scale.transpose(0, 1), "ascend950")
        y = left @ dequantize(right, torch.float32).T
        return (y if bias is None else y + bias).to(DTYPES[output_dtype])

    def npu_format_cast(
        self, x: Tensor, acl_format: int, *, customize_dtype: torch.dtype
    ) -> Tensor:
        self._count("npu_format_cast")
        assert x.dtype == torch.int8 and acl_format == 29 and customize_dtype == torch.int8
        return x.flip(0)  # any other order of the bytes

    def npu_dual_level_quant_matmul(
        self,
        x1: Tensor,
        x2: Tensor,
        x1_level0_scale: Tensor,
        x2_level0_scale: Tensor,
        x1_level1_scale: Tensor,
        x2_level1_scale: Tensor,
        *,
        bias: Tensor | None,
        output_dtype: int,
    ) -> Tensor:
        self._count("npu_dual_level_quant_matmul")
        assert x1.dim() == 2 and x2.dtype == torch.int8 and output_dtype in (5, 15)
        assert x2_level0_scale.shape == (x1_level0_scale.shape[1], x2.shape[0])
        assert x2_level0_scale.is_contiguous() and x2_level0_scale.dtype == torch.float32
        assert bias is None or bias.dtype == torch.float32
        left = _dual(x1, x1_level0_scale, x1_level1_scale)
        right = _dual(x2.flip(0).view(torch.uint8), x2_level0_scale.T, x2_level1_scale)
        y = left @ right.T
        return (y if bias is None else y + bias).to(DTYPES[output_dtype])


def _dual(packed: Tensor, level0: Tensor, level1: Tensor) -> Tensor:
    length = 2 * packed.shape[-1]
    scales = unpair_scales(level1, -1, -(-length // 32))
    profile = get_profile("ascend950-dual")
    q = QuantizedTensor(
        unpack(packed, length), scales, profile, 1, level0_scales=level0.contiguous()
    )
    return dequantize(q, torch.float32)


def fake_ops(
    api: FakeNpu | None = None,
    *,
    without: tuple[str, ...] = (),
    lacking: dict[str, str] | None = None,
) -> NpuOps:
    """The operators of ``api`` as release 26.1.0 has them.

    Args:
        without: operators that are not there.
        lacking: operator -> argument that its schema does not have.
    """
    newer = {"npu_dynamic_mx_quant": {"dst_type_max"}}
    arguments: dict[str, Any] = {
        name: frozenset((passed | newer.get(name, set())) - {(lacking or {}).get(name)})
        for name, passed in PASSED.items()
        if name not in without
    }
    return NpuOps(api or FakeNpu(), arguments, FakeNpu.__version__)


def fake_backend(api: FakeNpu | None = None, **missing: Any) -> NpuBackend:
    """The NPU backend on ``api``, on CPU tensors."""
    return NpuBackend(fake_ops(api, **missing), "a fake", torch.device("cpu"))
