"""``config show | validate | presets``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npu_qat.cli import main
from npu_qat.config import load_config, preset_names
from npu_qat.config.dump import to_plain


@pytest.mark.parametrize("words", [[], ["--describe"]])
def test_what_is_shown_is_a_configuration(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", "--preset", "plan-e13c", *words]) == 0
    file = tmp_path / "shown.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config(file) == load_config(preset="plan-e13c")


def test_json_has_the_same_values(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "demo", "--set", "train.lr=1e-5", "--format", "json"]
    assert main(["config", "show", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    expected = to_plain(load_config(preset="demo", overrides=["train.lr=1e-5"]))
    assert shown == json.loads(json.dumps(expected))


def test_notes_do_not_disturb_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("hw_error_injection: {enabled: true, error_type: mxfp4, injection_point: both}")
    assert main(["config", "show", str(file), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["quant"]["weight_profile"] == "fork-mxfp4"
    assert err.startswith("note: hw_error_injection.injection_point")


def test_every_file_is_checked_whatever_is_wrong_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("train: {lrr: 1}")
    Path("good.yaml").write_text("train: {lr: 1}")
    assert main(["config", "validate", "bad.yaml", "good.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "ok: good.yaml\n"
    assert err == "error: bad.yaml:1: train.lrr: unknown key; did you mean train.lr?\n"
    assert main(["config", "validate", "good.yaml"]) == 0


def test_all_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "presets"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in preset_names())
