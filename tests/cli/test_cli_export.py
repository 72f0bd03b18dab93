"""``export`` and ``validate`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npu_qat.cli import main
from npu_qat.config import dump_yaml, load_config
from tests.deploy.models import core_of, damage, damage_json, save, save_adapter

LORA = ("lora.r=4", "lora.alpha=8")  # as ``save_adapter`` has it


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run ``runs/mine`` over a small model, as training leaves it."""
    monkeypatch.chdir(tmp_path)
    source = save(tmp_path / "model")
    config = load_config(preset="log-e13h", overrides=[f"model.path={source}", *LORA])
    config = config.model_copy(update={"quant": config.quant.model_copy(update=SERVED)})
    run = tmp_path / "runs" / "mine"
    (run / "adapters" / "w4a4").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_yaml(config))
    save_adapter(run / "adapters" / "w4a4", size=0.1)
    save_adapter(run / "adapters" / "bf16_lora", seed=1)
    return run


SERVED = {
    "injection_point": "both",
    "weight_profile": "ascend950",
    "activation_profile": "ascend950",
    "block_axis": "row",
    "exclude": ("lm_head",),
    "lora_input": "full",
    "target_layers": None,
}


def test_a_run_is_exported_with_its_adapter(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "runs/mine", "--format", "ascend", "--output", "served"]) == 0
    out = capsys.readouterr().out
    assert "validated" in out and "adapter: served/adapter, bound to this base" in out
    mine = there / "adapters" / "w4a4" / "adapter_model.safetensors"
    assert Path("served/adapter/adapter_model.safetensors").read_bytes() == mine.read_bytes()
    assert main(["validate", "served"]) == 0
    assert capsys.readouterr().out == "served: no findings\n"


def test_the_twin_says_that_its_activations_differ(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--format", "compressed-tensors", "--adapter", "none", "--output", "twin"]
    assert main(["export", "runs/mine", *words]) == 0
    out = capsys.readouterr().out
    assert "activations differ: trained with ascend950, served with compressed-tensors" in out
    assert not Path("twin/adapter").exists()


def test_merging_prints_what_survives(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--format", "ascend", "--adapter", "merge", "--output", "merged"]
    assert main(["export", "runs/mine", *words]) == 0
    out = capsys.readouterr().out
    assert "What is left of the merged adapter" in out
    rows = {line.split()[1]: line.split() for line in out.splitlines() if "%" in line}
    assert set(rows) == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")} | {"all"}


def test_a_model_is_exported_without_a_run(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "model", "--format", "ascend", "--output", "ptq", "--json"]
    assert main(["export", *words, "--set", "quant.weight_profile=ascend950-mse"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["recipe"]["weight_profile"] == "ascend950-mse"
    assert record["adapter"] is None and len(record["base_fingerprint"]) == 64


def test_findings_are_printed_and_the_exit_code_is_1(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", "--model", "model", "--format", "ascend", "--output", "ptq"])
    name = "model.layers.0.mlp.up_proj.weight_scale"
    damage(Path("ptq"), lambda tensors: tensors.pop(name))
    capsys.readouterr()
    assert main(["validate", "ptq"]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{name}: missing;") and "Fix: export the model again" in out
    assert main(["validate", "ptq", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["tensor"] == name and set(finding) == {"tensor", "problem", "fix"}


def test_another_model_in_the_place_of_the_runs_is_refused(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modules: list[dict[str, Any]] = [
        {"name": path, "weight_rel_error": 0.5} for path in core_of(Path("model")).quantized
    ]
    (there / "audit.json").write_text(json.dumps({"modules": modules}))
    assert main(["export", "runs/mine", "--format", "ascend", "--output", "served"]) == 2
    assert "is not the model that was trained" in capsys.readouterr().err
    assert not Path("served").exists() and not Path("served.partial").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either a run directory or --model PATH"),
        (["runs/mine", "--model", "x"], "give either a run directory or --model PATH"),
        (["runs/other"], "runs/other is no run directory"),
        (["runs/mine", "--preset", "demo"], "--preset goes with --model"),
        (["runs/mine", "--set", "quant.exclude=lm_head"], "--set model... or quant... goes with"),
        (["--model", "model", "--adapter", "keep"], "needs --adapter-dir DIR"),
        (["--model", "model", "--adapter-dir", "x"], "x holds no readable adapter"),
        (["--model", "nowhere"], "'nowhere' is no folder and cannot be had from the hub"),
        (["--model", "model", "--tensor-parallel", "0"], "must be 1 or more"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    there: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *words, "--format", "ascend", "--output", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("choice", ["keep", "merge"])
@pytest.mark.parametrize(
    ("change", "told"), [({"lora_alpha": 16}, "'lora_alpha': 16"), ({"use_rslora": True}, "True")]
)
def test_another_scale_than_the_run_trained_with_is_refused(
    there: Path,
    choice: str,
    change: dict[str, Any],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage_json(there / "adapters" / "w4a4", "adapter_config.json", lambda c: c.update(change))
    words = ["--format", "ascend", "--adapter", choice, "--output", "out"]
    assert main(["export", "runs/mine", *words]) == 2
    said = capsys.readouterr().err
    has, _, trained = said.partition("but the run trained with")
    assert told in has and "{'r': 4, 'lora_alpha': 8, 'use_rslora': False}" in trained
    assert not Path("out").exists()


def test_a_run_without_an_adapter_says_what_to_do(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (there / "adapters" / "w4a4").iterdir():
        file.unlink()
    (there / "adapters" / "w4a4").rmdir()
    assert main(["export", "runs/mine", "--format", "ascend", "--output", "out"]) == 2
    assert "holds no trained adapter yet" in capsys.readouterr().err
