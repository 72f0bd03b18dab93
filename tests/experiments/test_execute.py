"""A whole run in one process: what it leaves behind, what it refuses, what a resume does."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from npu_qat.config import ModelConfig, RunConfig
from npu_qat.deploy import PackedCore, open_checkpoint, read_adapter
from npu_qat.deploy.core import fingerprint_of
from npu_qat.experiments import heartbeat
from npu_qat.experiments import run as module
from npu_qat.layers import AuditError
from npu_qat.layers.audit import Check
from npu_qat.training.engine import TrainingError
from npu_qat.training.loop import Interrupted
from npu_qat.training.rundir import RunDirectoryError
from tests.experiments.running import carry_out, configuration, metrics, results
from tests.training.tiny import save_tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are most of a tiny run's time; the run of the fixture ``done`` has its report."""
    monkeypatch.setattr(module, "write_report", lambda folder: folder / "report.html")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all arms, and beside it its heartbeat."""
    folder = tmp_path_factory.mktemp("done") / "run"
    config = configuration(
        model, evaluation={"problems": 8, "baselines": ["bf16", "ptq", "bf16_lora"], "every": 2}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(heartbeat.VARIABLE, str(folder.parent / "heartbeat"))
        patch.setattr(heartbeat, "SECONDS_BETWEEN_BEATS", 0.0)
        carry_out(config, folder)
    (folder.parent / "config.json").write_text(json.dumps(config))
    return folder


def test_an_engine_that_must_compute_another_model_is_refused_before_anything_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "load_base", loaded)
    # Engine format auto: on a CPU, as on CUDA, its readers have another rule than ascend950.
    config = configuration(model, rollout={"engine": "vllm"}, noise={"norm_dtype": "model"})
    with pytest.raises(ValueError, match="vllm does not compute the model that is trained"):
        carry_out(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_everything_that_is_promised(done: Path) -> None:
    names = {path.name for path in done.iterdir()}
    assert names >= {
        *("config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "audit.json"),
        *("evaluations.json", "summary.json", "report.html", "tensorboard", "checkpoints"),
    }
    summary = read(done / "summary.json")
    assert summary["audit"] == "pass" and summary["steps"] == 3 and summary["mode"] == "w4a4"
    arms = ["bf16_start", "w4a4_ptq", "w4a4_trained", "bf16_lora", "bf16_lora_served_w4a4"]
    assert set(summary["arms"]) == set(arms)
    for name in arms:
        rows = (done / "evaluations" / f"{name}.jsonl").read_text().splitlines()
        assert len(rows) == summary["arms"][name]["n"] == 8
    assert {c["b"] for c in summary["comparisons"]} == set(arms) - {"w4a4_trained"}
    environment = read(done / "environment.json")
    assert environment["device"] == "cpu" and "asked for" in environment["reason"]


def test_the_audit_has_every_layer_in_every_phase(done: Path) -> None:
    audit = read(done / "audit.json")
    assert audit["verdict"] == "pass" and all(check["ok"] for check in audit["checks"])
    quantized = [row for row in audit["modules"] if row["quantized"]]
    assert len(quantized) == 14
    for row in quantized:
        assert row["calls"] == row["quantized_calls"]
        assert set(row["calls"]) == {"rollout", "training", "evaluation"}
        assert row["operand_mismatches"] == {"rollout": 0, "training": 0, "evaluation": 0}
        assert row["weight_rel_error"] > 0 and row["input_rel_error"] > 0
    assert len(audit["first_update_gradients"]) == 28
    assert {r["step"] for r in audit["noise"]["steps"]} == {1, 2, 3}
    assert all(r["norms_changed"] == 5 for r in audit["noise"]["steps"] if r["sigma"] > 0)
    names = {check["name"] for check in audit["checks"]}
    assert {
        "noise reaches the norms in rollout",
        "adapters receive a gradient in the first update",
    } <= names


def test_both_arms_trained_and_noise_was_in_one(done: Path) -> None:
    lines = [line for line in metrics(done) if "loss" in line]
    arms = {line["arm"] for line in lines}
    assert arms == {"w4a4", "bf16_lora"}
    assert any(line["sigma"] > 0 for line in lines if line["arm"] == "w4a4")
    assert all(line["sigma"] == 0 for line in lines if line["arm"] == "bf16_lora")
    evaluations = [line for line in metrics(done) if "evaluation" in line]
    assert [(line["arm"], line["step"]) for line in evaluations] == [
        ("w4a4", 2),
        ("bf16_lora", 2),
    ]


def test_the_saved_adapter_is_the_16_bit_image_of_the_masters(done: Path) -> None:
    """What is exported computes the numbers that were trained with."""
    for arm in ("w4a4", "bf16_lora"):
        adapter = load_file(done / "adapters" / arm / "adapter_model.safetensors")
        newest = sorted((done / "checkpoints" / arm).glob("step-*"))[-1]
        state = load_file(newest / "state.safetensors")
        assert newest.name == "step-000003" and len(adapter) == 28
        assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
        for name, tensor in adapter.items():
            master = state[name.replace(".weight", ".default.weight")]
            assert master.dtype == torch.float32
            assert torch.equal(tensor, master.bfloat16())


def test_a_run_shows_that_it_is_alive_in_its_evaluations_too(done: Path) -> None:
    """A trained adapter is saved after the last step and before its evaluations."""
    saved = max(path.stat().st_mtime for path in (done / "adapters").rglob("*.safetensors"))
    assert (done.parent / "heartbeat").stat().st_mtime > saved


@pytest.mark.parametrize("resume", [False, True])
def test_a_mistyped_model_does_not_block_the_folder(tmp_path: Path, resume: bool) -> None:
    for name in ("mistyped", "mistyped-again"):
        with pytest.raises(ValueError, match=rf"{name}\b"):
            carry_out(configuration(tmp_path / name), tmp_path / "run", resume=resume)
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_second_run_into_the_same_folder_is_refused(done: Path) -> None:
    config = read(done.parent / "config.json")
    before = results(done)
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        carry_out(config, done)
    assert results(done) == before


def test_resuming_a_finished_run_repeats_nothing(done: Path) -> None:
    before, lines = results(done), metrics(done)
    summary = carry_out(read(done.parent / "config.json"), done, resume=True)
    assert results(done) == before and metrics(done) == lines
    assert summary["audit"] == "pass" and len(summary["arms"]) == 5
    said = (done.parent / "said.txt").read_text()
    assert "3/3" not in said and "accuracy" not in said


def test_the_run_names_its_base_and_a_resume_refuses_another(done: Path, tmp_path: Path) -> None:
    config = read(done.parent / "config.json")
    source = ModelConfig(path=config["model"]["path"])
    core = PackedCore(open_checkpoint(source), RunConfig.model_validate(config).quant)
    assert read(done / "base.json") == {
        "fingerprint": fingerprint_of(core).hexdigest(),
        "input_scales": {},
    }
    binding = read(done / "adapters" / "w4a4" / "npu_qat_base.json")
    assert binding == {
        "base_fingerprint": read(done / "base.json")["fingerprint"],
        "content": read_adapter(done / "adapters" / "w4a4").content(),
    }
    kept, trained = binding["content"]["config"], config["lora"]
    assert (kept["r"], kept["lora_alpha"]) == (trained["r"], trained["alpha"])
    assert not (done / "adapters" / "bf16_lora" / "npu_qat_base.json").exists()
    run = tmp_path / "run"
    shutil.copytree(done, run)
    for folder in ("checkpoints", "evaluations"):  # so that it trains again
        shutil.rmtree(run / folder)
    (run / "base.json").write_text(json.dumps({"fingerprint": "0" * 64, "input_scales": {}}))
    with pytest.raises(ValueError, match="is not the model that"):
        carry_out(config, run, resume=True)


def test_another_configuration_is_not_resumed(done: Path) -> None:
    config = read(done.parent / "config.json")
    config["train"]["lr"] = 2e-3
    message = r"another configuration: train.lr \(was 0.001, is 0.002\)"
    with pytest.raises(ValueError, match=message):
        carry_out(config, done, resume=True)


def test_a_run_that_dies_again_and_again_resumes_to_the_same_numbers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here between a step's records and its checkpoint; test_kill.py kills for real."""
    config = configuration(model, evaluation={"problems": 4, "baselines": [], "every": 1})
    carry_out(config, tmp_path / "whole")
    after_step = module._Run._after_step
    for at in (1, 2, 3):

        def die(
            self: Any, learner: Any, finished: int, found: dict[str, Any], at: int = at
        ) -> None:
            after_step(self, learner, finished, found)
            if finished == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module._Run, "_after_step", die)
            with pytest.raises(KeyboardInterrupt):
                carry_out(config, tmp_path / "parts", resume=at > 1)
    carry_out(config, tmp_path / "parts", resume=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    whole, parts = (read(tmp_path / name / "audit.json") for name in ("whole", "parts"))
    for key in ("verdict", "noise", "first_update_gradients"):
        assert parts[key] == whole[key]


@pytest.mark.parametrize("questions", [0, 5, 25])
def test_ctrl_c_in_an_evaluation_stops_there(
    questions: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the start or of the end; it does not wait for all problems."""
    config = configuration(model, evaluation={"problems": 4, "baselines": ["ptq"]})
    config["train"]["steps"] = 1
    config["noise"]["enabled"] = False
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > questions

    @contextmanager
    def requests(say: object) -> Iterator[Callable[[], bool]]:
        yield should_stop

    with monkeypatch.context() as patch:
        patch.setattr(module, "stop_requests", requests)
        with pytest.raises(Interrupted):
            carry_out(config, tmp_path / "run")
    assert asked == questions + 1
    summary = carry_out(config, tmp_path / "run", resume=True)
    assert list(summary["arms"]) == ["w4a4_ptq", "w4a4_trained"]


def test_a_failed_audit_fails_again_on_resume(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that was written before its audit would make the resumed run pass."""
    config = configuration(model, evaluation={"problems": 4, "baselines": []})

    failed = Check("noise", "1", "0", ok=False)
    monkeypatch.setattr(module, "run_checks", lambda learner: [failed])
    for resume in (False, True):
        with pytest.raises(AuditError, match="noise: expected 1, measured 0"):
            carry_out(config, tmp_path / "run", resume=resume)
        assert read(tmp_path / "run" / "audit.json")["verdict"] == "fail"
        assert not (tmp_path / "run" / "summary.json").exists()
        assert not list((tmp_path / "run").glob("evaluations/*"))


def test_an_audit_that_fails_at_the_first_step_stops_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npu_qat.backends import EmulationBackend

    monkeypatch.setattr(EmulationBackend, "fake_quant", lambda self, x, *a, **k: x.clone())
    config = configuration(model, evaluation={"baselines": []})
    config["run"]["backend"] = "reference"
    with pytest.raises(AuditError, match="quantised tensors equal the reference"):
        carry_out(config, tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]


# --- before training starts -----------------------------------------------------------------


def test_too_little_space_for_the_checkpoints_is_found_before_training(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is large enough for the logs but not for what the adapters' rank makes of it."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**26))
    config = configuration(model, lora={"r": 512}, train={"keep_checkpoints": 9})
    config["evaluation"]["baselines"] = []
    with pytest.raises(RunDirectoryError, match=r"64 MiB free.*lower train.keep_checkpoints"):
        carry_out(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluation": {"problems": 999}}, "problems is 999, but the test split has 20"),
        ({"train": {"steps": None}, "task": {"train_size": 3}}, "fewer than one step's 4"),
        ({"quant": {"exclude": ["lm_head", "layers.9"]}}, "'layers.9' matches no linear layer"),
        ({"lora": {"targets": ["q_prj"]}}, "is no linear of the decoder layers"),
        ({"deepspeed": {"overrides": {"bf16": {}}}}, "'bf16' is decided by this program"),
        ({"noise": {"norm_dtype": "model", "sigma_start": 1e-5, "sigma_end": 1e-6}}, "fp32"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    sections: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    config = configuration(model, **sections)
    config["evaluation"]["baselines"] = []
    with pytest.raises(ValueError, match=message):
        carry_out(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- the modes ------------------------------------------------------------------------------

RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "w16a16": ({"quant": {"injection_point": "none"}}, "w16a16"),
    "w4a16 packed": ({"quant": {"injection_point": "weight", "base_storage": "packed"}}, "w4a16"),
    "w16a4": ({"quant": {"injection_point": "input"}}, "w16a4"),
    "weight_output": ({"quant": {"injection_point": "weight_output"}}, "w4a4"),
    "nvfp4": ({"quant": {"weight_profile": "nvfp4", "activation_profile": "nvfp4"}}, "w4a4"),
    "checkpointing": ({"model": {"gradient_checkpointing": True, "dtype": "fp32"}}, "w4a4"),
    "sft": ({"train": {"method": "sft"}, "noise": {"apply_during": "training"}}, "w4a4"),
    "fp16": ({"model": {"dtype": "fp16"}}, "w4a4"),
    "zero 3 packed": (
        {"quant": {"base_storage": "packed"}, "deepspeed": {"zero_stage": 3}},
        "w4a4",
    ),
    "no STE": ({"quant": {"use_ste": False, "lora_input": "quantised"}}, "w4a4"),
    "no STE, POST-hook": (
        {"quant": {"use_ste": False, "injection_point": "weight_output"}},
        "w4a4",
    ),
    "no STE, POST-hook on the wrapper": (
        {
            "quant": {
                "use_ste": False,
                "injection_point": "weight_output",
                "lora_output": "quantised",
            }
        },
        "w4a4",
    ),
}


@pytest.mark.parametrize(("sections", "mode"), RUNS.values(), ids=RUNS.keys())
def test_every_mode_runs_and_passes_its_audit(
    sections: dict[str, Any], mode: str, model: Path, tmp_path: Path
) -> None:
    config = configuration(model, **sections)
    config["train"]["steps"] = 2
    config["evaluation"] = {"problems": 4, "baselines": []}
    summary = carry_out(config, tmp_path / "run")
    assert list(summary["arms"]) == [f"{mode}_trained"]
    assert summary["audit"] == "pass"
    assert read(tmp_path / "run" / "audit.json")["verdict"] == "pass"
    if sections.get("quant", {}).get("use_ste") is False:
        gradients = read(tmp_path / "run" / "audit.json")["first_update_gradients"]
        for name, largest in gradients.items():
            if "lora_B" in name:
                reached = "o_proj" in name or "down_proj" in name
                reached &= sections["quant"].get("lora_output") != "quantised"
                assert (largest > 0) == reached, name


def test_two_phases_that_differ_stop_the_run(model: Path, tmp_path: Path) -> None:
    config = configuration(model, quant={"apply_during": "training"})
    config["evaluation"]["baselines"] = []
    with pytest.raises(TrainingError, match=r"rollout and training differ by .*quant.apply_during"):
        carry_out(config, tmp_path / "run")
