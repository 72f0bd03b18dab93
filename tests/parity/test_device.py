"""The conformance kit: a device passes if it computes the reference's numbers, else not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_qat.backends import EmulationBackend
from npu_qat.backends.base import EncodedInput, PackedWeight
from npu_qat.numerics import QuantizedTensor, dequantize, quantize
from npu_qat.parity.device import PROFILES, Entry, Recording, judge, measure, passed, report
from npu_qat.parity.device_cases import CASES, PRODUCTS, Case
from npu_qat.parity.device_recording import read_recording, write_recording
from npu_qat.parity.mismatch import KINDS

PINNED = Path(__file__).parent / "device_inputs.json"
CPU = torch.device("cpu")


class Device(EmulationBackend):
    """A device that multiplies codes, and that may have a fault."""

    def __init__(
        self,
        fault: Callable[[QuantizedTensor, Tensor], QuantizedTensor] = lambda q, x: q,
        product_fault: Callable[[Tensor], Tensor] = lambda y: y,
    ) -> None:
        self.fault, self.product_fault = fault, product_fault

    def quantize(self, x: Tensor, profile: str, axis: int = -1, **kw: Any) -> QuantizedTensor:
        return self.fault(super().quantize(x, profile, axis, **kw), x)

    def check_fused(self, *arguments: object) -> None:
        pass

    def encode_input(self, x: Tensor, profile: str) -> EncodedInput:
        values = dequantize(quantize(x, profile), torch.float32)
        return EncodedInput(values, values, x.shape, x.dtype, profile)

    def decode_input(self, encoded: EncodedInput) -> Tensor:
        return encoded.codes

    def prepare_weight(self, weight: PackedWeight) -> object:
        return dequantize(weight.unpack(), torch.float32)

    def fused_linear(
        self, x: EncodedInput, weight: object, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        y = x.codes @ weight.t()
        y = y if bias is None else y + bias.float()
        return self.product_fault(y.to(out_dtype))


def run(backend: Any, *names: str, profile: str = "ascend950") -> tuple[Recording, list]:
    recording = measure(
        backend, CPU, profiles=[profile], wanted=lambda name: name in names, large=False
    )
    assert [e.case for e in recording.entries] == list(names)
    return recording, judge(recording)


# --- the suite ------------------------------------------------------------------------------------


def test_released_inputs_never_change() -> None:
    """A new case: add its digest to the file. A changed one: give it another name instead."""
    pinned = json.loads(PINNED.read_text(encoding="utf-8"))
    made = {case.name: case.digest() for case in (*CASES, *PRODUCTS)}
    assert {name: made.get(name) for name in pinned} == pinned
    assert set(made) == set(pinned)


def test_the_suite_holds_every_pattern_and_every_size() -> None:
    cases = {case.name: case for case in CASES}
    assert len(cases) + len(PRODUCTS) == len({c.name for c in (*CASES, *PRODUCTS)})
    for name in ("patterns-in-order", "patterns-under-1.0", "fp16-patterns"):
        assert cases[name].make().view(torch.int16).unique().numel() == 65536
    shapes = {tuple(case.make().shape) for case in CASES if case.large}
    assert (1536, 8960) in shapes and (8960, 1536) in shapes
    ties = quantize(cases["ties"].make(), "ascend950").codes
    assert (ties != quantize(cases["ties"].make(), "ascend950-rint").codes).sum() > 400
    for rule in ("alg2", "alg2-max7"):
        x = cases["thresholds"].make()
        other = quantize(x, f"ascend950-{rule}").scales
        assert (quantize(x, "ascend950").scales != other).sum() > 50
    specials = quantize(cases["specials"].make(), "ascend950").scales[:, 1]
    assert {0, 1, 255} <= set(specials.tolist())
    assert all(not case.make().isnan().any() for case in CASES if case.large)


@pytest.mark.parametrize("product", [p for p in PRODUCTS if p.exact], ids=lambda p: p.name)
def test_sums_that_are_called_exact_are(product: Any) -> None:
    """Any order of summation gives the same bits, because every partial sum is representable."""
    x, w, bias = product.make()
    for t in (x, w):
        assert torch.equal(dequantize(quantize(t, "ascend950"), torch.float32), t.float())
    terms = x.float().reshape(-1, 1, x.shape[-1]) * w.float()
    step = 2.0**-4
    assert torch.equal((terms / step).round() * step, terms)
    assert terms.abs().sum(-1).max() + 8 < 2**24 * step
    assert bias is None or torch.equal((bias.float() / step).round() * step, bias.float())


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_the_emulation_passes_its_own_suite(profile: str) -> None:
    recording = measure(Device(), CPU, profiles=[profile], large=False)
    verdicts = judge(recording)
    assert passed(verdicts), report(recording, verdicts)
    assert not any(v.refused for v in verdicts)
    assert sum(v.mismatches.elements for v in verdicts) > 400_000


def scale_up(q: QuantizedTensor, x: Tensor) -> QuantizedTensor:
    """Every third scale byte one too large, codes as they were."""
    scales = q.scales.clone()
    scales.view(-1)[::3] += 1
    return replace(q, scales=scales)


def other_ties(q: QuantizedTensor, x: Tensor) -> QuantizedTensor:
    return replace(quantize(x, "ascend950-rint", q.axis), profile=q.profile)


def no_clipping_to_6(q: QuantizedTensor, x: Tensor) -> QuantizedTensor:
    """Numbers beyond 6 scales become 4, as if the exponent had wrapped."""
    scale = torch.exp2(q.scales.double() - 127).repeat_interleave(32, -1)[..., : x.shape[-1]]
    beyond = (x.double().abs() > 6 * scale) & (q.scales != 255).repeat_interleave(32, -1)[
        ..., : x.shape[-1]
    ]
    return replace(q, codes=torch.where(beyond, q.codes & 8 | 6, q.codes))


def positive_zeros(q: QuantizedTensor, x: Tensor) -> QuantizedTensor:
    return replace(q, codes=torch.where(q.codes == 8, 0, q.codes).to(torch.uint8))


def no_flush(q: QuantizedTensor, x: Tensor) -> QuantizedTensor:
    """Tiny blocks keep their numbers, as the format's standard has it."""
    return replace(quantize(x, "fork-mxfp4", q.axis), profile=q.profile)


def damaged(q: QuantizedTensor, x: Tensor) -> QuantizedTensor:
    codes = q.codes.clone()
    codes.view(-1)[5] ^= 0b0111
    return replace(q, codes=codes)


@pytest.mark.parametrize(
    ("fault", "case", "kinds"),
    [
        (scale_up, "activation-16x8960", {"scale off by one"}),
        (other_ties, "ties", {"tie"}),
        (no_clipping_to_6, "ties", {"clip"}),
        (positive_zeros, "specials", {"sign of zero"}),
        (no_flush, "specials", {"flush"}),
        (damaged, "shape-4x96-axis-1", {"other"}),
    ],
)
def test_each_fault_is_found_and_named(fault: Any, case: str, kinds: set[str]) -> None:
    recording, (verdict,) = run(Device(fault), case)
    assert not verdict.equal and not passed([verdict])
    assert set(verdict.mismatches.codes) | set(verdict.mismatches.scales) == kinds
    assert kinds <= set(KINDS)
    assert next(iter(kinds)) in report(recording, [verdict])


def test_the_first_differing_block_is_shown_with_its_raw_input() -> None:
    _, (verdict,) = run(Device(damaged), "shape-4x96-axis-1")
    case = next(c for c in CASES if c.name == "shape-4x96-axis-1")
    x, codes = case.make(), quantize(case.make(), "ascend950").codes
    words = [f"{int(b) & 0xFFFF:04x}" for b in x[0, :32].view(torch.int16)]
    lines = verdict.detail.splitlines()
    assert lines[2].split()[-32:] == words
    assert lines[3].split()[-32:] == [f"{int(c):x}" for c in codes[0, :32]]
    assert lines[5].split() == ["."] * 5 + ["^"] + ["."] * 26


def test_a_block_along_another_axis_is_shown() -> None:
    def fault(q: QuantizedTensor, x: Tensor) -> QuantizedTensor:
        codes = q.codes.clone()
        codes[40, 3] ^= 7
        return replace(q, codes=codes)

    _, (verdict,) = run(Device(fault), "shape-96x4-axis0")
    assert "block 1 of line [3]" in verdict.detail
    assert verdict.detail.splitlines()[-1].split().index("^") == 8


@pytest.mark.parametrize("case", [p.name for p in PRODUCTS if not p.large])
def test_a_wrong_product_is_found(case: str) -> None:
    def one_off(y: Tensor) -> Tensor:
        y = y.clone()
        flat = y.view(-1)
        flat[-1] = (
            torch.nextafter(flat[-1], flat[-1] * torch.inf) if case.startswith("exact") else 2
        )
        return y

    assert run(Device(), case)[1][0].equal
    _, (verdict,) = run(Device(product_fault=one_off), case)
    assert not verdict.equal and "1 of " in verdict.detail


def test_one_wrong_scale_in_a_real_layer_s_product_is_beyond_the_tolerance() -> None:
    product = next(p for p in PRODUCTS if p.name == "down-4x1536x8960")
    x, w, _ = product.make()
    q = quantize(w, "ascend950")
    scales = q.scales.clone()
    scales[7, 100] += 1
    a = dequantize(quantize(x, "ascend950"), torch.float32)
    right = a @ dequantize(q, torch.float32).t()
    wrong = a @ dequantize(replace(q, scales=scales), torch.float32).t()
    entry = Entry(product.name, "ascend950", "product", product.digest())
    backend = {"name": "test"}
    for y, good in ((right, True), (wrong, False)):
        recording = Recording(1, "cpu", backend, {}, [replace(entry, tensors={"y": y})])
        assert passed(judge(recording)) is good


def test_the_tolerance_of_a_product_is_8_units() -> None:
    product = next(p for p in PRODUCTS if p.name == "tail-4x16x80")
    x, w, _ = product.make()
    a, b = (dequantize(quantize(t, "ascend950"), torch.float32).double() for t in (x, w))
    unit = (a.abs() @ b.abs().t()) * 80**0.5 * 2.0**-24
    entry = Entry(product.name, "ascend950", "product", product.digest())
    for units, good in ((6, True), (-6, True), (12, False), (-12, False)):
        y = (a @ b.t() + units * unit).float()
        recording = Recording(1, "cpu", {"name": "x"}, {}, [replace(entry, tensors={"y": y})])
        assert passed(judge(recording)) is good, units


def test_nan_products_are_wrong() -> None:
    nan = Device(product_fault=lambda y: y * torch.nan)
    for case in ("exact-4x16x128", "tail-4x16x80"):
        assert not run(nan, case)[1][0].equal


@pytest.mark.parametrize(
    ("method", "words"), [("fake_quant", "fake-quant"), ("dequantize", "decoding its own codes")]
)
def test_values_are_compared_beside_the_codes(
    method: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(Device, method)
    monkeypatch.setattr(Device, method, lambda *args, **kw: right(*args, **kw) * 2)  # 8 are zeros
    _, (verdict,) = run(Device(), "shape-3x30-axis-1")
    assert not verdict.equal and verdict.mismatches.total == 0
    assert f"{words}: 82 of 90 values differ" in verdict.detail


def test_a_nan_of_another_kind_is_no_difference() -> None:
    class OtherNan(Device):
        def fake_quant(self, x: Tensor, *arguments: Any, **kw: Any) -> Tensor:
            values = super().fake_quant(x, *arguments, **kw)
            other = torch.tensor([-1], dtype=torch.int16).view(values.dtype)  # sign and payload set
            return torch.where(values.isnan(), other, values)

    _, (verdict,) = run(OtherNan(), "specials")
    assert verdict.equal, verdict.detail


def test_level_0_scales_are_compared() -> None:
    def fault(q: QuantizedTensor, x: Tensor) -> QuantizedTensor:
        assert q.level0_scales is not None
        return replace(q, level0_scales=q.level0_scales * 2)

    _, (verdict,) = run(Device(fault), "shape-3x1056-axis-1", profile="ascend950-dual")
    assert not verdict.equal and "9 of 9 level-0 scales differ" in verdict.detail
    _, (verdict,) = run(Device(damaged), "shape-3x1056-axis-1", profile="ascend950-dual")
    assert verdict.mismatches.total == 1


def test_a_refusal_is_reported_and_is_no_pass() -> None:
    recording, verdicts = run(EmulationBackend(), "exact-one-row")
    assert verdicts[0].refused and not passed(verdicts)
    assert "does not multiply codes" in report(recording, verdicts)
    assert not passed([])


# --- recordings -----------------------------------------------------------------------------------


def recorded(tmp_path: Path, backend: Any, *names: str) -> Path:
    recording, verdicts = run(backend, *names)
    path = tmp_path / "device.json"
    assert write_recording(path, recording, verdicts) == [path, path.with_suffix(".safetensors")]
    return path


def test_a_recording_replays(tmp_path: Path) -> None:
    path = recorded(tmp_path, Device(), "ties", "specials", "exact-3d", "tail-4x16x80")
    again = read_recording(path)
    assert passed(judge(again)) and len(again.entries) == 4
    assert "packed" in again.entries[0].tensors and "values" not in again.entries[0].tensors
    assert path.with_suffix(".safetensors").stat().st_size < 100_000


def test_a_recorded_difference_is_kept_and_named_again(tmp_path: Path) -> None:
    recording, verdicts = run(Device(other_ties), "ties")
    path = tmp_path / "device.json"
    write_recording(path, recording, verdicts)
    (verdict,) = judge(read_recording(path))
    assert verdict.detail == verdicts[0].detail and set(verdict.mismatches.codes) == {"tie"}


def test_large_tensors_that_are_equal_are_kept_as_digests(tmp_path: Path) -> None:
    large = next(case for case in CASES if case.name == "weight-1536x1536")
    recording = measure(Device(), CPU, profiles=["ascend950"], wanted=large.name.__eq__)
    path = tmp_path / "device.json"
    write_recording(path, recording, judge(recording))
    again = read_recording(path)
    assert "packed" not in again.entries[0].tensors and passed(judge(again))
    wrong = replace(again.entries[0], digests={**again.entries[0].digests, "packed": "0"})
    (verdict,) = judge(replace(again, entries=[wrong]))
    assert not verdict.equal and "packed" in verdict.detail


def test_digests_of_a_large_dual_level_tensor_cover_its_level_0_scales() -> None:
    recording = measure(
        Device(), CPU, profiles=["ascend950-dual"], wanted="weight-1536x1536".__eq__
    )
    (entry,) = recording.entries
    entry = replace(entry, tensors={})  # as if too large to be kept
    assert passed(judge(replace(recording, entries=[entry])))
    wrong = replace(entry, digests={**entry.digests, "level0_scales": "0"})
    (verdict,) = judge(replace(recording, entries=[wrong]))
    assert not verdict.equal and "level0_scales" in verdict.detail


def test_whatever_differs_is_kept_whole(tmp_path: Path) -> None:
    recording = measure(
        Device(damaged), CPU, profiles=["ascend950"], wanted="weight-1536x1536".__eq__
    )
    verdicts = judge(recording)
    path = tmp_path / "device.json"
    write_recording(path, recording, verdicts)
    again = read_recording(path)
    assert set(again.entries[0].tensors) == {"packed", "scales", "values", "decoded"}
    (verdict,) = judge(again)
    assert verdict.detail == verdicts[0].detail and verdict.mismatches.total == 1


def test_damage_is_found(tmp_path: Path) -> None:
    path = recorded(tmp_path, Device(), "ties")
    tensors = path.with_suffix(".safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_recording(path)
    tensors.unlink()
    with pytest.raises(ValueError, match="two files"):
        read_recording(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something else"}, "not a recording"),
        ({"version": 99}, "version 99"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = recorded(tmp_path, Device(), "ties")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        read_recording(path)


def test_a_recording_with_other_inputs_or_unknown_cases_is_refused() -> None:
    recording, _ = run(Device(), "ties")
    (entry,) = recording.entries
    with pytest.raises(ValueError, match="newer npu-qat"):
        judge(replace(recording, entries=[replace(entry, case="of-tomorrow")]))
    with pytest.raises(ValueError, match="another input"):
        judge(replace(recording, entries=[replace(entry, input="0" * 64)]))


def test_cases_are_read_only_by_convention_and_digests_see_every_bit() -> None:
    case = Case("x", lambda: torch.zeros(2, 32, dtype=torch.bfloat16))
    other = Case("x", lambda: -torch.zeros(2, 32, dtype=torch.bfloat16))
    assert case.digest() != other.digest()
    assert case.make() is case.make()
