"""Loading the 16-bit checkpoint: dtype, stop tokens, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from npu_qat.config import ModelConfig
from npu_qat.layers.base_model import load_base, model_source, stop_ids
from tests.training.tiny import save_tiny_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_folder_is_loaded_in_the_configured_dtype(
    folder: Path, name: str, dtype: torch.dtype
) -> None:
    model, tokenizer = load_base(ModelConfig(path=str(folder), dtype=name), CPU)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training
    assert tokenizer.decode(tokenizer("12", add_special_tokens=False)["input_ids"]) == "12"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_configured_attention_is_used(folder: Path, attention: str) -> None:
    model, _ = load_base(ModelConfig(path=str(folder), attention=attention), CPU)
    assert model.config._attn_implementation == attention


def test_demo_is_the_model_in_the_package() -> None:
    assert Path(model_source(ModelConfig())).name == "demo_model"
    assert model_source(ModelConfig(path="some/name")) == "some/name"


def test_a_folder_that_is_not_there_is_an_error_that_says_so(tmp_path: Path) -> None:
    config = ModelConfig(path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"path '.*nowhere' cannot be loaded \(no such folder"):
        load_base(config, CPU)


def test_a_folder_without_a_model_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"model.path '{tmp_path}'"):
        load_base(ModelConfig(path=str(tmp_path)), CPU)


def test_a_cut_off_weight_file_is_an_error_that_names_the_model(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"model.path '{folder}' cannot be loaded"):
        load_base(ModelConfig(path=str(folder)), CPU)


def test_a_tokenizer_without_chat_template_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, chat_template=False)
    with pytest.raises(ValueError, match="no chat template"):
        load_base(ModelConfig(path=str(folder)), CPU)


@pytest.mark.parametrize(
    ("configured", "own", "wanted"),
    [(5, 5, [5]), ([7, 5], 9, [5, 7, 9]), (None, 4, [4]), (5, None, [5])],
)
def test_every_stop_token_counts(configured: object, own: int | None, wanted: list[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert stop_ids(model, SimpleNamespace(eos_token_id=own)) == wanted


def test_a_model_that_can_never_stop_is_refused() -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        stop_ids(model, SimpleNamespace(eos_token_id=None))
