"""Whole runs that roll out through vllm's engine, on vllm-ascend's quantised layers.

The engine is the real one but for its worker's model runner (``cpu_worker.py``), and it lives in
the test's process instead of a child process.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_qat.assets import demo_model_path
from npu_qat.training import rollout_vllm
from npu_qat.training.engine import TrainingError
from tests.experiments.running import carry_out, configuration

OPTIONS = {
    "worker_cls": "tests.contract_vllm.cpu_worker.CpuWorker",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "async_scheduling": False,
}
ROLLOUT = {
    "engine": "vllm",
    "engine_format": "ascend",
    "engine_options": OPTIONS,
    "max_prompt_tokens": 256,
    "max_new_tokens": 12,
    "batch_size": 8,
}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engines that a test starts. Not shut down: that would end the group of this process."""
    started: list[Any] = []
    start = rollout_vllm.start_engine

    def keep(arguments: dict[str, Any]) -> Any:
        started.append(start(arguments))
        return started[-1]

    monkeypatch.setattr(rollout_vllm, "start_engine", keep)
    return started


def demo(**changes: dict[str, Any]) -> dict[str, Any]:
    """A short run on the demo model with noise from the first step on."""
    sections: dict[str, dict[str, Any]] = {
        "noise": {"norm_dtype": "model", "zero_first_stage": False},
        "dapo": {
            "gap_prompts": 5,
            "prompts_per_rollout": 2,
            "generation_prompts": 2,
            "updates_per_rollout": 1,
            "overlong_filter": False,
        },
        "train": {"steps": 2},
        "rollout": ROLLOUT,
        "evaluation": {"baselines": [], "problems": 4},
    }
    for name, keys in changes.items():
        sections[name] = {**sections.get(name, {}), **keys}
    return configuration(demo_model_path(), **sections)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_from_rollouts_of_the_engine(
    tmp_path: Path, engines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[dict[str, torch.Tensor]] = []
    load = rollout_vllm.NormReceiver.npu_qat_load_norms

    def watched(self: Any, file: str) -> int:
        count = load(self, file)
        held = dict(self.get_model().named_parameters())
        norms.append({n: p.clone() for n, p in held.items() if n.endswith("norm.weight")})
        return count

    monkeypatch.setattr(rollout_vllm.NormReceiver, "npu_qat_load_norms", watched)
    carry_out(demo(), tmp_path / "run")
    first, second = lines(tmp_path / "run")
    print("\n", {k: v for k, v in first.items() if "gap" in k})
    # The gate: nearer to the modules with 4-bit inputs than to those with 16-bit inputs.
    assert first["engine_gap_mean"] < first["engine_gap_16bit_inputs_mean"]
    assert "engine_gap_mean" not in second
    assert len(engines) == 1
    # Clean for the gate, then noise for the rollout and clean norms for the gap, each step anew.
    clean, noisy = norms[0], norms[1]
    assert first["norms_changed"] == len(clean) == 7
    assert not any(torch.equal(noisy[name], clean[name]) for name in clean)
    assert all(torch.equal(norms[2][name], clean[name]) for name in clean)
    assert not any(torch.equal(norms[3][name], noisy[name]) for name in clean)
    # Updates reached the engine: another adapter each step, and never a linear's weight.
    assert sum(line["updates"] for line in (first, second)) > 0
    audit = json.loads((tmp_path / "run" / "audit.json").read_text())
    (check,) = [c for c in audit["checks"] if c["name"].startswith("rollouts by vllm")]
    assert check["ok"] and "engine_gap_mean" in check["measured"]


def test_the_engine_samples_from_the_policy_of_each_step(
    tmp_path: Path, engines: list[Any]
) -> None:
    """After an update, the log-probabilities that come back are the new policy's."""
    more = {"prompts_per_rollout": 4, "generation_prompts": 4}
    changes = demo(noise={"enabled": False}, train={"lr": 3e-2}, dapo=more)
    carry_out(changes, tmp_path / "run")
    for line in lines(tmp_path / "run"):
        assert line["logp_gap_off_mean"] <= 0.5
    (engine,) = engines
    assert engine.llm_engine.list_loras() == {2}  # of the last step; the first one is gone


@pytest.mark.parametrize("limit", [0.05, 100.0], ids=["default limit", "no limit"])
def test_an_engine_that_drops_the_activations_is_stopped_with_numbers(
    tmp_path: Path, engines: list[Any], monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    """W4A16 behind a W4A4 label, as engines on GPUs without native 4-bit compute serve it."""
    from vllm_ascend.quantization.methods import w4a4_mxfp4

    from tests.contract.op_kernels import decode, unpack_last

    def apply(self: Any, layer: Any, x: torch.Tensor, bias: Any = None, rank: int = 0) -> Any:
        weight = decode(unpack_last(layer.weight.t()), layer.weight_scale.transpose(0, 1), -1)
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)

    monkeypatch.setattr(w4a4_mxfp4.AscendW4A4MXFP4DynamicLinearMethod, "apply", apply)
    with pytest.raises(TrainingError, match=r"drops the quantisation of activations: over \d+"):
        carry_out(demo(dapo={"logp_gap_limit": limit}), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*/*"))


def test_an_engine_with_another_base_is_stopped_with_numbers(
    tmp_path: Path, engines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from npu_qat.training import samplers

    seen: list[samplers.Gate] = []
    check = samplers.Gate.check

    def keep(self: samplers.Gate, name: str, limit: float) -> None:
        seen.append(self)
        check(dataclasses.replace(self), name, limit)

    monkeypatch.setattr(samplers.Gate, "check", keep)
    from tests.contract_vllm import cpu_worker

    load = cpu_worker.load

    def swapped(config: Any) -> Any:
        served = load(config)
        one, two = (served.module(f"model.layers.{i}.mlp.down_proj") for i in (0, 1))
        one.weight.data, two.weight.data = two.weight.data, one.weight.data
        return served

    monkeypatch.setattr(cpu_worker, "load", swapped)
    with pytest.raises(TrainingError, match="does not compute the model that is trained"):
        carry_out(demo(), tmp_path / "run")
    assert seen[0].metrics()["engine_gap_mean"] > 0.5


def test_a_worker_takes_norms_and_nothing_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from tests.contract_vllm.stack import serve
    from tests.deploy.models import export_tiny

    served = serve(export_tiny(tmp_path).folder)
    receiver = rollout_vllm.NormReceiver()
    receiver.get_model = lambda: served.model
    for name, tensor in {
        "model.layers.0.mlp.down_proj.weight": torch.zeros(64, 96, dtype=torch.uint8),
        "model.layers.9.input_layernorm.weight": torch.ones(64, dtype=torch.bfloat16),
        "model.embed_tokens.weight": torch.zeros(96, 64, dtype=torch.bfloat16),
    }.items():
        save_file({name: tensor}, tmp_path / "file.safetensors")
        with pytest.raises(ValueError, match="is no norm"):
            receiver.npu_qat_load_norms(str(tmp_path / "file.safetensors"))
    save_file({"model.norm.weight": torch.full((64,), 1.001)}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match="did not arrive"):
        receiver.npu_qat_load_norms(str(tmp_path / "file.safetensors"))
