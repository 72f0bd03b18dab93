"""Which numerics profiles the AscendC kernels compute, as the four numbers that they take.

A kernel knows no profile names. It gets the 15 upper bits of a block's largest magnitude (exponent
and 7 bits of mantissa) and four numbers that say what to do with them, see `Mxfp4Rule` in
``kernels_ascendc/include/npu_qat/mxfp4.h``. 15 bits decide the floor and the even rule for every
input type; the rules with a threshold just above a mantissa (`rceil`, `above_1.75`) would need
more for fp16 and fp32, so their profiles are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

from npu_qat.backends.base import BackendUnavailable
from npu_qat.numerics.profiles import PROFILES, Profile, get_profile

_BUMPS = {"floor": 0, "even": 0x20}  # added to the 15 bits before the exponent is taken
_INF_BITS = 0x7F80
_SCALE_OF_BYTE_0 = 0x00400000  # 2^-127 as float bits
_NUDGE = 8  # 2^-20 in the mantissa of a float: sends ties, and nothing else, up


@dataclass(frozen=True)
class KernelRule:
    """The fields of `Mxfp4Rule`, in its order."""

    bump: int
    nan_above: int
    tiny_scale: int
    nudge: int


def kernel_rule(profile: str) -> KernelRule:
    """The numbers for `profile`.

    Raises BackendUnavailable for a profile that the kernels do not compute, naming those they do.
    """
    known = get_profile(profile)
    if not _computable(known):
        raise BackendUnavailable(
            f"the AscendC kernels do not compute profile {profile!r}; they compute "
            f"{', '.join(kernel_profiles())}. Choose one of these, or run.backend: reference."
        )
    bump = _BUMPS[known.scale_rule]
    # Largest bits whose block is still a number; a profile may give up the top binade.
    top = _INF_BITS - 1 - (bump if known.top_binade == 254 else 0)
    return KernelRule(
        bump=bump,
        nan_above=top,
        tiny_scale=0 if known.flush else _SCALE_OF_BYTE_0,
        nudge=_NUDGE if known.rounding == "half_away" else 0,
    )


def kernel_profiles() -> list[str]:
    """Names of the profiles that the kernels compute."""
    return [name for name, profile in PROFILES.items() if _computable(profile)]


def _computable(profile: Profile) -> bool:
    return (
        profile.element == "e2m1"
        and profile.block_size == 32
        and profile.scale_format == "e8m0"
        and profile.scale_rule in _BUMPS
        and profile.rounding in ("half_even", "half_away")
        and profile.inf == profile.nan == "nan"
        and not profile.tensor_scale
        and not profile.level0_block
    )
