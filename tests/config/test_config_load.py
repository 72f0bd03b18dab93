"""Layers, origins, strict types, and all problems at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from npu_qat.config import ConfigError, RunConfig, load_config, load_run, parse_overrides

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write ``run.yaml`` into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str) -> str:
        Path("run.yaml").write_text(text, encoding="utf-8")
        return "run.yaml"

    return write_file


def problems(source: str | None = None, **kwargs: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, **kwargs)  # type: ignore[arg-type]
    return caught.value.problems


def test_nothing_gives_the_defaults() -> None:
    assert load_config() == RunConfig()


def test_an_empty_file_and_an_empty_section_give_the_defaults(write: Write) -> None:
    assert load_config(write("")) == RunConfig()
    assert load_config(write("train:\n  # lr: 1e-5\nnoise:\n  layers:\n")) == RunConfig()


def test_overrides_go_over_the_file_and_the_file_over_the_preset(write: Write) -> None:
    file = write("train: {lr: 2e-4, steps: 7}\nnoise: {sigma_start: 0.02}\n")
    config = load_config(file, preset="demo", overrides=["train.steps=3"])
    demo = load_config(preset="demo")
    assert (config.train.lr, config.train.steps) == (2e-4, 3)
    assert config.noise.sigma_start == 0.02
    assert config.noise.num_stages == demo.noise.num_stages
    assert config.rollout == demo.rollout != RunConfig().rollout


def test_a_later_override_wins() -> None:
    assert load_config(overrides=["train.lr=1", "train.lr=2"]).train.lr == 2.0


def test_a_mapping_of_a_file_replaces_the_presets_and_an_override_changes_one_entry(
    write: Write,
) -> None:
    file = write("noise: {layers: {layer_multipliers: {1: 2.0}}}")
    config = load_config(
        file, preset="plan-e13d", overrides=["noise.layers.layer_multipliers.3=0.5"]
    )
    assert config.noise.layers.layer_multipliers == {1: 2.0, 3: 0.5}
    assert config.noise.layers.default_multiplier == 1.0
    same = load_config(file, overrides=["noise.layers.layer_multipliers.1=7"])
    assert same.noise.layers.layer_multipliers == {1: 7.0}


def test_a_section_can_be_set_as_a_mapping_and_is_merged() -> None:
    config = load_config(preset="demo", overrides=["train={lr: 5e-4, steps: 2}"])
    assert (config.train.lr, config.train.steps) == (5e-4, 2)
    assert config.train.micro_batch_size == load_config(preset="demo").train.micro_batch_size


def test_an_optional_section_can_be_given_and_taken_back(write: Write) -> None:
    file = write("noise: {layers: {zone_schedule: {edge_layers: [0], middle_layers: [1]}}}")
    zones = load_config(file).noise.layers.zone_schedule
    assert zones is not None and zones.middle_layers == (1,)
    back = load_config(file, overrides=["noise.layers.zone_schedule=null"])
    assert back.noise.layers.zone_schedule is None


def test_layer_keys_may_be_numbers_or_text(write: Write) -> None:
    config = load_config(write('noise: {layers: {layer_multipliers: {"14": 1.5, 15: 1}}}'))
    assert config.noise.layers.layer_multipliers == {14: 1.5, 15: 1.0}


def test_free_mappings_keep_their_keys() -> None:
    config = load_config(overrides=["deepspeed.overrides.zero_optimization.overlap_comm=true"])
    assert config.deepspeed.overrides == {"zero_optimization": {"overlap_comm": True}}


def test_the_run_is_named_after_the_file_or_the_preset(write: Write) -> None:
    assert load_run(write("")).name == "run"
    assert load_run("run.yaml", preset="demo").name == "run"
    assert load_run(preset="demo").name == "demo"
    assert load_run(overrides=parse_overrides(["train.lr=1"])).name == "default"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train:\n  learning_rate: 1\n", "run.yaml:2: train.learning_rate: unknown key; did you "
         "mean train.lr?"),
        ("train:\n  setps: 1\n", "run.yaml:2: train.setps: unknown key; did you mean train.steps?"),
        ("lr: 1\n", "run.yaml:1: lr: unknown key; did you mean train.lr?"),
        ("trian: {lr: 1}\n", "run.yaml:1: trian: unknown key; did you mean train?"),
        ("lora_rank: 8\n", "run.yaml:1: lora_rank: unknown key; did you mean lora.r?"),
        ("train:\n  steps: many\n", 'run.yaml:2: train.steps: expected whole number > 0 or null, '
         'got the text "many"'),
        ("train:\n  lr: '1e-5'\n", 'run.yaml:2: train.lr: expected number > 0, got the text '
         '"1e-5"; write it without quotes'),
        ("train: {steps: 1.5}", "run.yaml:1: train.steps: expected whole number > 0 or null, "
         "got 1.5"),
        ("train: {steps: 0}", "run.yaml:1: train.steps: expected whole number > 0 or null, got 0"),
        ("train: {steps: true}", "run.yaml:1: train.steps: expected whole number > 0 or null, "
         "got true"),
        ("dapo: {tis: 1}", "run.yaml:1: dapo.tis: expected true or false, got 1"),
        ("dapo: {tis: yes}", 'run.yaml:1: dapo.tis: expected true or false, got the text "yes"; '
         "write true"),
        ("dapo: {clip_high: .inf}", "run.yaml:1: dapo.clip_high: expected number > 0, got "
         "Infinity"),
        ("run: {device: gpu}", 'run.yaml:1: run.device: expected one of auto, npu, cuda, cpu, got '
         'the text "gpu"; did you mean npu?'),
        ("quant: {exclude: lm_head}", 'run.yaml:1: quant.exclude: expected list of text, got the '
         'text "lm_head"; write [lm_head]'),
        ("lora: {targets: q_proj}", "run.yaml:1: lora.targets: expected one of all-linear or list "
         'of text, got the text "q_proj"; write [q_proj]'),
        ("task: {levels: [1, 0]}", "run.yaml:1: task.levels.1: expected whole number > 0, got 0"),
        ("noise: {layers: {layer_multipliers: {a: 1}}}", "run.yaml:1: "
         "noise.layers.layer_multipliers.a: a key of noise.layers.layer_multipliers is a whole "
         "number"),
        ("noise:\n  layers:\n    zone_schedule: {edge_layers: [0]}", "run.yaml:3: "
         "noise.layers.zone_schedule.middle_layers: is missing (list of (whole number >= 0)); it "
         "has no default"),
        ("train: 3", "run.yaml:1: train: expected section, got 3"),
        ("- train\n", "run.yaml: expected sections such as 'train:', got a list"),
        ("quant: {weight_profile: ascnd950}", "run.yaml:1: quant.weight_profile: unknown numerics "
         "profile 'ascnd950'; did you mean 'ascend950'"),
        ("quant: {exclude: [layers.1*]}", "run.yaml:1: quant.exclude.0: module pattern "
         "'layers.1*': '*' stands for one whole segment"),
        ("quant: {injection_point: weight, lora_input: quantised}", "run.yaml:1: quant: "
         "lora_input: quantised needs a quantised input"),
        ("dapo: {prompts_per_rollout: 30, updates_per_rollout: 4}", "dapo.prompts_per_rollout (30) "
         "must be a multiple of dapo.updates_per_rollout (4)"),
    ],
)  # fmt: skip
def test_a_problem_says_where_what_and_what_instead(write: Write, text: str, problem: str) -> None:
    (found,) = problems(write(text))
    assert found.startswith(problem)


def test_multipliers_with_commas_at_the_ends_of_lines_are_explained(write: Write) -> None:
    text = "noise:\n  layers:\n    layer_multipliers:\n      14: 1.5,\n      15: 1.5\n"
    (found,) = problems(write(text))
    assert found.startswith("run.yaml:4: noise.layers.layer_multipliers.14: expected number >= 0")
    assert "layer_multipliers: {14: 1.5}" in found


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.lr", "--set train.lr: expected key=value, e.g. --set train.lr=1e-5"),
        ("train..lr=1", "--set train..lr=1: the key 'train..lr' has an empty part"),
        ("=1", "--set =1: the key '' has an empty part"),
        ("train.lr=[1", "--set train.lr=[1: not valid YAML"),
        ("train.lr=fast", "--set train.lr=fast: train.lr: expected number > 0, got the text"),
        ("train.lrr=1", "--set train.lrr=1: train.lrr: unknown key; did you mean train.lr?"),
        ("train=3", "--set train=3: train is a section; set train.method, train.steps"),
        ("train.lr.x=3", "--set train.lr.x=3: train.lr: expected number > 0"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_typed(override: str, problem: str) -> None:
    (found,) = problems(overrides=[override])
    assert found.startswith(problem)


def test_a_key_below_a_value_of_the_file_is_an_error(write: Write) -> None:
    found = problems(write("train: {lr: 1}"), overrides=["train.lr.x=3"])
    assert found == ("--set train.lr.x=3: train.lr is 1, so it has no key 'x'",)


def test_all_problems_are_reported_at_once_in_one_error(write: Write) -> None:
    file = write("train: {learning_rate: 1, steps: x}\nquant: {use_ste: 3}\nfoo: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides=["rollout.top_p=2", "lora.rank=3"])
    text = str(caught.value)
    assert text.startswith("the configuration has 6 problems:\n  ")
    for word in ("learning_rate", "train.steps", "use_ste", "foo", "top_p", "lora.r?"):
        assert word in text
    assert "pydantic" not in text and "Traceback" not in text


def test_problems_of_the_command_line_are_reported_together() -> None:
    assert len(problems(overrides=["a", "b=", "=c"])) == 2


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("missing.yaml", "missing.yaml: cannot be read: No such file or directory"),
        (".", ".: cannot be read: Is a directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_problem(write: Write, source: str, problem: str) -> None:
    assert problems(source) == (problem,)


def test_a_file_that_is_no_text_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert problems(str(file)) == (f"{file}: is not text in UTF-8",)


def test_an_unknown_preset_is_a_problem_with_the_nearest_name() -> None:
    (found,) = problems(preset="log-e13")
    assert found.startswith("there is no preset 'log-e13'; did you mean log-e13")
    assert "demo" in found
