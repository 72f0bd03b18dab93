"""The published scan: its formulas, thresholds, strategies, schema, and plain words about them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from npu_qat.config import Recipe
from npu_qat.numerics import fake_quant
from npu_qat.sensitivity import Thresholds, published_scan
from npu_qat.sensitivity.published import METRICS, _recommend, gaussian_metrics, layer_metrics
from tests.sensitivity.models import texts, tiny

# The keys of the published result files.
SCHEMA = {
    "config": {"model_path", "quant_type", "num_layers", "thresholds"},
    "report": {"summary", "statistics", "per_layer"},
    "recommendations": {"strategy", "details", "aqn_layers", "mixed_precision_layers"},
}
PER_LAYER = {"layer_id", *METRICS, "is_problematic", "issues"}


def run(**changes: Any) -> dict[str, Any]:
    profile = changes.pop("profile", "fork-mxfp4")
    thresholds = changes.pop("thresholds", None)
    model = changes.pop("model", None) or tiny()
    recipe = Recipe(weight_profile=profile, activation_profile=profile, **changes)
    return published_scan(
        model, texts(3), recipe, model_path="m", quant_type="mxfp4", thresholds=thresholds
    )


def test_the_formulas() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    q = fake_quant(x, "fork-mxfp4")
    found = layer_metrics(x, q)
    error = x.double() - q.double()
    sqnr = 10 * math.log10(float(x.double().square().mean() / error.square().mean()))
    assert found["sqnr_db"] == pytest.approx(sqnr)
    dead = (x.abs() > 1e-10) & (q.abs() < 1e-10)
    assert found["deadzone_ratio"] == pytest.approx(float(dead.float().mean()))
    top = (q.abs() >= 0.99 * q.abs().max()).float().mean()
    assert found["saturation_ratio"] == pytest.approx(float(top))
    relative = (error.abs() / (x.double().abs() + 1e-10)).mean()
    assert found["relative_error"] == pytest.approx(float(relative))
    assert found["output_norm"] == pytest.approx(float(x.double().norm()))


@pytest.mark.parametrize("profile", ["fork-mxfp4", "fork-nvfp4-row"])
@pytest.mark.parametrize("point", ["both", "input", "output", "weight", "weight_output"])
def test_the_schema_is_the_published_one(profile: str, point: str) -> None:
    found = json.loads(json.dumps(run(profile=profile, injection_point=point)))
    for section, keys in SCHEMA.items():
        assert keys <= found[section].keys()
    rows = found["report"]["per_layer"]
    assert [row["layer_id"] for row in rows] == [0, 1]
    assert all(row.keys() >= PER_LAYER for row in rows)
    assert ("weights" in rows[0]) == (point in ("both", "weight_output"))
    for name, statistics in found["report"]["statistics"].items():
        values = [row[name] for row in rows]
        assert statistics["min"] == min(values) and statistics["max"] == max(values)
        assert statistics["mean"] == pytest.approx(sum(values) / 2)


def test_the_metrics_are_those_of_the_hidden_states() -> None:
    model, read = tiny(), texts(3)
    rows = run()["report"]["per_layer"]
    with torch.no_grad():
        hidden = [
            model(input_ids=torch.tensor([t.tokens]), output_hidden_states=True).hidden_states[1]
            for t in read
        ]
    expected = [layer_metrics(h, fake_quant(h, "fork-mxfp4"))["relative_error"] for h in hidden]
    assert rows[0]["relative_error"] == pytest.approx(sum(expected) / 3)


def test_thresholds_flag_for_the_reason_they_give() -> None:
    limits = Thresholds()
    healthy = {
        "sqnr_db": 20.0,
        "deadzone_ratio": 0.05,
        "saturation_ratio": 0.01,
        "relative_error": 0.1,
    }
    assert limits.issues(healthy) == []
    for key, value, word in (
        ("sqnr_db", 19.9, "SQNR"),
        ("deadzone_ratio", 0.051, "dead zone"),
        ("saturation_ratio", 0.011, "saturation"),
        ("relative_error", 0.11, "relative error"),
    ):
        (issue,) = limits.issues({**healthy, key: value})
        assert issue.startswith(word)


def test_all_layers_flagged_is_said_plainly_with_what_gaussian_numbers_give() -> None:
    found = run()
    assert found["report"]["summary"]["problematic_layers"] == 2
    assert found["statement"].startswith("All 2 layers are flagged, so the flags choose no layer")
    assert "Gaussian numbers in fork-mxfp4 would be flagged, too" in found["statement"]
    assert gaussian_metrics("fork-mxfp4")["sqnr_db"] == pytest.approx(18.85, abs=0.15)


def test_no_layer_flagged_is_said_plainly() -> None:
    found = run(thresholds=Thresholds(0.0, 1.0, 1.0, 10.0))
    assert found["recommendations"]["strategy"] == "no_action"
    assert found["statement"].startswith("None of the 2 layers is flagged")


@pytest.mark.parametrize(
    ("flagged", "strategy"),
    [
        (0, "no_action"),
        (1, "targeted_mitigation"),
        (2, "mixed_approach"),
        (6, "mixed_approach"),
        (7, "reconsider_quantization"),
    ],
)
def test_the_share_of_flagged_layers_chooses_the_strategy(flagged: int, strategy: str) -> None:
    rows = [
        {"layer_id": i, "is_problematic": i < flagged, "sqnr_db": 14.0 if i == 0 else 18.0}
        for i in range(20)
    ]
    found = _recommend(rows)
    assert found["strategy"] == strategy
    if strategy == "mixed_approach":
        assert found["mixed_precision_layers"] == [0]
        assert found["aqn_layers"] == list(range(1, flagged))


def test_what_the_published_method_cannot_do_is_an_error() -> None:
    with pytest.raises(ValueError, match="measures nothing"):
        run(injection_point="none")
    with pytest.raises(ValueError, match="fork-nvfp4-row"):
        run(profile="nvfp4")
    with pytest.raises(ValueError, match="rotation does not change"):
        run(rotation="hadamard32")
    with pytest.raises(ValueError, match="tokens and this model's context is 9"):
        run(model=tiny(max_position_embeddings=9))


@pytest.mark.parametrize("point", ["input", "weight"])
def test_a_damaged_model_is_an_error(point: str) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    where = (
        "hidden state behind layer 1" if point == "input" else r"layers\.1\.mlp\.down_proj\.weight"
    )
    with pytest.raises(ValueError, match=f"{where} holds NaN or Inf"):
        run(injection_point=point, model=model)
