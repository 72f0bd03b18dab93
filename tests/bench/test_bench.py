"""The benchmarks run, measure what they say, and report under fixed names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from npu_qat.bench import bars, dapo_step, fake_quant, growth, linear, models, peers
from npu_qat.bench.rows import Row, Setup
from npu_qat.bench.suite import BENCHMARKS, environment, make_setup, measure
from npu_qat.bench.timing import Clock, Times
from npu_qat.cli import bench, main

CPU = torch.device("cpu")


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def setup(notes: list[str]) -> Setup:
    return make_setup("cpu", "auto", repeats=2, quick=True, peers=False, note=notes.append)


def test_functions_are_sampled_in_turns() -> None:
    calls: list[str] = []
    clock = Clock(CPU, repeats=3, warm_up=0)
    clock._inner = lambda call: 1  # type: ignore[method-assign]
    clock._warm = lambda call: 0.0  # type: ignore[method-assign]
    times = clock.measure({name: lambda name=name: calls.append(name) for name in "ab"})
    assert calls == list("ababab")
    assert len(times["a"].samples) == 3


def test_a_sample_holds_enough_calls_to_be_timed() -> None:
    clock = Clock(CPU)
    assert max(clock._inner(lambda: None) for _ in range(5)) > 1000  # or slow once
    assert clock._inner(lambda: torch.randn(2000, 2000)) < 10


def test_a_row_compares_medians() -> None:
    row = Row.of_times("a/b", Times((1.0, 9.0, 3.0)), Times((2.0, 2.0, 7.0)), tokens=5.0)
    assert row.as_dict() == {
        "name": "a/b",
        "ms": 3.0,
        "baseline_ms": 2.0,
        "ratio": 1.5,
        "min_ms": 1.0,
        "baseline_min_ms": 2.0,
        "tokens": 5.0,
    }


def test_fake_quant_rows_have_fixed_names(setup: Setup) -> None:
    names = [row.name for row in fake_quant.rows(setup)]
    who = setup.selection.backend.name
    assert names[0] == f"fake-quant/{who}-ascend950/bfloat16/64x128"
    assert f"fake-quant/{who}-nvfp4-one-level/bfloat16/64x128" in names
    assert f"fake-quant/{who}-ascend950/float16/64x128" in names


def test_what_is_timed_is_the_quantiser(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, torch.Size, torch.dtype]] = []
    backend = setup.selection.backend
    real = backend.fake_quant

    def watch(x: torch.Tensor, profile: str) -> torch.Tensor:
        seen.append((profile, x.shape, x.dtype))
        return real(x, profile)

    monkeypatch.setattr(backend, "fake_quant", watch)
    list(fake_quant._of_shape(setup, (32, 64), {"us": lambda x: fake_quant._ours(setup, "ocp", x)}))
    assert set(seen) == {("ocp", torch.Size([32, 64]), torch.bfloat16)}


def test_a_peer_that_is_absent_or_fails_is_named(setup: Setup, notes: list[str]) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image\nmore")

    rows = list(fake_quant._of_shape(setup, (4, 32), {"broken": broken, "fine": torch.clone}))
    assert [row.name for row in rows] == ["fake-quant/fine/bfloat16/4x32"]
    assert notes == ["broken bfloat16/4x32: left out, it fails: no kernel image"]


def test_peers_that_are_not_installed_are_left_out_with_the_reason(
    notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise ImportError("No module named 'absent'")

    monkeypatch.setattr(peers, "PEERS", {"absent": absent, "here": lambda: torch.clone})
    assert [peer.name for peer in peers.fake_quantizers(notes.append)] == ["here"]
    assert notes == ["absent: left out, No module named 'absent'"]


def test_linear_rows_say_time_and_memory(setup: Setup) -> None:
    rows = {row.name: row for row in linear.rows(setup)}
    assert "linear/packed-ascend950/gate-128x384/64-tokens" in rows
    assert rows["memory/image-ascend950/weights"].ratio == 1.0
    assert rows["memory/packed-ascend950/weights"].ratio == pytest.approx(4.25 / 16)
    assert rows["memory/packed-nvfp4-one-level/weights"].ratio < 0.285


def test_the_measured_linear_is_quantised_and_has_the_weights_of_the_baseline(
    setup: Setup,
) -> None:
    frozen = torch.nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    made = linear.quantized_linear(setup, frozen, "packed", "ascend950")
    backend = setup.selection.backend
    assert torch.equal(made.weight, backend.fake_quant(frozen.weight, "ascend950"))
    assert torch.equal(made.bias, frozen.bias)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    gradient = linear._step(made, x, torch.ones(3, 32).bfloat16())
    assert torch.equal(gradient, torch.ones(3, 32).bfloat16() @ made.weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train-step", "decode", "dapo-step"])
def test_the_long_benchmarks_run(name: str, setup: Setup) -> None:
    rows: list[Row] = []
    measure(setup, [name], rows.append)
    assert rows and all(row.value > 0 and row.baseline > 0 for row in rows)
    assert all(row.name.startswith(f"{name}/") for row in rows)


def test_the_baseline_of_a_training_step_is_plain_lora_of_the_same_size(setup: Setup) -> None:
    config = models.architecture(models.DEMO, num_hidden_layers=1)
    plain = models.sixteen_bit_lora(models.random_model(config, CPU))
    ours, handle = models.quantized_lora(
        models.random_model(config, CPU), models.recipe("image"), setup.selection
    )
    sizes = [
        sorted(p.numel() for p in model.parameters() if p.requires_grad) for model in (plain, ours)
    ]
    assert sizes[0] == sizes[1] and len(handle.layers) == 7
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}


def test_growth_changes_one_thing_at_a_time(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def steps(s: Setup, name: str, config: object, batch: tuple[int, int], *rest: object):
        seen.append((config.hidden_size, config.num_hidden_layers, batch[0] * batch[1]))
        yield Row(f"train-step/x/{rest[-1]}", 1.0, 1.0)

    monkeypatch.setattr(growth.train_step, "steps", steps)
    monkeypatch.setattr(growth, "_demo_steps", lambda setup, count: Times((1.0 / count,)))
    names = [row.name for row in growth.rows(setup)]
    assert seen == [(128, 3, 2048), (128, 3, 4096), (256, 3, 2048), (128, 6, 2048)]
    assert names[:2] == ["growth/x/demo/tokens-2048", "growth/x/demo/tokens-4096"]
    assert names[-1].startswith("growth/w4a4-ascend950/demo/processes-")


def test_the_demo_row_drops_the_first_step(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        {"arm": arm, "step": step, "seconds": seconds, "tokens_per_second": 10.0}
        for arm, factor in (("w4a4", 2.0), ("bf16_lora", 1.0))
        for step, seconds in ((1, 99.0), (2, factor))
    ]
    monkeypatch.setattr(dapo_step, "_metrics", lambda setup, steps: lines)
    (row,) = dapo_step.rows(setup)
    assert (row.name, row.ratio) == ("dapo-step/w4a4-ascend950/demo", 2.0)


def test_running_out_of_memory_ends_one_benchmark_and_not_the_others(
    setup: Setup, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(setup: Setup):
        yield Row("a", 1.0, 1.0)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(BENCHMARKS, "decode", greedy)
    monkeypatch.setitem(BENCHMARKS, "linear", lambda setup: iter([Row("b", 1.0, 1.0)]))
    rows: list[Row] = []
    measure(setup, ["decode", "linear"], rows.append)
    assert [row.name for row in rows] == ["a", "b"]
    assert notes == ["decode: stopped, CUDA out of memory"]


# --- the command ----------------------------------------------------------------------------


def test_the_command_knows_every_benchmark() -> None:
    assert tuple(BENCHMARKS) == bench.NAMES


def test_the_command_writes_rows_and_environment(tmp_path: Path, capsys) -> None:
    file = tmp_path / "rows.json"
    options = ["--quick", "--device", "cpu", "--json", str(file)]
    assert main(["bench", "fake-quant", *options]) == 0
    result = json.loads(file.read_text())
    assert {"name", "ms", "baseline_ms", "ratio"} <= set(result["rows"][0])
    assert result["environment"]["command"] == "npu-qat bench fake-quant --device cpu --quick"
    assert {"processor", "versions", "load_average"} <= set(result["environment"])
    shown = capsys.readouterr().out
    assert all(row["name"] in shown for row in result["rows"])


def test_mistakes_are_explained(capsys, tmp_path: Path) -> None:
    assert main(["bench", "linear", "--repeats", "0"]) == 2
    assert "--repeats must be at least 1" in capsys.readouterr().err
    assert main(["bench", "linear", "--json", str(tmp_path / "no" / "file.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_the_environment_names_who_computes(setup: Setup) -> None:
    assert environment(setup, "x")["computed_by"] == setup.selection.backend.describe()


def test_a_row_with_a_bar_says_whether_it_was_met() -> None:
    name = "train-step/packed-fp8-ascend950/qwen2.5-1.5b/4x2048-tokens/checkpointing"
    assert bars.verdict(name, 1.15) == "<= 1.15 met"
    assert bars.verdict(name, 1.151) == "<= 1.15 missed"
    assert bars.verdict("fake-quant/cpu-ascend950/bfloat16/4096x4096", 1.4) == "<= 1.5 met"
    assert bars.bar_of("fake-quant/cuda-ascend950/bfloat16/8192x8192/eager") is None
    assert bars.verdict("decode/bf16-fused/qwen2.5-1.5b/batch-8/256-tokens", 2.0) == ""


@pytest.mark.parametrize("layer", ["q-1536x1536", "gate-1536x8960", "down-8960x1536"])
def test_the_rows_of_the_bars_are_those_that_are_measured(layer: str) -> None:
    name, _, shape = layer.partition("-")
    assert "x".join(map(str, linear.GPU_SHAPES[name])) == shape and linear.GPU_TOKENS == 4096
    for arm in (*models.STORAGES, *models.FP8):
        assert bars.bar_of(f"linear/{models.arm_name(arm)}/{layer}/4096-tokens") is not None
