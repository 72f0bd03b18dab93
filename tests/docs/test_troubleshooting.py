"""Each message that docs/troubleshooting.md explains is a message of the program.

The source is read as syntax: a message is a text, or texts and values put together, in which each
value becomes "…". The page quotes messages in that form, whole or in part.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from npu_qat.backends import BackendUnavailable, select
from npu_qat.config import ConfigError, load_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^#### `(.+)`$", PAGE, re.MULTILINE)


def text_of(node: ast.expr) -> str | None:
    """The text that an expression makes, with … for what is known at run time only."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (text_of(v) if isinstance(v, ast.Constant) else "…" for v in node.values)
        return "".join(part or "" for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None and right is None else f"{left or '…'}{right or '…'}"
    return None


@cache
def texts() -> tuple[str, ...]:
    found = {
        text
        for path in (ROOT / "npu_qat").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.expr) and (text := text_of(node)) and len(text) >= 8
    }
    return tuple(" ".join(text.split()) for text in found)


def is_in_the_source(message: str) -> bool:
    """Whether some text of the source holds ``message``. A … at its ends may stand for nothing."""
    wanted = message.strip("…")
    return any(wanted in text for text in texts())


def test_the_page_has_messages_and_each_once() -> None:
    assert len(MESSAGES) > 50
    assert len(MESSAGES) == len(set(MESSAGES))
    assert PAGE.count("\n#### ") == len(MESSAGES), "a message is quoted in `...`"


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_in_the_source(message: str) -> None:
    assert is_in_the_source(message)


def test_the_chinese_page_quotes_messages_that_exist() -> None:
    page = (ROOT / "docs" / "zh" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([^`]+)` \|", page.split("## 常见问题")[1].split("\n## ")[0], re.MULTILINE
    )
    assert len(rows) >= 5
    for row in rows:
        assert is_in_the_source(re.sub(r"'\w+'", "…", row)), row


def test_a_message_that_is_not_there_is_found_out() -> None:
    assert not is_in_the_source("the frobnicator is out of …")
    assert not is_in_the_source("device … is not available: …. Use --device none")


def quoted(message: str) -> bool:
    """Whether the page quotes what the program really says, values and all."""
    line = " ".join(message.split())
    patterns = (".*".join(map(re.escape, quote.split("…"))) for quote in MESSAGES)
    return any(re.search(pattern, line) for pattern in patterns)


def test_messages_as_a_user_meets_them_are_quoted() -> None:
    with pytest.raises(BackendUnavailable) as no_device:
        select("npu" if torch.cuda.is_available() else "cuda")
    assert quoted(str(no_device.value))
    for overrides in (
        ["train.learning_rate=1"],
        ["quant.activation_profile=mxfp4"],
        ["quant.activation_profile=ascend950-mse"],
        ["dapo.prompts_per_rollout=7"],
        ["noise.enabled=true", "noise.num_stages=1"],
        ["train.method=sft", "noise.enabled=true"],
        ["quant.base_storage=packed", "quant.apply_during=training"],
    ):
        with pytest.raises(ConfigError) as mistake:
            load_config(preset=None, overrides=overrides)
        assert quoted(str(mistake.value)), str(mistake.value)
    for preset in ("no-such", "e13a"):
        with pytest.raises(ConfigError) as mistake:
            load_config(preset=preset)
        assert quoted(str(mistake.value)), str(mistake.value)
