"""YAML means what people think it means, and says where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from npu_qat.config.errors import ConfigError
from npu_qat.config.yaml_text import corrected_multipliers, parse_scalar, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("+7", 7),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-01-14", "2026-01-14"),
        ("'1e-5'", "1e-5"),
        ('"true"', "true"),
        (".inf", float("inf")),
        ("[1, 2e-3, a]", [1, 0.002, "a"]),
        ("{14: 1.5, '15': 2}", {14: 1.5, "15": 2}),
        ("!!str 12", "12"),
    ],
)
def test_scalars_follow_the_yaml_1_2_core_schema(text: str, value: Any) -> None:
    parsed = parse_scalar(text, "here")
    assert parsed == value and type(parsed) is type(value)


def test_the_default_loader_would_have_got_the_learning_rate_wrong() -> None:
    assert yaml.safe_load("1e-5") == "1e-5"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_prints_is_read_back(number: float) -> None:
    assert parse_scalar(repr(number), "here") == number


def test_lines_of_keys_are_remembered() -> None:
    document = parse_yaml("# comment\na:\n  b: 1\n  c:\n    - d: 2\n", "run.yaml")
    assert document.data == {"a": {"b": 1, "c": [{"d": 2}]}}
    assert document.place(("a", "b")) == "run.yaml:3"
    assert document.place(("a", "c", "0", "d")) == "run.yaml:5"
    assert document.place(("a", "b", "unknown")) == "run.yaml:3"
    assert document.place(("z",)) == "run.yaml"


def test_anchors_and_merges_work() -> None:
    text = "base: &base {a: 1, b: 2}\nover:\n  <<: *base\n  b: 3\n"
    assert parse_yaml(text, "f").data["over"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3: a is given twice (first on line 1); keep one"),
        ("n:\n  14: 1\n  '14': 2\n", "f:3: n.14 is given twice (first on line 2); keep one"),
        ("1.5: a\n", "f:1: a key must be a name or a whole number; put other keys in quotes"),
        ("true: a\n", "f:1: a key must be a name or a whole number; put other keys in quotes"),
        ("a: !!python/name:os.system\n", "is not supported; write plain values"),
        ("a: &x [*x]\n", "f:1: a.0 contains itself"),
        ("a: [1\n", "f:2: not valid YAML"),
        ("a: b: c\n", "f:1: not valid YAML in 'a: b: c'"),
        ("a:\n\t- b\n", "f:2: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        ("a: !!int many\n", "'many' is no int"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f")
    assert message in str(caught.value)


PLAN = """noise_injection:
  layer_sigma_config:
    default_multiplier: 0.0    # No noise on non-targeted layers
    layer_multipliers:
      6: 1.0, 7: 1.0, 8: 1.0, 9: 1.0, 10: 1.0,
      11: 1.0, 12: 1.0, 13: 1.0, 14: 1.0, 15: 1.0
"""


def test_the_plans_comma_run_gets_the_corrected_block() -> None:
    with pytest.raises(ConfigError, match="need braces around them") as caught:
        parse_yaml(PLAN, "plan.yaml")
    corrected = str(caught.value).split("Write\n")[1]
    block = PLAN.split("    layer_multipliers:")[0] + corrected
    config = parse_yaml(block, "corrected").data["noise_injection"]["layer_sigma_config"]
    assert config["layer_multipliers"] == dict.fromkeys(range(6, 16), 1.0)
    assert config["default_multiplier"] == 0.0


@pytest.mark.parametrize(
    ("text", "corrected"),
    [
        ("layer_multipliers: 14: 1.5, 15: 1.5", "layer_multipliers: {14: 1.5, 15: 1.5}"),
        ("  layer_multipliers: 14: 1.5", "  layer_multipliers: {14: 1.5}"),
        ("14: 1.5, 15: 2e-1", "layer_multipliers: {14: 1.5, 15: 2e-1}"),
        ("m:\n  14: 1.5,\n  15: 1.5,\n", "m: {14: 1.5, 15: 1.5}"),
    ],
)
def test_other_comma_runs_are_corrected_too(text: str, corrected: str) -> None:
    assert corrected_multipliers(text) == corrected


@pytest.mark.parametrize("text", ["a: 1", "m:\n  14: 1.5\n  15: 1.5", "m: {1: 2, 3: 4}", "x: [1,"])
def test_good_yaml_is_no_comma_run(text: str) -> None:
    assert corrected_multipliers(text) is None
