"""Which numerics profiles the MX operators compute, and with which arguments.

A profile says what the numbers are; the operators have three knobs. The table is derived from the
profiles' own fields, so that a new profile is either the operator's numbers or refused:

=====================  ==================================================
profile field          argument
=====================  ==================================================
rounding half_even     round_mode "rint"
rounding half_away     round_mode "round"
... toward_minus_inf   round_mode "floor"
scale_rule floor       scale_alg 0
scale_rule rceil       scale_alg 2 (dst_type_max 0, the same as 6)
scale_rule above_1.75  scale_alg 2, dst_type_max 7
level0_block 512       the dual-level operator, which has scale_alg 0 only
=====================  ==================================================

Everything else (``flush``, a NaN block for NaN and Inf, blocks of 32, E8M0) is what the kernels
always do; a profile that differs in it, such as ``ocp``, which does not flush, is another format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from npu_qat.numerics.profiles import PROFILES, Profile

ROUND_MODES = {"half_even": "rint", "half_away": "round", "toward_minus_inf": "floor"}
SCALE_ALGORITHMS = {"floor": (0, 0.0), "rceil": (2, 0.0), "above_1.75": (2, 7.0)}
LEVEL0_BLOCK = 512


@dataclass(frozen=True)
class MxCall:
    """Arguments that make an operator compute a profile.

    Attributes:
        round_mode, scale_alg, dst_type_max: of ``npu_dynamic_mx_quant``.
        dual_level: True: ``npu_dynamic_dual_level_mx_quant``, which takes ``round_mode`` only.
    """

    round_mode: str
    scale_alg: int
    dst_type_max: float
    dual_level: bool


def mx_call(profile: Profile) -> MxCall | None:
    """The call that computes ``profile``, or None if no operator does."""
    kernel = profile.flush and (profile.inf, profile.nan) == ("nan", "nan")
    round_mode = ROUND_MODES.get(profile.rounding)
    algorithm = SCALE_ALGORITHMS.get(profile.scale_rule)
    if not is_mx(profile) or not kernel or round_mode is None or algorithm is None:
        return None
    dual_level = bool(profile.level0_block)
    if dual_level and algorithm != (0, 0.0):
        return None
    return MxCall(round_mode, *algorithm, dual_level)


def is_mx(profile: Profile) -> bool:
    """Whether the matmul can read codes and scales of ``profile``, whoever encoded them."""
    return (
        profile.element == "e2m1"
        and profile.block_size == 32
        and profile.scale_format == "e8m0"
        and not profile.tensor_scale
        and profile.level0_block in (0, LEVEL0_BLOCK)
    )


def takes(call: MxCall, dtype: torch.dtype) -> bool:
    """Whether the operator computes the profile's numbers from ``dtype``.

    bf16 always. fp16 with scale_alg 0: with 2 the kernel compares the maximum rounded to bf16 with
    its threshold, the profile the exact one. fp32 never: it needs a newer CANN than the oldest
    supported.
    """
    return dtype == torch.bfloat16 or (dtype == torch.float16 and call.scale_alg == 0)


def computed_profiles() -> list[str]:
    """Names of the profiles that have an operator."""
    return [name for name, profile in PROFILES.items() if mx_call(profile) is not None]
