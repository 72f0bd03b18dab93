"""The scripts in ``examples/`` run as they are, and what they save is what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from npu_qat.assets import demo_model_path
from npu_qat.cli import main
from npu_qat.config import Recipe
from npu_qat.layers import load_lora, prepare_model
from tests.training.launching import ROOT, launch

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
WITH_TRL = ("trl_grpo.py", "trl_sft.py")


def run_example(name: str, output: Path, launcher: str = "python", processes: int = 1) -> str:
    if name in WITH_TRL:
        pytest.importorskip("trl", reason="TRL is the extra 'trl'")
    return launch(launcher, processes, [str(ROOT / "examples" / name), str(output)])


def check_adapter(folder: Path) -> None:
    """It loads on a fresh base and changes its logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.bfloat16)
    prepare_model(model, Recipe())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model.eval()(ids).logits
        after = load_lora(model, str(folder)).eval()(ids).logits
    assert not torch.equal(before, after)


def test_every_example_is_listed_in_the_documentation() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text("utf-8")
    assert EXAMPLES and all(f"examples/{name}" in page for name in EXAMPLES)


@pytest.mark.parametrize("name", ["hf_trainer.py"])
def test_an_example_trains_and_saves(name: str, tmp_path: Path) -> None:
    printed = run_example(name, tmp_path / "out")
    assert str(tmp_path / "out") in printed
    check_adapter(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EXAMPLES if n != "hf_trainer.py"])
def test_a_larger_example_trains_and_saves(name: str, tmp_path: Path) -> None:
    run_example(name, tmp_path / "out")
    check_adapter(tmp_path / "out")
    if name in WITH_TRL:
        assert json.loads((tmp_path / "out" / "audit.json").read_text())["verdict"] == "pass"


@pytest.mark.distributed
def test_the_accelerate_example_runs_on_two_processes(tmp_path: Path) -> None:
    printed = run_example("accelerate_loop.py", tmp_path / "out", "torchrun", 2)
    assert printed.count("step 4: loss") == 1
    check_adapter(tmp_path / "out")


@pytest.mark.slow
def test_the_trainer_s_adapter_goes_through_evaluate_and_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("hf_trainer.py", tmp_path / "out")
    capsys.readouterr()
    task = ["task.levels=[1]", "task.test_size=8", "evaluation.problems=4"]
    settings = [part for text in task for part in ("--set", text)]
    adapter = str(tmp_path / "out")
    assert main(["evaluate", "--model", "demo", "--adapter", adapter, "--json", *settings]) == 0
    arms = json.loads(capsys.readouterr().out)["arms"]
    assert arms["w4a4_trained"]["n"] == 4
    served = str(tmp_path / "served")
    exported = ["export", "--model", "demo", "--format", "ascend", "--output", served]
    assert main([*exported, "--adapter-dir", adapter]) == 0
    assert (tmp_path / "served" / "adapter" / "npu_qat_base.json").exists()
