"""Plans fit, realise what they say, and explain what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from npu_qat.config import RunConfig, load_config
from npu_qat.planning.efficiency import Calibration, Efficiency, Error
from npu_qat.planning.facts import ModelFacts
from npu_qat.planning.hardware import HARDWARE, find_hardware
from npu_qat.planning.memory import GIB, Load, predict_memory
from npu_qat.planning.plan import RESERVE_GIB, Lengths, ScalePlan, make_plan, resolve_model
from npu_qat.planning.steps import token_work

LENGTHS = Lengths(200, 600)
SOME = Calibration(
    Efficiency(0.6, 4.0, 3.0, 1e-3, 2e-3, 2e-5, 4e-4, 0.5, 1.3, 2.0, 9.0, 5e-5, 1.05),
    {"update time": Error(9, 0.8, 1.3, 1.2), "decoding time": Error(4, 0.9, 1.1, 1.1)},
)


def config_of(model: str, *overrides: str) -> RunConfig:
    return load_config(overrides=[f"model.path={resolve_model(model)}", *overrides])


def plan_of(model: str, devices: int, soc: str = "h100", *overrides: str) -> ScalePlan:
    return make_plan(config_of(model, *overrides), HARDWARE[soc], devices, SOME, lengths=LENGTHS)


@pytest.fixture(scope="module")
def seven() -> ScalePlan:
    return plan_of("qwen2.5-7b", 4)


def test_every_layout_is_there_once(seven: ScalePlan) -> None:
    names = [c.name for c in seven.candidates]
    assert len(names) == len(set(names)) == 3 * 2 * 2
    assert len(plan_of("qwen2.5-0.5b", 1).candidates) == 2 * 2


def test_what_fits_fits_and_one_more_row_would_not(seven: ScalePlan) -> None:
    room = HARDWARE["h100"].memory or 0
    for c in seven.candidates:
        assert c.fits and c.needed <= room
        assert c.needed == c.memory.peak * 1.05 + RESERVE_GIB * GIB
    tight = next(c for c in seven.candidates if c.name == "ZeRO-0, image")
    per_update = 128 * 8 // 4 // 4
    assert tight.load.sequences < per_update
    batches = -(-per_update // tight.load.sequences)
    fewer = -(-per_update // (batches - 1))  # rows of a micro-batch if there were one less
    larger = replace(tight.load, sequences=fewer)
    more = predict_memory(seven.facts, tight.layout, larger).peak
    assert more * 1.05 + RESERVE_GIB * GIB > room


def test_the_settings_realise_the_layout(seven: ScalePlan) -> None:
    for c in seven.candidates:
        config = config_of("qwen2.5-7b", *c.settings())
        assert config.quant.base_storage == c.storage
        assert config.deepspeed.zero_stage == c.layout.zero
        assert config.model.gradient_checkpointing == c.layout.checkpointing
        assert config.train.micro_batch_size == c.load.sequences
        assert config.rollout.batch_size == c.load.rollout_rows
        assert config.evaluation.batch_size == c.load.evaluation_rows
        asked = config.deepspeed.overrides.get("zero_optimization", {})
        assert asked.get("reduce_bucket_size", 500_000_000) == c.layout.bucket


def test_the_fastest_layout_is_taken(seven: ScalePlan) -> None:
    assert seven.best is not None and seven.best.time is not None
    assert seven.best.time.total == min(c.time.total for c in seven.candidates if c.time)
    low, high = seven.interval(seven.best.time)
    assert low < seven.best.time.total < high


def test_more_devices_and_more_memory_never_hurt() -> None:
    totals = [
        best.time.total
        for n in (1, 2, 8)
        if (best := plan_of("qwen2.5-1.5b", n).best) is not None and best.time is not None
    ]
    assert totals == sorted(totals, reverse=True) and len(totals) == 3
    small, large = plan_of("qwen2.5-14b", 1, "l40s"), plan_of("qwen2.5-14b", 1, "h200")
    for a, b in zip(small.candidates, large.candidates, strict=True):
        assert a.fits <= b.fits
        assert a.load.sequences <= b.load.sequences or not a.fits


def test_a_large_model_fits_packed_and_says_what_it_leaves_out() -> None:
    plan = plan_of("qwen2.5-72b", 8)
    fits = {c.name: c.fits for c in plan.candidates}
    assert not fits["ZeRO-0, image"] and fits["ZeRO-0, packed, checkpointing"]
    best = plan.best
    assert best is not None and best.storage == "packed"
    assert "evaluation.baselines=[ptq]" in best.settings()
    assert "baseline" not in best.memory.phases
    assert "baseline" in plan_of("qwen2.5-1.5b", 1).candidates[0].memory.phases


def test_nothing_fits_on_too_small_a_device() -> None:
    plan = plan_of("qwen2.5-72b", 8, "ascend-910c")
    assert plan.best is not None  # 64 GB hold the packed base
    tiny = make_plan(
        config_of("qwen2.5-72b"), find_hardware("h100", memory_gib=24), 8, SOME, lengths=LENGTHS
    )
    assert tiny.best is None and not any(c.fits for c in tiny.candidates)


def test_without_peaks_there_is_memory_and_no_time() -> None:
    plan = plan_of("qwen2.5-1.5b", 2, "ascend-950dt")
    assert all(c.fits and c.time is None for c in plan.candidates)
    assert plan.best is not None
    known = find_hardware("ascend-950dt", tflops=300, link=100)
    timed = make_plan(config_of("qwen2.5-1.5b"), known, 2, SOME, lengths=LENGTHS)
    assert all(c.time is not None for c in timed.candidates)
    assert "flops, link given by the user" in known.evidence


def test_a_device_that_multiplies_codes_keeps_them_beside_the_image() -> None:
    def stored(soc: str, *overrides: str) -> int:
        return plan_of("qwen2.5-1.5b", 1, soc, *overrides).facts.bytes_stored

    quantized = plan_of("qwen2.5-1.5b", 1).facts.quantized_parameters
    assert stored("ascend-950dt") - stored("h100") == quantized * 17 // 32
    assert stored("ascend-950dt", "quant.matmul=emulated") == stored("h100")
    assert stored("ascend-950dt", "quant.injection_point=weight") == stored("h100")


def test_fp8_keeps_the_codes_and_an_8_bit_copy_of_the_image() -> None:
    def facts(*overrides: str, storage: str = "image", zero: int = 0) -> ModelFacts:
        return make_plan(
            config_of("qwen2.5-1.5b", *overrides),
            HARDWARE["h100"],
            1,
            None,
            lengths=LENGTHS,
            stages=(zero,),
            storages=(storage,),
        ).facts

    asked = "quant.matmul=fused"
    weights = facts().quantized_parameters
    rows = 28 * (3 * 1536 + 2 * 256 + 2 * 8960)  # q, o, down; k, v; gate, up
    beside = weights * 17 // 32 + weights + 4 * rows
    assert facts(asked).bytes_beside == beside
    assert facts(asked).bytes_stored - facts().bytes_stored == beside
    assert facts(asked, storage="packed").bytes_beside == 4 * rows
    # Stage 3 frees what it gathered, so the copy is made again each time.
    assert facts(asked, zero=3).bytes_beside == weights * 17 // 32
    # The 16-bit weights of another phase are kept once.
    during = "quant.apply_during=training"
    assert facts(asked, during).bytes_stored - facts(during).bytes_stored == beside


def test_what_is_beside_the_image_is_not_read_for_a_token() -> None:
    load = Load(1, 1, 1, rollout_rows=8, prompt=16, new_tokens=16)
    plain = plan_of("qwen2.5-1.5b", 1).facts
    more = replace(plain, bytes_stored=plain.bytes_stored + 5, bytes_beside=5)
    assert token_work(more, load) == token_work(plain, load)


def test_stage_3_has_no_time_where_nobody_measured_it() -> None:
    unknown = replace(SOME, efficiency=replace(SOME.efficiency, zero3_layer_seconds=None))
    plan = make_plan(config_of("qwen2.5-1.5b"), HARDWARE["h100"], 2, unknown, lengths=LENGTHS)
    assert {c.layout.zero for c in plan.candidates if c.time is None} == {3}
    assert plan.best is not None and plan.best.time is not None


def test_a_packed_base_may_decode_few_rows_faster() -> None:
    free = replace(SOME.efficiency, decode_layer_seconds=0.0, decode_logit_moves=0.0)
    cheap = replace(SOME, efficiency=replace(free, decode_cache_moves=0.0))
    dear = replace(SOME, efficiency=replace(free, decode_layer_seconds=1.0))

    def rows(calibration: Calibration) -> int:
        plan = make_plan(
            config_of("qwen2.5-72b"), HARDWARE["h200"], 8, calibration, lengths=LENGTHS
        )
        return next(c for c in plan.candidates if c.name == "ZeRO-0, packed").load.rollout_rows

    assert rows(cheap) == 64 < rows(dear)


def test_unknown_memory_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"memory of Ascend 910B .* give --memory-gib"):
        plan_of("qwen2.5-1.5b", 1, "ascend-910b")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_of("qwen2.5-1.5b", 0), "--devices must be at least 1"),
        (lambda: find_hardware("b300"), "unknown --soc 'b300'; choose from a100"),
        (lambda: find_hardware("h100", tflops=-1), "flops must be positive"),
        (lambda: find_hardware("h100", bandwidth=math.inf), "bandwidth must be positive"),
        (lambda: find_hardware("h100", memory_gib=math.nan), "memory must be positive"),
        (
            lambda: make_plan(config_of("qwen2.5-1.5b"), HARDWARE["h100"], 1, SOME, reserve=-GIB),
            "--reserve-gib must be 0 or more",
        ),
        (
            lambda: make_plan(
                config_of("qwen2.5-1.5b"), HARDWARE["h100"], 1, SOME, lengths=Lengths(0, 5)
            ),
            "must be at least 1",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_cannot_be_packed_is_not_planned_packed() -> None:
    plan = plan_of("qwen2.5-1.5b", 1, "h100", "quant.apply_during=training")
    assert {c.storage for c in plan.candidates} == {"image"}


def test_supervised_learning_has_no_rollouts() -> None:
    overrides = ("train.method=sft", "evaluation.metric=answer_perplexity")
    plan = plan_of("qwen2.5-1.5b", 1, "h100", *overrides)
    best = plan.best
    assert best is not None and best.time is not None
    assert best.load.rollout_rows == best.load.evaluation_rows == 0
    assert best.time.generation_share == 0
    assert not any(s.startswith(("rollout", "evaluation")) for s in best.settings())


def test_every_figure_of_a_device_has_its_evidence() -> None:
    for hardware in HARDWARE.values():
        figures = (hardware.memory, hardware.flops, hardware.bandwidth, hardware.link)
        assert hardware.evidence
        assert ("no figure" in hardware.evidence) == (figures == (None,) * 4)
