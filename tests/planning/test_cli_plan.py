"""``npu-qat plan`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npu_qat.cli import main
from npu_qat.config import load_config

SFT = ["--set", "train.method=sft", "--set", "evaluation.metric=answer_perplexity"]
SMALL = ["--model", "qwen2.5-0.5b", "--soc", "h100", "--prompt-tokens", "64"]


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_a_plan_shows_layouts_parts_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, *SMALL, "--devices", "2", "--completion-tokens", "100")
    assert code == 0
    for part in (
        "494,032,768 parameters",
        "2 x NVIDIA H100 SXM 80 GB",
        "prompts of 64 and completions of 100 tokens",
        "ZeRO-3, packed, checkpointing",
        "keys and values",
        "--set quant.base_storage=",
        "vendor's statement",
    ):
        assert part in " ".join(out.split()), part


def test_the_file_holds_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    code, out, _ = plan(
        capsys, *SMALL, "--zero", "0", "--storage", "packed", "--set", "lora.r=4",
        "--json", str(file),
    )  # fmt: skip
    assert code == 0 and str(file) in out.replace("\n", "")
    found = json.loads(file.read_text())
    assert [layout["name"] for layout in found["layouts"]] == [
        "ZeRO-0, packed",
        "ZeRO-0, packed, checkpointing",
    ]
    assert found["best"] in out
    for layout in found["layouts"]:
        config = load_config(overrides=layout["settings"])
        assert config.train.micro_batch_size == layout["micro_batch_size"]
        assert layout["peak"] == max(sum(p.values()) for p in layout["phases"].values())


def test_a_measured_calibration_gives_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.planning.test_calibration import made_rows

    file = tmp_path / "rows.json"
    environment = {"accelerator": "an H100", "processor": "host", "device": "cuda"}
    file.write_text(json.dumps({"rows": made_rows(), "environment": environment}))
    code, out, _ = plan(capsys, *SMALL, "--calibrate", str(file))
    assert code == 0
    assert "efficiencies measured on an H100 (rows.json)" in " ".join(out.split())
    assert "the intervals say nothing about other devices" in " ".join(out.split())
    assert "decoding steps" in out and "forward and backward" in out


def test_intervals_of_the_shipped_calibration_are_those_of_images(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = plan(capsys, *SMALL)
    assert code == 0
    assert "say nothing about packed storage and other devices" in " ".join(out.split())


def test_another_engine_has_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    code, out, err = plan(capsys, *SMALL, "--set", "rollout.engine=vllm", "--json", str(file))
    assert code == 0, err
    assert "no times: rollout.engine vllm has its own" in " ".join(out.split())
    layouts = json.loads(file.read_text())["layouts"]
    assert layouts and all(layout["fits"] and layout["seconds"] is None for layout in layouts)


def test_what_does_not_fit_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # so that no cell of the table is broken
    code, out, _ = plan(capsys, *SMALL, "--memory-gib", "3")
    assert code == 0
    assert "nothing fits. The nearest is" in out and "too much" in out
    assert "--set" not in out


def test_known_models_and_devices_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--list")
    assert code == 0
    assert "Qwen/Qwen2.5-72B-Instruct" in out and "ascend-950dt" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--soc", "h100"], "--model is missing"),
        (["--model", "qwen2.5-7b"], "--soc is missing: the device, one of a100-40gb"),
        (["--model", "qwen2.5-7b", "--soc", "x"], "unknown --soc 'x'"),
        (["--model", "qwen2.5-7b", "--soc", "ascend-910b"], "give --memory-gib"),
        ([*SMALL, "--devices", "0"], "--devices must be at least 1"),
        ([*SMALL, "--completion-tokens", "0"], "must be at least 1"),
        ([*SMALL, "--completion-tokens", "0", *SFT], "must be at least 1"),
        ([*SMALL, "--memory-gib", "nan"], "memory must be positive and finite"),
        ([*SMALL, "--tflops", "inf"], "flops must be positive and finite"),
        (
            [*SMALL, "--reserve-gib", "-100"],
            "--reserve-gib must be 0 or more, and finite",
        ),
        ([*SMALL, "--reserve-gib", "nan"], "--reserve-gib must be 0 or more"),
        ([*SMALL, "--calibrate", "nowhere.json"], "nowhere.json: no result of"),
        ([*SMALL, "--json", "nowhere/plan.json"], "its folder does not exist"),
        (["--model", "./nowhere", "--soc", "h100"], "is no local folder, not in the hub cache"),
    ],
)
def test_mistakes_are_explained(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = plan(capsys, *words)
    assert code == 2
    assert err.startswith("error: ") and message in err
