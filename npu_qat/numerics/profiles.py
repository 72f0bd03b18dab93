"""Named numerics profiles: every choice that decides which bytes a 4-bit tensor gets.

"MXFP4" alone does not name a set of numbers. The formats agree on the element (E2M1: sign, two
exponent bits, one mantissa bit, so 0, 0.5, 1, 1.5, 2, 3, 4, 6) and on a scale shared by a block,
but producers differ in how the scale follows from the block's largest magnitude, in which way
ties go, and in what happens to zeros, NaN, Inf and very small blocks. On ordinary data such a
difference changes between 0.7 % (ties only) and 12 % (scale rule) of all elements, which is
enough to make a model trained in one stack wrong in another. A `Profile` fixes all of it under
one name; the rest of `numerics` is arithmetic that reads these fields.

This file is data and imports no torch, so that configuration can be checked without loading it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

Rounding = Literal[
    "half_even",
    "half_away",
    "half_down",
    "toward_zero",
    "toward_minus_inf",
    "stochastic",
]
ScaleRule = Literal[
    "floor",
    "even",
    "ceil",
    "rceil",
    "above_1.75",
    "mse",
    "msmodelslim",
    "quant_compute",
    "e4m3",
    "e4m3_clamped_carry",
]

ROUNDINGS: dict[str, str] = {
    "half_even": "to nearest, ties to the even code (IEEE; the op's round_mode 'rint')",
    "half_away": "to nearest, ties away from zero (the op's round_mode 'round')",
    "half_down": "to nearest, ties to the smaller magnitude",
    "toward_zero": "truncation",
    "toward_minus_inf": "towards minus infinity (the op's round_mode 'floor')",
    "stochastic": "up or down with the probability that makes the expected value exact",
}

SCALE_RULES: dict[str, str] = {
    "floor": "2^(e - 2), e = floor(log2 amax)",
    "even": "2^(e - 2), one binade more if amax >= 1.75 * 2^e",
    "ceil": "2^(ceil(log2 amax) - 2)",
    "rceil": "2^ceil(log2(amax / 6)), which is one binade above floor if amax > 1.5 * 2^e",
    "above_1.75": "2^(e - 2), one binade more if amax > 1.75 * 2^e",
    "mse": "of the floor exponent and its two neighbours the one with the least squared error",
    "msmodelslim": "2^(floor(log2(amax * 8/7 + 9.6e-7)) - 2), evaluated in the input's dtype",
    "quant_compute": "2^(floor(log2(amax + 9.6e-7)) - 2), the sum evaluated in fp32",
    "e4m3": "E4M3 number nearest to amax / 6 (under the tensor scale, if there is one)",
    "e4m3_clamped_carry": "as e4m3, mantissa carry clamped to 1.875, exponent held in [-6, 8]",
}


@dataclass(frozen=True)
class Profile:
    """One way of turning numbers into 4-bit codes and block scales.

    Attributes:
        name: the profile's name, unique.
        doc: one paragraph for people; shown by the documentation page.
        block_size: elements that share one scale, along the blocked axis.
        scale_format: `"e8m0"` (a power of two, byte = exponent + 127, 0xFF is NaN), `"e4m3"`
            (OCP FP8, 0x7F is NaN) or `"e4m3_480"` (E4M3 bits whose 0x7F means 480; 0xFF is NaN).
        scale_rule: how the block's scale follows from its largest magnitude (`SCALE_RULES`).
        rounding: how an element is rounded to the E2M1 grid (`ROUNDINGS`).
        flush: True: a block whose scale byte is 0 holds only signed zeros (the Ascend kernel).
        inf: `"nan"`: a block that holds an infinity decodes to NaN; `"saturate"`: infinities
            become +-6 under the largest scale; `"error"`: refused with ValueError.
        nan: `"nan"`: a block that holds a NaN decodes to NaN; `"error"`: refused.
        top_binade: largest biased exponent (after the scale rule's bump) that is still a number;
            beyond it the block is NaN. 254 belongs to the largest finite fp32 values, 255 is
            reached by a bump at the very top.
        quotient: `"reciprocal"`: elements are multiplied by the fp32 reciprocal of the scale;
            `"division"`: divided by it. The same for powers of two, not for E4M3 scales.
        tensor_scale: True: block scales are relative to one fp32 scale of the whole tensor.
        level0_block: elements that share a first-level fp32 scale (0: there is no such level).
        weights_only: True: defined for weights, not for activations.
        forced_axis: the only axis that the profile's producer supports, or None.
    """

    name: str
    doc: str
    block_size: int = 32
    element: str = "e2m1"
    scale_format: Literal["e8m0", "e4m3", "e4m3_480"] = "e8m0"
    scale_rule: ScaleRule = "floor"
    rounding: Rounding = "half_even"
    flush: bool = False
    inf: Literal["nan", "saturate", "error"] = "nan"
    nan: Literal["nan", "error"] = "nan"
    top_binade: int = 255
    quotient: Literal["reciprocal", "division"] = "reciprocal"
    tensor_scale: bool = False
    level0_block: int = 0
    weights_only: bool = False
    forced_axis: int | None = None

    def with_rounding(self, rounding: Rounding) -> Profile:
        """The same profile with another element rounding, named `<name>+<rounding>`.

        For experiments (stochastic rounding, above all). The result is not in `PROFILES`: no
        serving stack is known to produce its bytes. Raises ValueError for an unknown rounding.
        """
        if rounding not in ROUNDINGS:
            raise ValueError(
                f"unknown rounding {rounding!r}; choose one of {', '.join(sorted(ROUNDINGS))}"
            )
        return replace(self, name=f"{self.name}+{rounding}", rounding=rounding)


_OCP = Profile(
    name="ocp",
    doc="OCP Microscaling as written: floor scale, ties to even, scale exponent clamped to "
    "[-127, 127], NaN or Inf makes the whole block NaN.",
)
_ASCEND = Profile(
    name="ascend950",
    doc="npu_dynamic_mx_quant on Ascend 950 with scale_alg 0 and round_mode 'round', as "
    "vllm-ascend calls it for activations; weights by the same rule.",
    rounding="half_away",
    flush=True,
)
_ASCEND_ALG2 = replace(
    _ASCEND,
    name="ascend950-alg2",
    doc="The op with scale_alg 2 and dst_type_max 0 or 6: no element is clipped. The threshold is "
    "applied to the exact input; the op itself truncates fp32 input to 16 bits first.",
    scale_rule="rceil",
)
_ASCEND_MAX7 = replace(
    _ASCEND,
    name="ascend950-alg2-max7",
    doc="The op with scale_alg 2 and dst_type_max 7: only values above 7 scales are clipped "
    "more. Threshold on the exact input, as for ascend950-alg2.",
    scale_rule="above_1.75",
)
_NVFP4 = Profile(
    name="nvfp4",
    doc="NVFP4 with two levels: blocks of 16, E4M3 scale relative to an fp32 tensor scale "
    "amax / 2688. The tensor scale comes from the tensor's finite values unless it is given "
    "(activations in training should use a calibrated, stored one).",
    block_size=16,
    scale_format="e4m3",
    scale_rule="e4m3",
    tensor_scale=True,
)


_FORK_NVFP4 = Profile(
    name="fork-nvfp4-row",
    doc="NVFP4 of the earlier public code, bug for bug: one level, blocks along `in`, scale "
    "amax / 6 with its exponent held in [-6, 8] (no subnormals) and its mantissa rounded to 3 "
    "bits with the carry cut at 1.875, so up to 480; ties to the smaller magnitude; an infinity "
    "saturates. The scale's exponent is read from the bits of the fp32 quotient.",
    block_size=16,
    scale_format="e4m3_480",
    scale_rule="e4m3_clamped_carry",
    rounding="half_down",
    quotient="division",
    inf="saturate",
    forced_axis=-1,
)


def _round_modes(base: Profile) -> list[Profile]:
    """The op's three round modes of one scale rule; `base` has the default, 'round'."""
    return [
        base,
        replace(
            base,
            name=f"{base.name}-rint",
            doc=f"{base.name} with round_mode 'rint': ties to even.",
            rounding="half_even",
        ),
        replace(
            base,
            name=f"{base.name}-floor",
            doc=f"{base.name} with round_mode 'floor': elements towards minus infinity.",
            rounding="toward_minus_inf",
        ),
    ]


_ALL: list[Profile] = [
    _OCP,
    replace(_OCP, name="ocp-even", scale_rule="even", doc="`ocp` with the even scale rule."),
    replace(_OCP, name="ocp-ceil", scale_rule="ceil", doc="`ocp` with the ceil scale rule."),
    replace(_OCP, name="ocp-rceil", scale_rule="rceil", doc="`ocp` with the rceil scale rule."),
    *_round_modes(_ASCEND),
    *_round_modes(_ASCEND_ALG2),
    *_round_modes(_ASCEND_MAX7),
    replace(
        _ASCEND,
        name="ascend950-mse",
        doc="Weights for the same op: of the floor exponent and its two neighbours the one with "
        "the least squared error (float64, summed in element order, ties to the smaller), byte in "
        "[1, 254]. Activations stay `ascend950`.",
        scale_rule="mse",
        inf="error",
        nan="error",
        weights_only=True,
    ),
    replace(
        _ASCEND,
        name="ascend950-dual",
        doc="Emulation of npu_dynamic_dual_level_mx_quant, round_mode 'rint': an fp32 scale "
        "amax / 6 for 512 elements (NaN and Inf left out, subnormal becomes 0), the quotient "
        "rounded to the input's 16-bit dtype (bf16 for fp32 input), then scale_alg 0 on blocks "
        "of 32. A non-zero element under a level-0 scale of 0 makes its block NaN, as in the "
        "kernel.",
        rounding="half_even",
        level0_block=512,
        forced_axis=-1,
    ),
    replace(
        _OCP,
        name="compressed-tensors",
        doc="Activations of the compressed-tensors reader in transformers and vLLM: the even "
        "rule; a maximum of 1.75 * 2^127 or more makes the block NaN.",
        scale_rule="even",
        top_binade=254,
    ),
    replace(
        _OCP,
        name="torchao-rceil",
        doc="torchao's RCEIL mode: as `ocp-rceil`, but an infinity saturates (element 6 under "
        "scale 2^127, which decodes to Inf) and only NaN makes the block NaN. Below 2^-124 it "
        "follows the exact rule, which torchao's release of 2026 misses.",
        scale_rule="rceil",
        inf="saturate",
    ),
    Profile(
        name="msmodelslim-weight",
        doc="Weights as msmodelslim exports them: the scale rule with its factor 8/7 and its "
        "epsilon, evaluated in the weight's own dtype with a float log2, bug for bug. Elements "
        "half away from zero.",
        scale_rule="msmodelslim",
        rounding="half_away",
        inf="error",
        nan="error",
        weights_only=True,
    ),
    replace(
        _OCP,
        name="fork-mxfp4",
        doc="MXFP4 of the earlier public code: floor scale, ties away from zero, always along "
        "`in`.",
        rounding="half_away",
        forced_axis=-1,
    ),
    _FORK_NVFP4,
    replace(
        _FORK_NVFP4,
        name="fork-nvfp4-column",
        doc="As fork-nvfp4-row with blocks along `out` (dimension -2 of [out, in]), which no "
        "tensor core reads.",
        forced_axis=-2,
    ),
    Profile(
        name="quant-compute-mxfp4",
        doc="MXFP4 of Huawei's HiFloat4 library (`quant_cy`): floor scale of amax + 9.6e-7, so "
        "that no scale is below 2^-22; half away from zero; an infinity saturates under the "
        "largest scale, 2^125. Evaluated in fp32 for every input dtype.",
        scale_rule="quant_compute",
        rounding="half_away",
        inf="saturate",
    ),
    Profile(
        name="quant-compute-nvf4",
        doc="NVFP4 of the same library: one level, E4M3 scale of amax / 6 held to 448, ties to "
        "even, elements divided by the scale; a scale of 0 gives zeros; an infinity saturates. "
        "Evaluated in fp32 for every input dtype.",
        block_size=16,
        scale_format="e4m3",
        scale_rule="e4m3",
        quotient="division",
        inf="saturate",
    ),
    _NVFP4,
    replace(
        _NVFP4,
        name="nvfp4-one-level",
        doc="NVFP4 with the E4M3 block scale alone (tensor scale 1).",
        tensor_scale=False,
    ),
]

PROFILES: dict[str, Profile] = {profile.name: profile for profile in _ALL}


def profile_names() -> list[str]:
    """Names of all profiles, in the order of the documentation table."""
    return list(PROFILES)


def get_profile(name: str) -> Profile:
    """The profile called `name`.

    Raises ValueError that suggests the nearest names if there is none.
    """
    try:
        return PROFILES[name]
    except KeyError:
        near = difflib.get_close_matches(str(name), PROFILES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(
            f"unknown numerics profile {name!r}; {hint}Profiles: {', '.join(PROFILES)}"
        ) from None
