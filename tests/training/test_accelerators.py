"""DeepSpeed on one device and on another; the NPU's settings are looked at, not run."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from npu_qat.config import DeepSpeedSection, Recipe, TrainConfig
from npu_qat.layers import prepare_model
from npu_qat.training import accelerators, engine
from npu_qat.training.accelerators import (
    check_accelerator,
    gather_bytes,
    resolve_stage,
    zero_settings,
)
from npu_qat.training.engine import Engine, _config, launch_environment


@pytest.mark.parametrize(
    ("stage", "device", "processes", "resolved"),
    [
        ("auto", "npu", 8, 2),
        ("auto", "npu", 1, 0),
        ("auto", "cuda", 8, 0),
        ("auto", "cpu", 2, 0),
        (3, "npu", 8, 3),
        (0, "npu", 8, 0),
    ],
)
def test_adapters_on_several_npus_train_at_stage_2(
    stage: Any, device: str, processes: int, resolved: int
) -> None:
    assert resolve_stage(stage, device, processes) == resolved


def test_npus_get_smaller_buckets_and_the_user_has_the_last_word() -> None:
    section = DeepSpeedSection(overrides={"zero_optimization": {"reduce_bucket_size": 7}})
    zero = _config(TrainConfig(), section, 2, "npu")["zero_optimization"]
    assert zero["allgather_bucket_size"] == 200_000_000 and zero["reduce_bucket_size"] == 7
    assert zero["contiguous_gradients"] is True and zero["overlap_comm"] is False
    assert "reduce_bucket_size" not in zero_settings(2, "cuda")


def test_no_optimiser_is_left_to_deepspeed_to_compile() -> None:
    config = _config(TrainConfig(), DeepSpeedSection(), 2, "npu")
    assert "optimizer" not in config and "fp16" not in config and "bf16" not in config


@pytest.mark.parametrize("key", sorted(accelerators.REFUSED_ON_NPU))
def test_what_crashes_on_an_npu_is_refused_there_only(key: str) -> None:
    section = DeepSpeedSection(overrides={"zero_optimization": {key: True}})
    with pytest.raises(ValueError, match=rf"zero_optimization\.{key} cannot be used on an NPU"):
        _config(TrainConfig(), section, 2, "npu")
    _config(TrainConfig(), section, 2, "cuda")


def test_deepspeed_is_told_of_the_npu_before_it_is_imported_and_takes_hccl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    npu: Any = SimpleNamespace(type="npu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # Python's mark: its import fails
    with pytest.raises(ImportError):
        launch_environment(npu)
    assert os.environ["DS_ACCELERATOR"] == "npu"

    placed: list[int] = []
    joined: list[str] = []
    library = SimpleNamespace(init_distributed=lambda backend, **_: joined.append(backend))
    monkeypatch.setitem(sys.modules, "deepspeed", library)
    monkeypatch.setitem(sys.modules, "deepspeed.ops", SimpleNamespace())
    monkeypatch.setattr(engine, "check_accelerator", lambda device: None)
    monkeypatch.setattr(torch, "npu", SimpleNamespace(set_device=placed.append), raising=False)
    met: list[str] = []

    def meet(backend: str, **how: object) -> None:
        assert how["world_size"] == 1
        met.append(backend)

    monkeypatch.setattr(torch.distributed, "init_process_group", meet)
    monkeypatch.setattr(engine, "watch_peers", lambda: None)
    os.environ["LOCAL_RANK"] = "3"
    launch_environment(npu)
    assert joined == met == ["hccl"] and placed == [3]


def test_an_accelerator_chosen_before_the_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.accelerator

    npu = SimpleNamespace(_name="npu")
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: npu)
    check_accelerator("npu")
    with pytest.raises(ValueError, match=r"chosen the accelerator 'npu'.*DS_ACCELERATOR=cpu"):
        check_accelerator("cpu")


# --- bytes that cannot be gathered ----------------------------------------------------------


def packed_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": nn.Linear(64, 32).bfloat16()})
    prepare_model(model, Recipe(base_storage="packed"))
    return model


def refuse_uint8(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """A process group whose library has no uint8."""
    real, gathered = torch.distributed.all_gather_into_tensor, []

    def all_gather(out: torch.Tensor, mine: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if mine.dtype == torch.uint8:
            raise RuntimeError("Unsupported data type for HCCL process group")
        gathered.append(mine.dtype)
        return real(out, mine, *args, **kwargs)

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", all_gather)
    return gathered


def test_bytes_stay_bytes_where_they_can_be_gathered(one_process: None) -> None:
    model = packed_model()
    assert gather_bytes(model, torch.device("cpu")) is False
    assert model["proj"].weight_packed.dtype == torch.uint8


def test_bytes_travel_as_int8_where_they_cannot(
    one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = packed_model(), torch.randn(3, 64).bfloat16()
    wanted, weight = model["proj"](x), model["proj"].weight
    refuse_uint8(monkeypatch)
    assert gather_bytes(model, torch.device("cpu")) is True
    assert {p.dtype for n, p in model.named_parameters() if "weight" in n} == {torch.int8}
    assert torch.equal(model["proj"](x), wanted) and torch.equal(model["proj"].weight, weight)


def test_stage_3_trains_a_packed_base_without_uint8_collectives(
    one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = packed_model()["proj"]
            self.adapter = nn.Parameter(torch.zeros(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.base(x).float() * (1 + self.adapter)).sum()

    losses = []
    for refused in (False, True):
        with monkeypatch.context() as patch:
            if refused:
                refuse_uint8(patch)
            trainer = Engine(Adapted(), TrainConfig(lr=0.1), DeepSpeedSection(zero_stage=3))
            dtypes = {p.dtype for n, p in trainer.model.named_parameters() if "weight" in n}
            assert dtypes == {torch.int8 if refused else torch.uint8}
            x = torch.ones(2, 64, dtype=torch.bfloat16)
            for _ in range(2):
                loss = trainer.ds(x)
                trainer.backward(loss, last=True)
                trainer.step()
            losses.append(float(loss))
    assert losses[0] == losses[1]
