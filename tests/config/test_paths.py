"""Paths match by whole segments, wherever wrappers have moved them."""

from __future__ import annotations

import pytest

from npu_qat.config.paths import layer_index, match_any, match_path

Q2 = "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("lm_head", "lm_head"),
        ("model.lm_head", "lm_head"),
        (Q2, "layers.2"),
        (Q2, "q_proj"),
        (Q2, "layers.*.self_attn.q_proj"),
        (Q2, "*.2"),
        (Q2, Q2),
        (f"base_model.model.{Q2}.base_layer", "layers.2.self_attn"),
        ("layers.layers.2", "layers.2"),
    ],
)
def test_matches_a_run_of_whole_segments(path: str, pattern: str) -> None:
    assert match_path(path, pattern)


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("model.layers.20.self_attn.q_proj", "layers.2"),
        ("model.layers.12.self_attn.q_proj", "layers.2"),
        ("my_lm_head", "lm_head"),
        (Q2, "proj"),
        (Q2, "layers.self_attn"),
        (Q2, "layers.*.q_proj"),
        ("q_proj", Q2),
        (Q2, "q_proj.*"),
        (Q2, "Q_proj"),
    ],
)
def test_never_matches_parts_of_segments_or_gaps(path: str, pattern: str) -> None:
    assert not match_path(path, pattern)


@pytest.mark.parametrize("pattern", ["", ".", "layers.", "layers..mlp"])
def test_an_empty_segment_is_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match="empty segment"):
        match_path(Q2, pattern)


def test_a_partial_wildcard_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'\*' stands for one whole segment"):
        match_path(Q2, "layers.1*")


def test_match_any_takes_the_first_that_matches_and_none_of_nothing() -> None:
    assert match_any(Q2, ["lm_head", "layers.2"])
    assert not match_any(Q2, ["lm_head", "layers.3"])
    assert not match_any(Q2, [])


@pytest.mark.parametrize(
    ("path", "index"),
    [
        (Q2, 2),
        ("base_model.model.model.layers.27.mlp.up_proj.lora_A.default", 27),
        ("transformer.h.5.attn.c_attn", 5),
        ("model.layers.12.mlp.experts.3.up_proj", 12),
        ("model.norm", None),
        ("lm_head", None),
        ("model.layer2.norm", None),
    ],
)
def test_layer_index_is_the_first_number(path: str, index: int | None) -> None:
    assert layer_index(path) == index
