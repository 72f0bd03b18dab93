"""``--dry-run``: the resolved plan of every preset, from shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from npu_qat.cli import dry_run, main
from npu_qat.cli.dry_run import Plan, build_plan, changed_fraction, print_plan
from npu_qat.config import NoiseConfig, load_config, preset_names
from npu_qat.planning.model import ARCHITECTURES

QWEN = 1_543_714_304  # parameters of Qwen2.5-1.5B, tied embeddings counted once


@pytest.fixture(autouse=True)
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "PROBE_SECONDS", 0.001)


def plan_of(preset: str, *overrides: str) -> Plan:
    return build_plan(load_config(preset=preset, overrides=["run.device=cpu", *overrides]))


def printed(plan: Plan, capsys: pytest.CaptureFixture[str]) -> str:
    print_plan(plan, Console(width=140, highlight=False))
    return capsys.readouterr().out


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_has_a_plan(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--preset", preset, "--dry-run"]
    assert main(["train", *words]) == 0
    out = capsys.readouterr().out
    for part in ("linear layers", "parameters and memory", "steps", "generation, estimated"):
        assert part in out
    assert ("noise on" in out) == load_config(preset=preset).noise.enabled


def test_a_plan_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "--device", "cpu"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_counts_of_the_reference_model_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of("log-e13h")
    layer = 2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960
    assert plan.parameters == QWEN
    assert plan.quantized_parameters == 26 * layer
    per_layer = 2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960)
    assert plan.lora_parameters == 28 * 32 * per_layer
    assert plan.memory["weights in bf16"] == 2 * QWEN
    assert plan.memory["LoRA, Adam moments"] == 8 * plan.lora_parameters
    assert plan.memory["KV cache of a rollout, at most"] == 28 * 2 * 2 * 128 * 2048 * 256 * 2
    assert (plan.steps, plan.problems) == (29, (7473, 1319))
    out = printed(plan, capsys)
    assert "from this package's architecture file" in out
    assert "1,543,714,304" in out


def test_the_table_groups_layers_and_says_why_some_are_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = plan_of("log-e13h")
    rows = {(group.pattern, group.example.mode): group for group in plan.groups}
    assert len(rows) == 15
    middle = rows["model.layers.*.self_attn.q_proj", "W4A4"]
    assert middle.layers == tuple(range(1, 27)) and middle.example.weight_profile == "fork-mxfp4"
    edge = rows["model.layers.*.self_attn.q_proj", "W16A16"]
    assert edge.layers == (0, 27)
    out = printed(plan, capsys)
    assert "1-26" in out and "0, 27" in out
    for pattern, count in {"layers.0": 7, "layers.27": 7, "lm_head": 1}.items():
        assert f"{count} left in 16 bits: excluded by '{pattern}'" in out


def test_the_plan_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(plan_of("log-e13h"), Console(width=80, highlight=False))
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "gate_proj" in line and "1-26" in line]
    assert row.split() == [
        "model.layers.*.mlp.gate_proj", "1-26", "26", "1536", "x", "8960", "W4A4",
    ]  # fmt: skip


def test_storage_decides_the_bytes() -> None:
    linears = 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    stored = {
        name: next(size for key, size in plan.memory.items() if key.startswith("weights as stored"))
        for name, plan in {
            "image": plan_of("plan-e13c"),
            "packed": plan_of("plan-e13c", "quant.base_storage=packed"),
            "two phases": plan_of("plan-e13c", "quant.apply_during=training"),
            "none": plan_of("log-e7a"),
        }.items()
    }
    assert stored["image"] == stored["none"] == 2 * QWEN
    assert stored["packed"] == 2 * (QWEN - linears) + linears * 17 // 32
    assert stored["two phases"] == 2 * QWEN + 2 * linears


def test_the_noise_of_each_stage_is_shown_with_what_the_dtype_swallows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = plan_of("log-e13j")
    assert plan.norms == 57
    published = [0, 0.05, 0.02812, 0.01581, 0.00889, 0.005, 0.00281, 0.00158, 0.00089, 0.0005]
    assert [stage.sigma for stage in plan.stages] == pytest.approx(published, abs=5e-6)
    assert [stage.first_step for stage in plan.stages] == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert [stage.inert for stage in plan.stages] == [False] * 8 + [True] * 2
    out = printed(plan, capsys)
    assert "57 RMSNorms held in bf16, during rollout" in out
    assert out.count("inert: below the resolution") == 2
    exact = plan_of("log-e13j", "noise.norm_dtype=fp32")
    assert not any(stage.inert for stage in exact.stages)


def test_a_schedule_that_bf16_swallows_whole_is_pointed_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ["noise.norm_dtype=model", "noise.sigma_start=5e-4", "noise.sigma_end=1e-4"]
    assert "every noisy stage is inert" in printed(plan_of("demo", *small), capsys)


def test_the_share_that_bf16_keeps_is_the_known_one() -> None:
    model = NoiseConfig(norm_dtype="model")
    assert changed_fraction(5e-4, model, "bf16") == pytest.approx(0, abs=1e-3)
    assert changed_fraction(1e-3, model, "bf16") == pytest.approx(0.026, abs=5e-3)
    assert changed_fraction(1e-3, NoiseConfig(norm_dtype="fp32"), "bf16") > 0.999


def test_targeted_noise_is_judged_where_it_is_strongest() -> None:
    weak = "noise.layers={default_multiplier: 0, layer_multipliers: {1: 0.01}}"
    plan = plan_of("demo", weak, "noise.norm_dtype=model")
    assert all(stage.inert for stage in plan.stages if stage.sigma)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["noise.target_modules=[ln_f]"], "names 'ln_f', but the RMSNorms"),
        (["noise.exclude=[layers.9]"], "'layers.9', which matches no module"),
        (["noise.layers={default_multiplier: 0}"], "every multiplier is 0"),
        (
            ["noise.layers={default_multiplier: 0, layer_multipliers: {1: 1}}",
             "noise.exclude=[layers.1]"],
            "so there would be no noise",
        ),
    ],
)  # fmt: skip
def test_noise_that_would_reach_no_norm_is_refused_before_the_run(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of("demo", *overrides)


def test_the_multipliers_are_in_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(plan_of("plan-e13d"), capsys)
    assert "1: 0-5, 16-27, norms outside of the layers; 1.5: 6-15" in out
    assert "sigma times" not in printed(plan_of("plan-e13b"), capsys)


def test_fine_tuning_has_no_generation_to_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of("demo", "train.method=sft", "train.steps=5", "noise.apply_during=training")
    assert plan.estimate is None
    out = printed(plan, capsys)
    assert "sequences an update" in out and "generation" not in out


def test_the_estimate_follows_its_formula() -> None:
    plan = plan_of("demo")
    e = plan.estimate
    assert e is not None and e.flops > 0
    products = sum(g.count * g.example.in_features * g.example.out_features for g in plan.groups)
    assert e.tokens_per_second == pytest.approx(e.flops / (2 * products))
    c = plan.config
    tokens = c.dapo.generation_prompts * c.rollout.num_generations * c.rollout.max_new_tokens
    assert e.seconds_a_step == pytest.approx(tokens / e.tokens_per_second)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_here_is_said_and_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = plan_of("demo", "run.device=cuda")
    assert plan.estimate is None
    assert "device: device 'cuda' is not available" in printed(plan, capsys)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quant.exclude=[lm_head, layers.99]", "'layers.99' matches no linear layer"),
        ("quant.target_layers=[77]", r"no decoder layer \[77\]"),
        ("lora.targets=[w_proj]", "names no linear of the decoder layers"),
        ("noise.layers={layer_multipliers: {99: 1.0}}", "names layers"),
        ("model.path=./nowhere", "is no local folder, not in the hub cache"),
        ("task.path=x", "generated and read no file"),
    ],
)
def test_what_the_run_would_refuse_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of("demo", override)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("quant.activation_profile=ascend950-rint", "would not compute what was trained"),
        ("quant.lora_input=quantised", "engines feed it the 16-bit ones"),
        ("quant.rotation=hadamard32", "is not servable by stock vllm-ascend"),
        ("quant.weight_profile=nvfp4", "is not MXFP4, the 4-bit format of the NPU"),
        ("quant.exclude=[lm_head, q_proj]", "serving engines fuse them into one matmul"),
        ("quant.injection_point=none", "there is nothing to export"),
    ],
)
def test_what_an_export_would_refuse_is_said_before_training(
    override: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = " ".join(printed(plan_of("demo", override), capsys).split())
    assert "export --format ascend: refuses it:" in said and told in said


def test_what_an_export_would_take_is_said_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "export --format ascend: takes it\n" in printed(plan_of("demo"), capsys)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_engine_that_rounds_inputs_by_another_rule_is_refused(device: str) -> None:
    """Of a device that is not here, too: its format follows from its name."""
    engine = ["rollout.engine=vllm", "noise.norm_dtype=model", f"run.device={device}"]
    with pytest.raises(ValueError, match=f"auto on {device}. it makes the inputs"):
        plan_of("demo", *engine)
    plan_of("demo", *engine, "quant.activation_profile=compressed-tensors")


def test_a_local_folder_is_read(tmp_path: Path) -> None:
    shipped = ARCHITECTURES / "Qwen--Qwen2.5-1.5B-Instruct.json"
    (tmp_path / "config.json").write_text(shipped.read_text())
    plan = plan_of("log-e7a", f"model.path={tmp_path}")
    assert plan.parameters == QWEN and plan.source == f"from {tmp_path}"


def test_ranges_of_layers_are_short() -> None:
    assert dry_run._ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    assert dry_run._ranges(()) == ""
