"""The NPU backend: how the operators are called, what they compute, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from npu_qat.backends import BackendUnavailable, FusedBackend, PackedWeight
from npu_qat.backends.npu import ops as contract
from npu_qat.backends.npu.backend import trial_rows
from npu_qat.backends.npu.profiles import computed_profiles, mx_call
from npu_qat.numerics import PROFILES, dequantize, fake_quant, get_profile, quantize
from npu_qat.parity.device import measure
from tests.backends.fake_npu import FakeNpu, fake_backend, fake_ops

SINGLE = [name for name in computed_profiles() if not get_profile(name).level0_block]


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", computed_profiles())
@pytest.mark.parametrize("length", [64, 72, 96, 1536], ids=str)
def test_codes_scales_and_values_are_those_of_numerics(profile: str, length: int) -> None:
    backend, x = fake_backend(), data(2, 6, length)
    axes = (-1,) if get_profile(profile).level0_block else (-1, 0, 1)
    for axis in axes:
        found, wanted = backend.quantize(x, profile, axis), quantize(x, profile, axis)
        assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scales, wanted.scales)
        assert (found.axis, found.profile) == (wanted.axis, wanted.profile)
        assert torch.equal(backend.fake_quant(x, profile, axis), fake_quant(x, profile, axis))
        packed = PackedWeight.of(quantize(x[0], profile, max(axis - 1, -1)))
        assert torch.equal(
            backend.dequantize(packed, torch.float32),
            dequantize(packed.unpack(), torch.float32),
        )


def test_what_the_operators_compute_is_what_flushes_and_nothing_else() -> None:
    assert len(SINGLE) == 9 and "ascend950-dual" in computed_profiles()
    for name in ("ocp", "fork-mxfp4", "compressed-tensors", "ascend950-mse", "nvfp4"):
        assert mx_call(get_profile(name)) is None
    calls = {mx_call(get_profile(name)) for name in SINGLE}
    assert {(c.round_mode, c.scale_alg, c.dst_type_max) for c in calls if c} == {
        (mode, *algorithm)
        for mode in ("rint", "round", "floor")
        for algorithm in ((0, 0.0), (2, 0.0), (2, 7.0))
    }


@pytest.mark.parametrize("profile", ["ocp", "nvfp4", "ascend950-mse"])
def test_a_profile_that_is_not_computed_is_refused_with_those_that_are(profile: str) -> None:
    backend = fake_backend()
    for attempt in (
        lambda: backend.check_profile(profile),
        lambda: backend.quantize(data(2, 64), profile),
        lambda: backend.encode_input(data(2, 64), profile),
    ):
        with pytest.raises(BackendUnavailable) as caught:
            attempt()
        assert f"do not compute profile '{profile}'" in str(caught.value)
        assert all(name in str(caught.value) for name in computed_profiles())
        assert "--backend reference" in str(caught.value)


@pytest.mark.parametrize(
    ("profile", "dtype", "computed"),
    [
        ("ascend950", torch.bfloat16, True),
        ("ascend950", torch.float16, True),
        ("ascend950", torch.float32, False),
        ("ascend950-alg2", torch.bfloat16, True),
        ("ascend950-alg2", torch.float16, False),
        ("ascend950-dual", torch.float16, True),
    ],
)
def test_only_dtypes_from_which_the_numbers_are_the_profiles_are_taken(
    profile: str, dtype: torch.dtype, computed: bool
) -> None:
    backend, x = fake_backend(), data(2, 64, dtype=dtype)
    if computed:
        assert torch.equal(backend.quantize(x, profile).codes, quantize(x, profile).codes)
        return
    with pytest.raises(BackendUnavailable, match=r"model\.dtype: bf16"):
        backend.quantize(x, profile)


def test_an_odd_last_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be even.*\(2, 63\)"):
        fake_backend().quantize(data(2, 63), "ascend950")


# --- trust after a look -----------------------------------------------------------------------


def test_the_trial_rows_tell_all_profiles_apart() -> None:
    seen = {}
    for name in SINGLE:
        q = quantize(trial_rows(), name)
        key = (q.codes.numpy().tobytes(), q.scales.numpy().tobytes())
        assert key not in seen, f"{name} and {seen[key]} give the same bytes"
        seen[key] = name


class OldCann(FakeNpu):
    """Drops what a CANN without the newest call silently drops."""

    def npu_dynamic_mx_quant(self, input: torch.Tensor, **keywords: Any) -> Any:
        keywords.pop("dst_type_max", None)
        return super().npu_dynamic_mx_quant(input, **keywords)


def test_a_device_that_silently_drops_an_argument_is_found_out() -> None:
    backend = fake_backend(OldCann())
    backend.check_profile("ascend950")
    backend.check_profile("ascend950-alg2")
    with pytest.raises(
        BackendUnavailable, match=r"other numbers than profile 'ascend950-alg2-max7"
    ):
        backend.check_profile("ascend950-alg2-max7")


def test_the_conformance_kit_gets_past_the_trial_and_sees_the_wrong_numbers() -> None:
    backend, name = fake_backend(OldCann()).without_trials(), "ascend950-alg2-max7"
    found, wanted = backend.quantize(trial_rows(), name), quantize(trial_rows(), name)
    assert not torch.equal(found.scales, wanted.scales)


def test_a_profile_is_tried_once() -> None:
    api = FakeNpu()
    backend = fake_backend(api)
    for _ in range(3):
        backend.check_profile("ascend950")
    assert api.calls == {"npu_dynamic_mx_quant": 1, "npu_anti_mx_quant": 1}


def test_a_device_that_decodes_its_codes_wrongly_is_found_out() -> None:
    class HighNibbleFirst(FakeNpu):
        def npu_anti_mx_quant(self, x: torch.Tensor, *rest: Any, **keywords: Any) -> torch.Tensor:
            return super().npu_anti_mx_quant((x << 4) | (x >> 4), *rest, **keywords)

    with pytest.raises(BackendUnavailable, match="decoded values of a trial differ"):
        fake_backend(HighNibbleFirst()).check_profile("ascend950")


def test_scales_in_another_layout_are_the_device_s_fault_and_no_refusal() -> None:
    """Some builds returned [rows, blocks]; the kit must not count that as "not computed"."""

    class FlatScales(FakeNpu):
        def npu_dynamic_mx_quant(self, input: torch.Tensor, **keywords: Any) -> Any:
            codes, scales = super().npu_dynamic_mx_quant(input, **keywords)
            return codes, scales.flatten(-2)

    backend = fake_backend(FlatScales())
    with pytest.raises(RuntimeError, match=r"npu_dynamic_mx_quant .* another layout .*\(7, 1, 2\)"):
        backend.check_profile("ascend950")
    with pytest.raises(RuntimeError, match="another layout"):
        measure(backend.without_trials(), torch.device("cpu"), wanted=lambda name: name == "ties")


def test_a_lost_sign_of_zero_is_not_held_against_the_device() -> None:
    class Positive(FakeNpu):
        def npu_dynamic_mx_quant(self, input: torch.Tensor, **keywords: Any) -> Any:
            return super().npu_dynamic_mx_quant(input.masked_fill(input == 0, 0.0), **keywords)

    fake_backend(Positive()).check_profile("ascend950")


# --- what a package lacks -----------------------------------------------------------------------


def test_a_package_without_mx_operators_has_no_backend() -> None:
    with pytest.raises(BackendUnavailable, match=r"has no npu_dynamic_mx_quant.*torch-npu 2\.9\.0"):
        fake_backend(without=("npu_dynamic_mx_quant",))


def test_an_argument_is_passed_only_where_the_schema_has_it() -> None:
    backend = fake_backend(lacking={"npu_dynamic_mx_quant": "dst_type_max"})
    backend.check_profile("ascend950-alg2")
    with pytest.raises(BackendUnavailable, match=r"npu_dynamic_mx_quant without dst_type_max"):
        backend.check_profile("ascend950-alg2-max7")


def test_without_its_own_dequantiser_values_are_decoded_in_plain_torch() -> None:
    api = FakeNpu()
    backend, x = fake_backend(api, without=("npu_anti_mx_quant",)), data(3, 96)
    assert torch.equal(backend.fake_quant(x, "ascend950"), fake_quant(x, "ascend950"))
    encoded = backend.encode_input(x, "ascend950")
    assert torch.equal(backend.decode_input(encoded), fake_quant(x, "ascend950"))
    assert "npu_anti_mx_quant" not in api.calls
    assert backend.describe()["decoder"] == "plain torch"
    assert fake_backend().describe()["decoder"] == "npu_anti_mx_quant"


def test_an_old_matmul_without_fp4_is_no_fused_matmul() -> None:
    backend = fake_backend(lacking={"npu_quant_matmul": "x1_dtype"})
    backend.check_profile("ascend950")
    with pytest.raises(BackendUnavailable, match=r"npu_quant_matmul without x1_dtype"):
        backend.check_fused("ascend950", "ascend950", 64, 32)


def test_the_newest_argument_is_never_passed() -> None:
    """max_low_bound came after the oldest release that is supported."""
    assert "max_low_bound" not in set().union(*contract.PASSED.values())
    fake_ops().mx_quant(data(2, 64), -1, "rint", 2, 7.0)  # the fake takes no such keyword


# --- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [64, 96, 1536], ids=str)
@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_the_fused_product_is_the_fp32_product_of_the_values(
    inputs: int, bias_dtype: torch.dtype | None, shape: tuple[int, ...]
) -> None:
    backend = fake_backend()
    assert isinstance(backend, FusedBackend)
    x, weight = data(*shape, inputs), data(48, inputs, seed=1)
    bias = None if bias_dtype is None else data(48, seed=2, dtype=bias_dtype)
    backend.check_fused("ascend950", "ascend950", inputs, 48)
    prepared = backend.prepare_weight(PackedWeight.of(quantize(weight, "ascend950")))
    encoded = backend.encode_input(x, "ascend950")
    wanted = F.linear(
        fake_quant(x, "ascend950").float(),
        fake_quant(weight, "ascend950").float(),
        None if bias is None else bias.float(),
    )
    for out_dtype in (None, torch.float32, torch.float16):
        y = backend.fused_linear(encoded, prepared, bias, out_dtype)
        assert y.dtype == (out_dtype or torch.bfloat16) and y.shape == (*shape, 48)
        torch.testing.assert_close(y, wanted.to(y.dtype))


def test_weights_of_another_encoder_are_multiplied_as_they_are() -> None:
    """A checkpoint of msmodelslim, served with the activations of vllm-ascend."""
    backend, x, weight = fake_backend(), data(5, 96), data(48, 96, seed=1)
    backend.check_fused("msmodelslim-weight", "ascend950", 96, 48)
    q = quantize(weight, "msmodelslim-weight")
    y = backend.fused_linear(
        backend.encode_input(x, "ascend950"), backend.prepare_weight(PackedWeight.of(q))
    )
    wanted = fake_quant(x, "ascend950").float() @ dequantize(q, torch.float32).T
    torch.testing.assert_close(y, wanted.bfloat16())


def test_the_dual_level_product_reads_tiled_weights_and_transposed_scales() -> None:
    backend, x, weight = fake_backend(), data(2, 5, 1536), data(48, 1536, seed=1)
    name, bias = "ascend950-dual", data(48, seed=2)
    backend.check_fused(name, name, 1536, 48)
    prepared = backend.prepare_weight(PackedWeight.of(quantize(weight, name)))
    encoded = backend.encode_input(x, name)
    y = backend.fused_linear(encoded, prepared, bias)
    values = dequantize(quantize(x, name), torch.float32)
    wanted = F.linear(values, dequantize(quantize(weight, name), torch.float32), bias.float())
    torch.testing.assert_close(y, wanted.bfloat16())
    assert torch.equal(backend.decode_input(encoded), values)


def test_preparing_a_weight_with_whole_pairs_of_blocks_copies_nothing() -> None:
    backend = fake_backend()
    even = PackedWeight.of(quantize(data(8, 128), "ascend950"))
    prepared = backend.prepare_weight(even)
    assert prepared.codes.data_ptr() == even.packed.data_ptr()
    assert prepared.scales.data_ptr() == even.scales.data_ptr()
    odd = backend.prepare_weight(PackedWeight.of(quantize(data(8, 96), "ascend950")))
    assert odd.scales.shape == (8, 2, 2) and (odd.scales[:, 1, 1] == 0).all()


@pytest.mark.parametrize(
    ("weight", "activation", "inputs", "message"),
    [
        ("nvfp4", "ascend950", 64, "cannot multiply weights in 'nvfp4'"),
        ("ascend950-dual", "ascend950", 64, "cannot multiply weights in 'ascend950-dual'"),
        ("ascend950", "ascend950-dual", 64, "cannot multiply weights in 'ascend950'"),
        ("ascend950", "ocp", 64, "do not compute profile 'ocp'"),
        ("ascend950", "ascend950", 63, "an even number of inputs"),
        ("ascend950", "ascend950", 2, "from 4 to 65535, not 2"),
        ("ascend950", "ascend950", 65536, "not 65536"),
    ],
)
def test_products_that_the_device_has_not_are_refused(
    weight: str, activation: str, inputs: int, message: str
) -> None:
    with pytest.raises(BackendUnavailable, match=message):
        fake_backend().check_fused(weight, activation, inputs, 32)


def test_every_profile_that_the_matmul_reads_has_blocks_of_32_and_powers_of_two() -> None:
    backend, accepted = fake_backend(), []
    for name in PROFILES:
        try:
            backend.check_fused(name, "ascend950", 64, 32)
        except BackendUnavailable:
            continue
        accepted.append(name)
    assert "ascend950-mse" in accepted and "compressed-tensors" in accepted
    assert not any("nvf" in name or "dual" in name for name in accepted)


# --- the schemas of a package ---------------------------------------------------------------


def test_argument_names_are_read_from_the_registered_schemas() -> None:
    library = torch.library.Library("npu", "FRAGMENT")
    library.define("npu_made_up(Tensor x, *, int first=1) -> Tensor")
    library.define("npu_made_up.other(Tensor x, *, int second=2) -> Tensor")
    assert contract.schema_arguments("npu_made_up") == {"x", "first", "second"}
    assert contract.schema_arguments("npu_not_there") is None
