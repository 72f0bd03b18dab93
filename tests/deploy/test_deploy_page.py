"""docs/deploy.md: its commands succeed, in their order, and its Python runs on their result."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from npu_qat.cli import build_parser, main
from npu_qat.config import ModelConfig, Recipe
from npu_qat.deploy import AscendWriter, PackedCore, open_checkpoint, read_adapter
from npu_qat.deploy.export import export
from npu_qat.layers.base_model import load_base

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands(language: str) -> list[list[str]]:
    lines = [line for block in blocks(language) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("npu-qat ")]


def test_the_commands_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [main(words) for words in commands("bash")] == [0, 0, 0]


def test_commands_that_need_a_users_files_are_understood() -> None:
    parsed = [build_parser().parse_args(words) for words in commands("text")]
    assert len(parsed) == 9 and all(callable(args.run) for args in parsed)


def test_the_python_block_takes_the_adapter_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    monkeypatch.chdir(tmp_path)
    config = ModelConfig()
    model, _ = load_base(config, torch.device("cpu"))
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).save_pretrained("lora")
    core = PackedCore(open_checkpoint(config), Recipe())
    export(core, AscendWriter(), Path("served"), adapter=read_adapter(Path("lora")))
    (code,) = blocks("python")
    exec(compile(code, "docs/deploy.md", "exec"), {})
