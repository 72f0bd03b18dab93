"""The Ascend 950 backend: torch_npu's operators quantise, decode and multiply.

Works on whatever device its tensors are; it knows the contract of the operators (``ops.py``) and
which profiles they compute (``profiles.py``), and nothing about drivers.

**Trust, after a look.** Whether an argument is honoured depends on the CANN underneath: with an
older one torch_npu silently drops ``dst_type_max`` or computes another ``scale_alg``. So before a
profile is used for the first time, the operator quantises a few rows whose right answer is known
(ties, blocks on both sides of every threshold, zeros, a small scale) and decodes its codes; codes,
scales and values are compared with ``numerics``. A difference is an error that names the profile,
not a result. The matmul is not tried: the audit of a run compares its products with fp32 ones, and
``npu-qat parity device`` its sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_qat.backends.base import BackendUnavailable, EncodedInput, PackedWeight
from npu_qat.backends.emulation import EmulationBackend
from npu_qat.backends.npu import ops as contract
from npu_qat.backends.npu.ops import NpuOps, flatten_rows
from npu_qat.backends.npu.profiles import MxCall, computed_profiles, is_mx, mx_call, takes
from npu_qat.numerics import (
    QuantizedTensor,
    dequantize,
    from_npu_layout,
    get_profile,
    quantize,
    to_npu_layout,
    unpack,
)
from npu_qat.numerics.npu_layout import pair_scales, unpair_scales


@dataclass(frozen=True)
class PreparedWeight:
    """A weight [N, K] as the matmuls take it: codes [N, K/2], scales [N, ceil(K/64), 2], and for
    the dual-level one the level-0 scales [ceil(K/512), N]."""

    codes: Tensor
    scales: Tensor
    level0_scales: Tensor | None


class NpuBackend(EmulationBackend):
    """Quantises, decodes and multiplies with the MX operators of ``ops``.

    Args:
        ops: the operators.
        soc: the chip, for the record of a run.
        device: where the operators are tried before they are used.
        trials: False: take the operators as they are. For the conformance kit alone, which shows
            where a device's numbers differ.

    Raises:
        BackendUnavailable: the package has no MX quantiser.
    """

    name = "npu"

    def __init__(self, ops: NpuOps, soc: str, device: torch.device, *, trials: bool = True) -> None:
        ops.require(contract.MX_QUANT)
        self.ops, self.soc, self.device, self.trials = ops, soc, device, trials
        self._tried: dict[str, str | None] = {}

    def describe(self) -> dict[str, str]:
        decoder = contract.ANTI_QUANT if self._decodes else "plain torch"
        return {
            "name": self.name,
            "soc": self.soc,
            "torch_npu": self.ops.version,
            "decoder": decoder,
        }

    def without_trials(self) -> NpuBackend:
        """The same, with ``trials`` off."""
        return NpuBackend(self.ops, self.soc, self.device, trials=False)

    # --- profiles ---------------------------------------------------------------------------

    def check_profile(self, profile: str) -> None:
        self._call(profile)

    def _call(self, profile: str, dtype: torch.dtype = torch.bfloat16) -> MxCall:
        """The call that computes ``profile`` from ``dtype``; BackendUnavailable if there is none,
        or if the device does something else under that name."""
        call = mx_call(get_profile(profile))
        if call is None:
            raise BackendUnavailable(
                f"the NPU's operators do not compute profile {profile!r}; they compute "
                f"{', '.join(computed_profiles())}. Take one of these, or --backend reference"
            )
        if call.dual_level:
            self.ops.require(contract.DUAL_QUANT)
        else:
            self.ops.require(contract.MX_QUANT, ["dst_type_max"] if call.dst_type_max else [])
        if not takes(call, dtype):
            raise BackendUnavailable(
                f"the NPU's operator does not compute profile {profile!r} from {dtype}; set "
                "model.dtype: bf16, or use --backend reference"
            )
        if profile not in self._tried:
            self._tried[profile] = self._try(profile, call) if self.trials else None
        if (wrong := self._tried[profile]) is not None:
            raise BackendUnavailable(
                f"the NPU's operator computes other numbers than profile {profile!r}: {wrong}. "
                "The CANN underneath is probably too old for its scale_alg or dst_type_max; update "
                "it, take another profile, or use --backend reference"
            )
        return call

    def _try(self, profile: str, call: MxCall) -> str | None:
        """What differs between the operator and ``numerics`` on the trial rows, or None."""
        x = trial_rows()
        found, wanted = self._encode(x.to(self.device), profile, call), quantize(x, profile)
        for name, a, b in (
            ("scales", found.scales, wanted.scales),
            ("codes", _without_zero_signs(found.codes), _without_zero_signs(wanted.codes)),
        ):
            if different := int((a.cpu() != b).sum()):
                return f"{different} of {b.numel()} {name} of a trial differ"
        if (level0 := wanted.level0_scales) is not None:
            assert found.level0_scales is not None
            if not torch.equal(found.level0_scales.cpu(), level0):
                return "level-0 scales of a trial differ"
        values, exact = self.dequantize(found, x.dtype).cpu(), dequantize(wanted, x.dtype)
        if different := int((values != exact).sum()):
            return f"{different} of {exact.numel()} decoded values of a trial differ"
        return None

    # --- numbers ----------------------------------------------------------------------------

    def fake_quant(
        self,
        x: Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: Tensor | None = None,
        apply_tensor_scale: bool = True,
    ) -> Tensor:
        last = x.dim() > 0 and axis % x.dim() == x.dim() - 1
        if last and tensor_scale is None and not get_profile(profile).level0_block:
            return self.decode_input(self.encode_input(x, profile))  # the codes stay packed
        return self.dequantize(self.quantize(x, profile, axis, tensor_scale=tensor_scale), x.dtype)

    def quantize(
        self, x: Tensor, profile: str, axis: int = -1, *, tensor_scale: Tensor | None = None
    ) -> QuantizedTensor:
        """As ``numerics.quantize``, by the operator.

        Raises BackendUnavailable for a profile or dtype that it does not compute, and ValueError
        for an odd last dimension, which it cannot pack.
        """
        call = self._call(profile, x.dtype)
        assert tensor_scale is None, "no profile of the operators has a tensor scale"
        return self._encode(x.detach(), profile, call, axis)

    def _encode(self, x: Tensor, profile: str, call: MxCall, axis: int = -1) -> QuantizedTensor:
        if call.dual_level and axis % x.dim() != x.dim() - 1:
            raise ValueError(f"profile {profile!r} runs its blocks along the last axis only")
        _check_even(x)
        if not call.dual_level:
            codes, scales = self._mx_quant(x, axis, call)
            try:
                return from_npu_layout(codes, scales, profile, axis)
            except ValueError as error:  # the device's fault: no refusal, and no user's mistake
                raise RuntimeError(
                    f"{contract.MX_QUANT} of torch_npu {self.ops.version} returned another layout "
                    f"than its documents have: {error}"
                ) from error
        codes, level0, scales = self.ops.dual_level_mx_quant(x, call.round_mode)
        length = x.shape[-1]
        return QuantizedTensor(
            unpack(codes, length),
            unpair_scales(scales, -1, -(-length // 32)),
            get_profile(profile),
            x.dim() - 1,
            level0_scales=level0,
        )

    def _mx_quant(self, x: Tensor, axis: int, call: MxCall) -> tuple[Tensor, Tensor]:
        return self.ops.mx_quant(x, axis, call.round_mode, call.scale_alg, call.dst_type_max)

    def dequantize(self, q: QuantizedTensor | PackedWeight, dtype: torch.dtype) -> Tensor:
        """The values of ``q`` in ``dtype``: by the operator where it can, else in plain torch."""
        profile = get_profile(q.profile) if isinstance(q, PackedWeight) else q.profile
        last = q.axis == len(q.shape) - 1 and q.shape[-1] % 2 == 0
        single = is_mx(profile) and not profile.level0_block
        if not (self._decodes and last and single and dtype in contract.OUTPUT_CODES):
            return super().dequantize(q, dtype)
        packed, scales = (
            (q.packed, pair_scales(q.scales, 1))
            if isinstance(q, PackedWeight)
            else to_npu_layout(q)
        )
        return self.ops.anti_mx_quant(packed, scales, dtype)

    @property
    def _decodes(self) -> bool:
        return self.ops.has(contract.ANTI_QUANT)

    # --- products ---------------------------------------------------------------------------

    def check_fused(
        self, weight_profile: str, activation_profile: str, in_features: int, out_features: int
    ) -> None:
        call = self._call(activation_profile)
        weight = get_profile(weight_profile)
        if not is_mx(weight) or bool(weight.level0_block) != call.dual_level:
            raise BackendUnavailable(
                f"the NPU's matmul cannot multiply weights in {weight_profile!r} with inputs in "
                f"{activation_profile!r}"
            )
        for operator in (
            (contract.DUAL_MATMUL, contract.FORMAT_CAST) if call.dual_level else (contract.MATMUL,)
        ):
            self.ops.require(operator)
        if in_features % 2 or not 2 < in_features <= contract.LONGEST:
            raise BackendUnavailable(
                f"the NPU's matmul takes an even number of inputs from 4 to {contract.LONGEST}, "
                f"not {in_features}"
            )

    def encode_input(self, x: Tensor, profile: str) -> EncodedInput:
        call = self._call(profile, x.dtype)
        rows = flatten_rows(x.detach())
        _check_even(rows)
        if call.dual_level:
            codes, level0, scales = self.ops.dual_level_mx_quant(rows, call.round_mode)
            return EncodedInput(codes, scales, x.shape, x.dtype, profile, level0)
        codes, scales = self._mx_quant(rows, -1, call)
        return EncodedInput(codes, scales, x.shape, x.dtype, profile)

    def decode_input(self, encoded: EncodedInput) -> Tensor:
        """In the input's dtype; fp32 for a dual-level profile, whose values need it."""
        if encoded.level0_scales is None:
            if self._decodes:
                values = self.ops.anti_mx_quant(encoded.codes, encoded.scales, encoded.dtype)
            else:
                q = from_npu_layout(encoded.codes, encoded.scales, encoded.profile)
                values = dequantize(q, encoded.dtype)
            return values.view(encoded.shape)
        length = encoded.shape[-1]
        q = QuantizedTensor(
            unpack(encoded.codes, length),
            unpair_scales(encoded.scales, -1, -(-length // 32)),
            get_profile(encoded.profile),
            1,
            level0_scales=encoded.level0_scales,
        )
        return dequantize(q, torch.float32).view(encoded.shape)

    def prepare_weight(self, weight: PackedWeight, *, resident: bool = False) -> PreparedWeight:
        """Codes and scales without a copy where their number of blocks is even; the dual-level
        matmul gets tiled codes."""
        assert weight.axis == 1, "check_fused lets only blocks along K through"
        scales = pair_scales(weight.scales, 1)
        if weight.level0_scales is None:
            return PreparedWeight(weight.packed, scales, None)
        level0 = weight.level0_scales.transpose(0, 1).contiguous()
        return PreparedWeight(self.ops.to_fractal_nz(weight.packed), scales, level0)

    def fused_linear(
        self,
        x: EncodedInput,
        weight: object,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """fp32 sums of exact products, + fp32 bias, one cast to ``out_dtype``."""
        assert isinstance(weight, PreparedWeight)
        dtype = out_dtype or x.dtype
        if x.level0_scales is None:
            y = self.ops.quant_matmul(
                (x.codes, x.scales), (weight.codes, weight.scales), bias, dtype
            )
        else:
            assert weight.level0_scales is not None and dtype in contract.DUAL_OUTPUTS
            y = self.ops.dual_level_quant_matmul(
                (x.codes, x.level0_scales, x.scales),
                (weight.codes, weight.level0_scales, weight.scales),
                bias,
                dtype,
            )
        return y.view(*x.shape[:-1], y.shape[-1])


def trial_rows() -> Tensor:
    """bf16 [7, 64] on the CPU: rows on which profiles that differ give different bytes.

    Maxima of 1, 1.5, 1.625, 1.75 and 1.875 times a power of two lie on both sides of every
    threshold of a scale rule; under each, all quarter steps of the grid, which hold every tie.
    """
    quarters = torch.arange(-32, 32) / 16.0  # -2 .. 1.9375
    rows = [
        quarters.clamp(-top, top) * 2.0**e for e, top in enumerate((1, 1.5, 1.625, 1.75, 1.875))
    ]
    zeros, small = torch.zeros(64), quarters.clamp(-1, 1) * 2.0**-120
    return torch.stack([*rows, zeros, small]).bfloat16()


def _without_zero_signs(codes: Tensor) -> Tensor:
    """-0 as +0: a device may lose the sign of zero, which no product shows."""
    return codes.masked_fill(codes == 8, 0)


def _check_even(x: Tensor) -> None:
    if x.shape[-1] % 2:
        raise ValueError(
            f"the NPU packs two codes a byte along the last dimension, so that must be even; this "
            f"tensor has shape {tuple(x.shape)}. Exclude the layer (quant.exclude)"
        )
