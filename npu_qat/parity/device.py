"""The conformance kit: does a device compute the numbers that the emulation computes?

    recording = measure(backend, device)      on the device: raw codes, scale bytes, products
    verdicts = judge(recording)               anywhere: each compared with the reference

The two halves are apart on purpose. What a device answered is written down as it was
(``device_recording``), and judging needs nothing but that and this package: so somebody with the
hardware sends two files, and everybody else replays them, now and after every later change of the
emulation.

Codes and scale bytes are compared for equality, one by one, and each difference gets a cause
(``mismatch``). For products of codes there are two kinds of case. Where every partial sum is exact
in fp32, any correct order of summation gives the same bits, and they are demanded. Elsewhere an
fp32 sum of K products may differ from the exact one by about

    sqrt(K) * 2^-24 * sum |x w|

(the probabilistic bound of Higham and Mary, 2019: rounding errors of random sign grow with the
square root of their number); 8 times that is accepted, which a wrong scale of a single block
exceeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from npu_qat.backends.base import Backend, BackendUnavailable, FusedBackend, PackedWeight
from npu_qat.numerics import QuantizedTensor, dequantize, fake_quant, get_profile, quantize
from npu_qat.numerics.dual_level import level0_quotient
from npu_qat.parity.device_cases import CASES, PRODUCTS, SUITE_VERSION, Case, Product, digest
from npu_qat.parity.mismatch import Example, Mismatches, compare_codes

PROFILES = (
    "ascend950",
    "ascend950-rint",
    "ascend950-floor",
    "ascend950-alg2",
    "ascend950-alg2-rint",
    "ascend950-alg2-floor",
    "ascend950-alg2-max7",
    "ascend950-alg2-max7-rint",
    "ascend950-alg2-max7-floor",
    "ascend950-dual",
)
# Profiles whose products are tried; large cases run under the first profile alone.
PRODUCT_PROFILES = ("ascend950", "ascend950-dual")
SAFETY = 8.0
"""Accepted error of a product, in units of ``sqrt(K) * 2^-24 * sum |x w|``."""

CODES, PRODUCT = "codes", "product"
_CASES = {case.name: case for case in CASES}
_PRODUCTS = {product.name: product for product in PRODUCTS}


@dataclass(frozen=True)
class Entry:
    """What a device answered in one case under one profile.

    Attributes:
        case: name of a ``Case`` or a ``Product``.
        profile: name of the numerics profile.
        kind: ``codes`` or ``product``.
        input: digest of the input.
        refused: the backend's message if it does not compute this; then there is nothing else.
        digests: name of a tensor -> its digest.
        tensors: the tensors themselves, as far as they are kept: ``packed`` codes, ``scales``,
            ``level0_scales``, ``values`` (fake-quant) and ``decoded`` (the codes dequantised, both
            in the input's dtype) of codes; ``y`` of a product.
    """

    case: str
    profile: str
    kind: str
    input: str
    refused: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Recording:
    """Everything a device answered.

    Attributes:
        suite: version of the set of cases it was made with.
        device: torch's name of the device.
        backend: what ``Backend.describe`` says.
        environment: versions and names, whatever the caller knows.
        entries: in the order of the suite.
    """

    suite: int
    device: str
    backend: Mapping[str, str]
    environment: Mapping[str, str]
    entries: Sequence[Entry]

    @property
    def stubbed(self) -> bool:
        """Whether CPU kernels stood in for the device's operators."""
        return self.backend.get("soc") == "stubbed"


@dataclass(frozen=True)
class Verdict:
    """One entry, judged.

    Attributes:
        entry: what was judged.
        equal: whether it is what the reference computes; False for what was refused.
        mismatches: differing codes and scales, where codes were compared.
        detail: what there is to say, for people; "" if all is equal.
    """

    entry: Entry
    equal: bool
    mismatches: Mismatches = field(default_factory=Mismatches)
    detail: str = ""

    @property
    def refused(self) -> bool:
        return self.entry.refused is not None


# --- on the device --------------------------------------------------------------------------------


def measure(
    backend: Backend,
    device: torch.device,
    *,
    environment: Mapping[str, str] | None = None,
    profiles: Sequence[str] = PROFILES,
    wanted: Callable[[str], bool] = lambda name: True,
    large: bool = True,
    progress: Callable[[str, str], None] = lambda profile, case: None,
) -> Recording:
    """Let ``backend`` compute the suite on ``device``.

    Args:
        backend: any backend; one without a matmul of codes refuses the products.
        device: where its tensors live.
        environment: goes into the recording.
        profiles: names of numerics profiles.
        wanted: which cases, by name.
        large: whether to run the cases in the size of real layers.
        progress: is told profile and case of what runs now.

    Errors of the device other than ``BackendUnavailable`` and ``ValueError`` are not caught: a
    crash is a result too, but not one to be recorded as a number.
    """
    entries = []
    for case, profile in _plan(profiles, wanted, large):
        progress(profile, case.name)
        kind = CODES if isinstance(case, Case) else PRODUCT
        entry = Entry(case.name, profile, kind, case.digest())
        try:
            tensors = _answer(backend, device, case, profile)
        except (BackendUnavailable, ValueError) as error:
            entries.append(replace(entry, refused=str(error)))
            continue
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        digests = {name: digest(_one_nan(t)) for name, t in tensors.items()}
        entries.append(replace(entry, digests=digests, tensors=tensors))
    described = {"name": backend.name, **backend.describe()}
    return Recording(SUITE_VERSION, str(device), described, environment or {}, entries)


def _plan(
    profiles: Sequence[str], wanted: Callable[[str], bool], large: bool
) -> Iterator[tuple[Case | Product, str]]:
    for profile in profiles:
        get_profile(profile)
        fitting = [c for c in CASES if c.axis == -1 or not get_profile(profile).level0_block]
        cases: list[Case | Product] = [*fitting]
        if profile in PRODUCT_PROFILES:
            cases += PRODUCTS
        for case in cases:
            runs = not case.large or (large and profile == profiles[0])
            if runs and wanted(case.name):
                yield case, profile


def _answer(
    backend: Backend, device: torch.device, case: Case | Product, profile: str
) -> dict[str, Tensor]:
    if isinstance(case, Case):
        return _codes(backend, device, case, profile)
    return _product(backend, device, case, profile)


def _codes(backend: Backend, device: torch.device, case: Case, profile: str) -> dict[str, Tensor]:
    backend.check_profile(profile)
    x = case.make().to(device)
    q = backend.quantize(x, profile, case.axis)
    tensors = {"packed": q.packed, "scales": q.scales}
    if q.level0_scales is not None:
        tensors["level0_scales"] = q.level0_scales
    stored = PackedWeight.of(q) if x.dim() == 2 else q
    return {
        **tensors,
        "values": backend.fake_quant(x, profile, case.axis),
        "decoded": backend.dequantize(stored, x.dtype),
    }


def _product(
    backend: Backend, device: torch.device, case: Product, profile: str
) -> dict[str, Tensor]:
    if not isinstance(backend, FusedBackend):
        raise BackendUnavailable(f"backend {backend.name!r} does not multiply codes")
    x, weight, bias = case.make()
    backend.check_fused(profile, profile, x.shape[-1], weight.shape[0])
    packed = PackedWeight.of(quantize(weight, profile))
    on_device = replace(
        packed,
        packed=packed.packed.to(device),
        scales=packed.scales.to(device),
        level0_scales=None if packed.level0_scales is None else packed.level0_scales.to(device),
    )
    y = backend.fused_linear(
        backend.encode_input(x.to(device), profile),
        backend.prepare_weight(on_device),
        None if bias is None else bias.to(device),
        _out_dtype(case, profile),
    )
    return {"y": y}


def _out_dtype(case: Product, profile: str) -> torch.dtype:
    """The dual-level matmul has 16-bit results only."""
    return torch.bfloat16 if get_profile(profile).level0_block else case.out_dtype


# --- anywhere -------------------------------------------------------------------------------------


def judge(recording: Recording) -> list[Verdict]:
    """Compare each entry with the reference.

    Raises ValueError if an entry names a case that does not exist here, or an input that is not
    the one that this version makes.
    """
    return [judge_entry(entry) for entry in recording.entries]


def judge_entry(entry: Entry) -> Verdict:
    """The verdict on one entry; errors as for ``judge``."""
    known: Mapping[str, Case | Product] = _CASES if entry.kind == CODES else _PRODUCTS
    if entry.case not in known:
        raise ValueError(
            f"case {entry.case!r} does not exist in suite {SUITE_VERSION}: was this recorded with "
            "a newer npu-qat? Update and replay again."
        )
    case = known[entry.case]
    if case.digest() != entry.input:
        raise ValueError(
            f"case {entry.case!r}: this version makes another input than the one recorded. A "
            "released case must never change."
        )
    if entry.refused is not None:
        return Verdict(entry, False, detail=f"refused: {entry.refused}")
    if isinstance(case, Case):
        return _judge_codes(entry, case)
    return _judge_product(entry, case)


def _judge_codes(entry: Entry, case: Case) -> Verdict:
    x = case.make()
    expected = quantize(x, entry.profile, case.axis)
    if "packed" not in entry.tensors:
        return _judge_digests(entry, expected, x)
    found = QuantizedTensor.from_packed(
        entry.tensors["packed"],
        entry.tensors["scales"],
        shape=tuple(x.shape),
        profile=entry.profile,
        axis=case.axis,
        level0_scales=entry.tensors.get("level0_scales"),
    )
    name = f"{entry.case} {entry.profile}"
    values = {
        "values": fake_quant(x, entry.profile, case.axis),
        "decoded": dequantize(found, x.dtype),
    }
    if expected.level0_scales is None:
        source, details = x, list[str]()
    else:
        source, details = _level0(expected, found, x)
        expected, found = _one_level(expected), _one_level(found)
    mismatches = compare_codes(expected, found, source, where=name)
    if mismatches.total:
        details.append(str(mismatches))
    if mismatches.first is not None:
        details.append(show_block(mismatches.first, expected, found, source))
    details += _values(entry, values)
    return Verdict(entry, not details, mismatches, "\n".join(details))


def _level0(
    expected: QuantizedTensor, found: QuantizedTensor, x: Tensor
) -> tuple[Tensor, list[str]]:
    """What the second level quantised, and what is wrong with the first."""
    assert expected.level0_scales is not None and found.level0_scales is not None
    source, _ = level0_quotient(x, expected.profile.level0_block)
    differ = expected.level0_scales.view(torch.int32) != found.level0_scales.view(torch.int32)
    if not differ.any():
        return source, []
    place = tuple(int(i) for i in differ.nonzero()[0])
    a, b = (float(q.level0_scales[place]) for q in (expected, found))  # type: ignore[index]
    count, total = int(differ.sum()), differ.numel()
    return source, [
        f"{count} of {total} level-0 scales differ; first {list(place)}: {a!r}, found {b!r}"
    ]


def _one_level(q: QuantizedTensor) -> QuantizedTensor:
    return replace(q, level0_scales=None, profile=replace(q.profile, level0_block=0))


def _values(entry: Entry, wanted: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the 16-bit values: of fake-quant, and of the codes that were decoded."""
    details = []
    for name, values in wanted.items():
        expected = _one_nan(values)
        what = {"values": "fake-quant", "decoded": "decoding its own codes"}[name]
        if entry.digests[name] == digest(expected):
            continue
        if name not in entry.tensors:
            details.append(f"{what} gives other values; they were not recorded")
            continue
        found = _one_nan(entry.tensors[name])
        differ = _bits(expected) != _bits(found)
        place = tuple(int(i) for i in differ.nonzero()[0])
        details.append(
            f"{what}: {int(differ.sum())} of {differ.numel()} values differ; first {list(place)}: "
            f"{float(expected[place])!r}, found {float(found[place])!r}"
        )
    return details


def _judge_digests(entry: Entry, expected: QuantizedTensor, x: Tensor) -> Verdict:
    values = _one_nan(dequantize(expected, x.dtype))
    wanted = {
        "packed": expected.packed,
        "scales": expected.scales,
        "values": values,
        "decoded": values,
    }
    if expected.level0_scales is not None:
        wanted["level0_scales"] = expected.level0_scales
    wrong = [name for name, t in wanted.items() if digest(t) != entry.digests.get(name)]
    compared = Mismatches(expected.codes.numel(), expected.scales.numel())
    if not wrong:
        return Verdict(entry, True, compared)
    detail = f"{' and '.join(wrong)}: another digest than the reference's; the bytes are not kept"
    return Verdict(entry, False, compared, detail)


def show_block(
    first: Example, expected: QuantizedTensor, found: QuantizedTensor, source: Tensor
) -> str:
    """The block of the first difference: raw input, both sides' codes and scale bytes."""
    size, axis = expected.profile.block_size, expected.axis
    line = list(first.index)
    del line[axis]
    at = tuple(line)
    rows = [t.movedim(axis, -1)[at] for t in (source, expected.codes, found.codes)]
    raw, a, b = (r[first.block * size : (first.block + 1) * size] for r in rows)
    patterns = [f"{int(bits) & 0xFFFF:04x}" for bits in raw.contiguous().view(torch.int16)]
    marks = ["^" if p != q else "." for p, q in zip(a.tolist(), b.tolist(), strict=True)]
    texts = [
        f"  block {first.block} of line {list(at)}: scale byte {first.expected_scale:#04x}, "
        f"found {first.found_scale:#04x} ({first.kind})",
        f"    {str(source.dtype).removeprefix('torch.')} bits  {' '.join(patterns)}",
        "    expected codes " + " ".join(f"{c:x}" for c in a.tolist()),
        "    found codes    " + " ".join(f"{c:x}" for c in b.tolist()),
        "                   " + " ".join(marks),
    ]
    return "\n".join(texts)


def _judge_product(entry: Entry, case: Product) -> Verdict:
    x, weight, bias = case.make()
    a, b = (dequantize(quantize(t, entry.profile), torch.float32).double() for t in (x, weight))
    expected = a @ b.t()
    if bias is not None:
        expected = expected + bias.double()
    if "y" not in entry.tensors:
        raise ValueError(f"{entry.case}: the recording holds no result")
    y, dtype = entry.tensors["y"], _out_dtype(case, entry.profile)
    if y.dtype != dtype or y.shape != expected.shape:
        detail = f"{y.dtype} {tuple(y.shape)} instead of {dtype} {tuple(expected.shape)}"
        return Verdict(entry, False, detail=detail)
    if case.exact and not get_profile(entry.profile).level0_block:
        return _judge_exactly(entry, expected.to(dtype), y)
    unit = (a.abs() @ b.abs().t()) * (x.shape[-1] ** 0.5 * 2.0**-24)
    room = unit * SAFETY + expected.abs() * torch.finfo(dtype).eps / 2
    error = (y.double() - expected).abs()
    worst = float((error / unit).nan_to_num(torch.inf).max())
    bad = ~(error <= room)
    if not bad.any():
        return Verdict(entry, True)
    place = tuple(int(i) for i in bad.nonzero()[0])
    detail = (
        f"{int(bad.sum())} of {bad.numel()} sums are further off than fp32 summation explains "
        f"(worst {worst:.3g} units, {SAFETY:g} accepted); first {list(place)}: "
        f"{float(expected[place])!r}, found {float(y[place])!r}"
    )
    return Verdict(entry, False, detail=detail)


def _judge_exactly(entry: Entry, expected: Tensor, y: Tensor) -> Verdict:
    differ = expected != y
    if not differ.any():
        return Verdict(entry, True)
    place = tuple(int(i) for i in differ.nonzero()[0])
    detail = (
        f"{int(differ.sum())} of {differ.numel()} sums differ where every order of summation gives "
        f"the same bits; first {list(place)}: {float(expected[place])!r}, found "
        f"{float(y[place])!r}"
    )
    return Verdict(entry, False, detail=detail)


def _one_nan(x: Tensor) -> Tensor:
    """``x`` with one bit pattern for all NaN, whose sign and payload mean nothing."""
    return torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


# --- the report -----------------------------------------------------------------------------------


def report(recording: Recording, verdicts: Sequence[Verdict]) -> str:
    """The text that ``npu-qat parity device`` prints: a line a profile, then what differs."""
    backend = ", ".join(f"{k} {v}" for k, v in recording.backend.items())
    lines = [f"suite {recording.suite} on {recording.device} ({backend})"]
    if recording.stubbed:
        lines.append("STUBBED: CPU kernels stood in for the device; this says nothing of hardware")
    for profile in dict.fromkeys(v.entry.profile for v in verdicts):
        own = [v for v in verdicts if v.entry.profile == profile]
        lines.append(f"{profile:26} {_count(own)}")
    for verdict in verdicts:
        if not verdict.equal and not verdict.refused:
            lines.append(f"\n{verdict.entry.profile} {verdict.entry.case}:\n{verdict.detail}")
    for reason in dict.fromkeys(v.detail for v in verdicts if v.refused):
        names = [f"{v.entry.profile} {v.entry.case}" for v in verdicts if v.detail == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"\n{names[0]}{more}:\n  {reason}")
    return "\n".join(lines)


def _count(verdicts: Sequence[Verdict]) -> str:
    total = sum((v.mismatches for v in verdicts), Mismatches())
    refused = sum(v.refused for v in verdicts)
    products = [v for v in verdicts if v.entry.kind == PRODUCT and not v.refused]
    parts = [f"{total.elements} codes, {total.blocks} scales"]
    if products:
        parts.append(f"{len(products)} products")
    wrong = sum(not v.equal and not v.refused for v in verdicts)
    parts.append("equal" if not wrong else f"{wrong} of {len(verdicts) - refused} cases DIFFER")
    if refused:
        parts.append(f"{refused} refused")
    return ", ".join(parts)


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Whether something was compared and nothing differs. What was refused is not a difference."""
    compared = [v for v in verdicts if not v.refused]
    return bool(compared) and all(v.equal for v in compared)
