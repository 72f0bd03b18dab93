"""torch_npu's MX operators, called exactly as their contract asks.

One place for every rule that a call must keep and that nothing enforces where one would look:

* **Dtypes are integers.** 296 is FP4 E2M1 and 293 E8M0 in torch_npu's numbering (256 + the ACL
  type); ``torch.float4_e2m1fn_x2`` has another number, which the device code does not test for.
  Numbers below 256 are ``torch.ScalarType``. Codes and scales themselves are plain uint8 tensors.
* **The weight stays a view.** ``npu_quant_matmul`` takes x2 [K/2, N] and its scale [K/64, N, 2] as
  transposed *views* of [N, K/2] and [N, K/64, 2]; the strides say which axis is packed, so a
  contiguous copy is another matrix (or an error, "k dim of x1 and x2 need be same").
* **x is 2-D**, or its scale has a dimension too many.
* **group_sizes is [1, 1, 32]** and **output_dtype** is given: left out, the one is guessed and the
  other is int8.
* **The bias is fp32.** Only that is documented; bf16 passes the shape check and is no promise.

Nothing is passed that op-plugin 26.0.0 (CANN 9.0, torch-npu 2.9.0.post2) lacks: ``max_low_bound``
never, and what came later only where the loaded package's own schemas list it (``has``).

Sources: op-plugin's schemas and documents, ops-nn's aclnnQuantMatmulV5 and aclnnDynamicMxQuant
documents, the calls of vllm-ascend and SGLang (read); wheel torch_npu 2.13.0 on a CPU (run).

Letters: M rows of x, N outputs, K inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_qat.backends.base import BackendUnavailable

DTYPE_E2M1 = 296
DTYPE_E8M0 = 293
GROUP_SIZES = (1, 1, 32)
FRACTAL_NZ = 29
# torch.ScalarType numbers of what a matmul or a dequantiser returns.
OUTPUT_CODES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
DUAL_OUTPUTS = (torch.float16, torch.bfloat16)
# A limit of the matmul on the last dimension of its operands (aclnnQuantMatmulV5).
LONGEST = 65535

# What each call passes; a package whose schema lacks one of these cannot be used for it.
MX_QUANT = "npu_dynamic_mx_quant"
MATMUL = "npu_quant_matmul"
DUAL_QUANT = "npu_dynamic_dual_level_mx_quant"
DUAL_MATMUL = "npu_dual_level_quant_matmul"
FORMAT_CAST = "npu_format_cast"
ANTI_QUANT = "npu_anti_mx_quant"
PASSED: Mapping[str, frozenset[str]] = {
    MX_QUANT: frozenset({"axis", "round_mode", "dst_type", "block_size", "scale_alg"}),
    MATMUL: frozenset(
        {
            "pertoken_scale",
            "bias",
            "output_dtype",
            "x1_dtype",
            "x2_dtype",
            "pertoken_scale_dtype",
            "scale_dtype",
            "group_sizes",
        }
    ),
    DUAL_QUANT: frozenset({"round_mode"}),
    DUAL_MATMUL: frozenset({"bias", "output_dtype"}),
    FORMAT_CAST: frozenset({"customize_dtype"}),
    ANTI_QUANT: frozenset({"axis", "dst_type", "src_type"}),
}
OLDEST = "MX operators came with op-plugin 26.0.0: CANN 9.0 and torch-npu 2.9.0.post2 or newer"


@dataclass(frozen=True)
class NpuOps:
    """The operators of one torch_npu.

    Attributes:
        api: the module that has them as functions.
        arguments: argument names of each operator that is there, by operator.
        version: of the package.
    """

    api: Any
    arguments: Mapping[str, frozenset[str]]
    version: str

    @classmethod
    def loaded(cls) -> NpuOps:
        """Of the installed package, with the argument names of its registered schemas.

        Raises BackendUnavailable if it cannot be imported.
        """
        try:
            api = importlib.import_module("torch_npu")
        except Exception as error:  # the vendor package fails in many ways
            raise BackendUnavailable(f"torch_npu cannot be imported: {error}") from error
        found = {name: schema_arguments(name) for name in PASSED}
        arguments = {name: names for name, names in found.items() if names is not None}
        return cls(api, arguments, str(getattr(api, "__version__", "unknown")))

    def has(self, operator: str, also: Iterable[str] = ()) -> bool:
        """Whether ``operator`` takes what this module passes to it, and the arguments ``also``."""
        return PASSED[operator] | set(also) <= self.arguments.get(operator, frozenset())

    def require(self, operator: str, also: Iterable[str] = ()) -> None:
        """Raise BackendUnavailable if not ``has``."""
        if self.has(operator, also):
            return
        if operator not in self.arguments:
            missing = f"has no {operator}"
        else:
            lacking = sorted((PASSED[operator] | set(also)) - self.arguments[operator])
            missing = f"has an {operator} without {', '.join(lacking)}"
        raise BackendUnavailable(f"torch_npu {self.version} {missing}; {OLDEST}")

    def mx_quant(
        self, x: Tensor, axis: int, round_mode: str, scale_alg: int, dst_type_max: float
    ) -> tuple[Tensor, Tensor]:
        """Codes [.., n/2] and paired scales (rank + 1) of ``x``, bf16 or fp16, both uint8."""
        extra = {"dst_type_max": dst_type_max} if dst_type_max else {}
        codes, scales = self.api.npu_dynamic_mx_quant(
            x.contiguous(),
            axis=axis,
            round_mode=round_mode,
            dst_type=DTYPE_E2M1,
            block_size=32,
            scale_alg=scale_alg,
            **extra,
        )
        return codes, scales

    def dual_level_mx_quant(self, x: Tensor, round_mode: str) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [.., K/2] uint8, level-0 scales [.., ceil(K/512)] fp32, level-1 scales
        [.., ceil(K/64), 2] uint8 of ``x`` [.., K], bf16 or fp16."""
        codes, level0, scales = self.api.npu_dynamic_dual_level_mx_quant(
            x.contiguous(), round_mode=round_mode
        )
        return codes, level0, scales

    def anti_mx_quant(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """element x scale [.., K] in ``dtype`` of codes [.., K/2] blocked along K."""
        values: Tensor = self.api.npu_anti_mx_quant(
            codes.contiguous(),
            scales.contiguous(),
            axis=-1,
            dst_type=OUTPUT_CODES[dtype],
            src_type=DTYPE_E2M1,
        )
        return values

    def quant_matmul(
        self,
        x: tuple[Tensor, Tensor],
        weight: tuple[Tensor, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """[M, N] = x [M, K] times weight [N, K] transposed, + bias [N].

        Args:
            x: codes [M, K/2] and scales [M, ceil(K/64), 2].
            weight: codes [N, K/2] and scales [N, ceil(K/64), 2].
            bias: [N] of any dtype, or None.
            out_dtype: fp16, bf16 or fp32.
        """
        y: Tensor = self.api.npu_quant_matmul(
            x[0],
            as_transposed(weight[0]),
            as_transposed(weight[1]),
            **quant_matmul_arguments(x[1], bias, out_dtype),
        )
        return y

    def dual_level_quant_matmul(
        self,
        x: tuple[Tensor, Tensor, Tensor],
        weight: tuple[Tensor, Tensor, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """As ``quant_matmul`` with level-0 scales.

        Args:
            x: codes [M, K/2], level-0 [M, ceil(K/512)], level-1 [M, ceil(K/64), 2].
            weight: codes [N, K/2] from ``to_fractal_nz``, level-0 [ceil(K/512), N], level-1
                [N, ceil(K/64), 2].
            bias: [N] or None.
            out_dtype: fp16 or bf16.
        """
        y: Tensor = self.api.npu_dual_level_quant_matmul(
            x[0],
            weight[0],
            x[1],
            weight[1],
            x[2],
            weight[2],
            bias=matmul_bias(bias),
            output_dtype=OUTPUT_CODES[out_dtype],
        )
        return y

    def to_fractal_nz(self, codes: Tensor) -> Tensor:
        """Codes [N, K/2] in the tiled format that the dual-level matmul reads, as int8."""
        tiled: Tensor = self.api.npu_format_cast(
            codes.view(torch.int8), FRACTAL_NZ, customize_dtype=torch.int8
        )
        return tiled


def schema_arguments(operator: str) -> frozenset[str] | None:
    """Argument names over all overloads of ``torch.ops.npu.<operator>``; None if there is none."""
    packet = getattr(torch.ops.npu, operator, None)
    if packet is None:
        return None
    schemas = (getattr(packet, overload)._schema for overload in packet.overloads())
    return frozenset(argument.name for schema in schemas for argument in schema.arguments)


def quant_matmul_arguments(
    x_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> dict[str, Any]:
    """Every keyword of ``npu_quant_matmul`` for MXFP4 times MXFP4."""
    return {
        "pertoken_scale": x_scales,
        "bias": matmul_bias(bias),
        "output_dtype": OUTPUT_CODES[out_dtype],
        "x1_dtype": DTYPE_E2M1,
        "x2_dtype": DTYPE_E2M1,
        "pertoken_scale_dtype": DTYPE_E8M0,
        "scale_dtype": DTYPE_E8M0,
        "group_sizes": list(GROUP_SIZES),
    }


def as_transposed(t: Tensor) -> Tensor:
    """The first two dimensions swapped, as a view of the same memory."""
    return t.transpose(0, 1)


def matmul_bias(bias: Tensor | None) -> Tensor | None:
    """``bias`` in fp32, the only dtype that is documented."""
    return None if bias is None else bias.float()


def flatten_rows(x: Tensor) -> Tensor:
    """[.., K] as [M, K]."""
    return x.reshape(-1, x.shape[-1])
