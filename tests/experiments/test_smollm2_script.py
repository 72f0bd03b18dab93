"""The script that makes SmolLM2's folder: names, and the order of rotary rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "smollm2_from_gguf.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_from_gguf", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_come_back_from_llama_cpps_order(script: ModuleType) -> None:
    """llama.cpp's converter splits each head into halves and interleaves them."""
    weight = np.arange(2 * 8 * 3).reshape(16, 3)  # two heads of 8 rows
    stored = weight.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert not np.array_equal(stored, weight)
    assert np.array_equal(script.rows_in_halves(stored, 2), weight)


def test_every_tensor_of_the_model_has_a_name_in_the_file(script: ModuleType) -> None:
    config = LlamaConfig(**{**script.CONFIG, "num_hidden_layers": 2, "vocab_size": 64})
    wanted = set(LlamaForCausalLM(config).state_dict()) - {"lm_head.weight"}
    names = [f"blk.{i}.{kind}.weight" for i in range(2) for kind in script.NAMES]
    assert {script.target_name(name) for name in [*names, *script.OUTER]} == wanted


def test_another_file_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    words = ["script", "--gguf", str(tmp_path / "x.gguf"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        script.main()
    assert not (tmp_path / "out").exists()
