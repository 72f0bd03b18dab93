"""The engine for rollouts, apart from vllm: what is pushed, when, and what makes it stop.

The same code with the real vllm: ``tests/contract_vllm/test_rollout_engine.py``.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from npu_qat.config import RolloutConfig, RunConfig
from npu_qat.training import rollout_vllm
from npu_qat.training.engine import TrainingError
from npu_qat.training.rollout import SamplingParams
from npu_qat.training.rollout_vllm import VllmSampler, engine_arguments, engine_environment
from npu_qat.training.samplers import Gate
from tests.deploy.models import tiny

CPU = torch.device("cpu")


class Engine:
    """Records what vllm's ``LLM`` is asked."""

    def __init__(self) -> None:
        self.llm_engine = self
        self.norms: list[dict[str, torch.Tensor]] = []
        self.adapters: dict[int, dict[str, torch.Tensor]] = {}
        self.resets = 0
        self.logprob = -0.5

    def collective_rpc(self, method: str, args: tuple[str]) -> list[int]:
        assert method == "npu_qat_load_norms"
        self.norms.append(load_file(args[0]))
        return [len(self.norms[-1])]

    def add_lora(self, request: Any) -> bool:
        path = Path(request.lora_path) / "adapter_model.safetensors"
        self.adapters[request.lora_int_id] = load_file(path)
        return True

    def remove_lora(self, number: int) -> None:
        del self.adapters[number]

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, requests: Any, params: Any, lora_request: Any, use_tqdm: bool) -> list[Any]:
        assert lora_request.lora_int_id in self.adapters
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        token_ids=[7, 2],
                        logprobs=[{t: SimpleNamespace(logprob=self.logprob)} for t in (7, 2)],
                        finish_reason="length" if i else "stop",
                    )
                ]
            )
            for i, _ in enumerate(requests)
        ]


@pytest.fixture
def sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmSampler:
    def request(name: str, number: int, path: str) -> Any:
        return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path)

    vllm, lora, requests = (ModuleType(n) for n in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.SamplingParams = lambda **keys: SimpleNamespace(**keys)  # type: ignore[attr-defined]
    requests.LoRARequest = request  # type: ignore[attr-defined]
    for module in (vllm, lora, requests):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(rollout_vllm, "start_engine", lambda arguments: Engine())
    return VllmSampler(tmp_path, RolloutConfig(), 4, [2], CPU)


@pytest.fixture
def model() -> Any:
    return get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear"))


def change(model: Any, part: str) -> None:
    """Change the first parameter whose name holds ``part``."""
    parameter = next(p for n, p in model.named_parameters() if part in n)
    with torch.no_grad():
        parameter.add_(0.25)


def test_the_first_time_everything_is_pushed_that_may_change_and_no_base_weight(
    sampler: VllmSampler, model: Any
) -> None:
    sampler.follow(model)
    (norms,) = sampler.llm.norms
    assert len(norms) == 5 and all(name.endswith("norm.weight") for name in norms)
    (adapter,) = sampler.llm.adapters.values()
    assert len(adapter) == 28 and all(".lora_" in name for name in adapter)
    assert {t.dtype for t in (*norms.values(), *adapter.values())} == {torch.bfloat16}


def test_only_what_changed_is_pushed_again(sampler: VllmSampler, model: Any) -> None:
    sampler.follow(model)
    sampler.follow(model)
    assert len(sampler.llm.norms) == sampler.llm.resets == 1
    change(model, "layers.1.input_layernorm")
    sampler.follow(model)
    assert list(sampler.llm.norms[1]) == ["model.layers.1.input_layernorm.weight"]
    assert list(sampler.llm.adapters) == [1]
    change(model, "lora_B")
    sampler.follow(model)
    # Under a number of its own, and the one before is gone.
    assert list(sampler.llm.adapters) == [2] and len(sampler.llm.norms) == 2
    # The prefix cache holds another model's keys and values after every change.
    assert sampler.llm.resets == 3


def test_completions_carry_the_engines_log_probabilities(sampler: VllmSampler, model: Any) -> None:
    sampler.follow(model)
    params = SamplingParams(max_new_tokens=2)
    ended, cut = sampler.sample([[1], [1, 3]], [(0, 1), (0, 2)], params, stop=lambda: None)
    assert ended.tokens == [7, 2] and ended.logp == [-0.5, -0.5] and not ended.truncated
    assert cut.truncated


def test_a_log_probability_that_is_no_number_stops_the_run(
    sampler: VllmSampler, model: Any
) -> None:
    sampler.follow(model)
    sampler.llm.logprob = math.nan
    with pytest.raises(TrainingError, match="NaN"):
        sampler.sample([[1]], [(0,)], SamplingParams(max_new_tokens=2), stop=lambda: None)


def test_rows_have_seeds_of_their_own() -> None:
    seeds = {rollout_vllm.row_seed((0, step, row)) for step in range(9) for row in range(9)}
    assert len(seeds) == 81 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("rank", "device", "format", "allowed"),
    [
        (5, "cuda", "auto", 8),
        (64, "cuda", "auto", 64),
        (4, "npu", "auto", 128),
        (4, "cpu", "ascend", 128),
        (200, "npu", "auto", 256),
    ],
)
def test_the_rank_is_one_that_the_engine_has_kernels_for(
    rank: int, device: str, format: Any, allowed: int
) -> None:
    config = RolloutConfig(engine_format=format)
    assert engine_arguments(Path("base"), config, rank, device)["max_lora_rank"] == allowed


def test_options_reach_the_engine_unless_this_program_decides_them() -> None:
    given = RolloutConfig(engine_options={"gpu_memory_utilization": 0.7})
    assert engine_arguments(Path("b"), given, 4, "cuda")["gpu_memory_utilization"] == 0.7
    for reserved in ("logprobs_mode", "max_lora_rank", "worker_extension_cls"):
        config = RolloutConfig(engine_options={reserved: 1})
        with pytest.raises(ValueError, match=reserved):
            engine_arguments(Path("b"), config, 4, "cuda")
    with pytest.raises(ValueError, match="600"):
        engine_arguments(Path("b"), RolloutConfig(), 600, "cuda")


@pytest.mark.parametrize(("visible", "wanted"), [("4,5", "5"), (None, "1")])
def test_the_engine_starts_alone_on_this_processs_device(
    visible: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("VLLM_WORKER_MULTIPROCESSING_METHOD", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with engine_environment(torch.device("cuda", 1)):
        assert not set(launched) & set(os.environ)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted
    assert {name: os.environ[name] for name in launched} == launched
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_the_gate_passes_an_engine_that_is_nearer_to_4_bit_inputs() -> None:
    Gate([0.01, 0.03], [0.2, 0.2]).check("vllm", 0.05)
    Gate([0.01, 0.03], []).check("vllm", 0.05)  # a recipe without 4-bit inputs


def test_the_gate_stops_with_numbers() -> None:
    with pytest.raises(TrainingError, match=r"by 0\.2000 in the mean, 0\.3000 at most.*0\.05"):
        Gate([0.1, 0.3], [0.5, 0.5]).check("vllm", 0.05)
    with pytest.raises(TrainingError, match=r"drops the quantisation.*0\.0200.*only 0\.0100"):
        Gate([0.02, 0.02], [0.01, 0.01]).check("vllm", 0.05)
    # Beyond the limit too, the fault that has a name is called by it.
    with pytest.raises(TrainingError, match=r"drops the quantisation.*0\.2300.*only 0\.0040"):
        Gate([0.23], [0.004]).check("vllm", 0.05)


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"engine": "vllm", "top_p": 0.9}},
        {"rollout": {"engine": "vllm"}, "quant": {"lora_input": "quantised"}},
        {"rollout": {"engine": "vllm"}, "quant": {"apply_during": "training"}},
        {"rollout": {"engine": "vllm"}, "noise": {"enabled": True, "norm_dtype": "fp32"}},
        {"rollout": {"engine": "vllm"}, "model": {"dtype": "fp16"}},
        {"rollout": {"engine": "vllm"}, "train": {"method": "sft"}},
    ],
)
def test_what_an_engine_does_not_compute_is_refused(sections: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rollout\.engine: vllm:"):
        RunConfig.model_validate(sections)
    RunConfig.model_validate({"rollout": {"engine": "vllm"}})
