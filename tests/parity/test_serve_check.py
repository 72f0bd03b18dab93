"""A right server passes; a server that computes something else is caught, and told what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from npu_qat.cli import main
from npu_qat.parity.endpoint import Endpoint
from npu_qat.parity.recording import Recording, Settings, record
from npu_qat.parity.serve_check import ServeReport, serve_check, served_name
from npu_qat.parity.serving import ServedModel, open_served
from tests.parity.server import Backend, serving
from tests.parity.world import World, make

NEAREST = "what the server computes is nearest to"
TEMPLATE = "the server's chat template makes the same prompt tokens"
# Rows one at a time, as the server computes them: then a right one agrees to the last digit.
SETTINGS = Settings(prompts=6, max_new_tokens=6, seeds=1, batch_size=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make(tmp_path_factory.mktemp("world"), adapter=True, settings=SETTINGS)


@pytest.fixture(scope="module")
def served(world: World) -> ServedModel:
    return open_served(world.export, adapter=world.export / "adapter")


def ask(
    world: World, served: ServedModel, recording: Recording | None = None, **server: Any
) -> ServeReport:
    """The report on a server that is as ``server`` says."""
    # The server is a process of its own in life: it has its own model.
    theirs = open_served(world.export, adapter=world.export / "adapter")
    tokenizer = world.side.tokenizer
    with serving(Backend(theirs, tokenizer, **server)) as url:
        return serve_check(
            Endpoint(url),
            "mine",
            served,
            tokenizer,
            world.recording.messages,
            SETTINGS,
            recording=recording,
        )


def failed(report: ServeReport) -> dict[str, str]:
    return {check.name: check.measured for check in report.checks if not check.ok}


def test_the_right_server_passes(world: World, served: ServedModel) -> None:
    report = ask(world, served)
    assert failed(report) == {} and report.passed
    assert report.data["measured"]["greedy"] == 0.0
    # In JSON the log-probabilities of the CPU come back to the last digit.
    assert report.data["measured"]["logp_mean"] < 1e-6
    assert set(report.data["instead"]) == {
        "activations ascend950-rint",
        "activations ascend950-floor",
        "activations compressed-tensors",
        "activations 16 bits",
        "no adapter",
    }


def test_the_training_side_as_recorded_judges_alike(world: World, served: ServedModel) -> None:
    report = ask(world, served, world.recording)
    assert failed(report) == {}
    # Adapters are rounded in another order in training, so this is not zero, but noise.
    assert report.data["measured"]["logp_mean"] > 0
    assert NEAREST in failed(ask(world, served, world.recording, adapter=False))


@pytest.mark.parametrize(
    ("server", "told"),
    [
        ({"activations": "ascend950-rint"}, "activations ascend950-rint"),
        ({"activations": "ascend950-floor"}, "activations ascend950-floor"),
        ({"activations": "compressed-tensors"}, "activations compressed-tensors"),
        ({"activations": "16 bits"}, "activations 16 bits"),
        ({"adapter": False}, "no adapter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_server_that_computes_something_else_is_told_what(
    world: World, served: ServedModel, server: dict[str, Any], told: str
) -> None:
    report = ask(world, served, world.recording, **server)
    assert not report.passed and failed(report)[NEAREST].startswith(told)


def test_large_faults_leave_the_noise_too(world: World, served: ServedModel) -> None:
    for server in ({"activations": "ascend950-floor"}, {"adapter": False}, {"temperature": 0.5}):
        assert "mean |d log p| a token" in failed(ask(world, served, world.recording, **server)), (
            server
        )


def test_another_chat_template_is_caught_and_a_server_without_the_path_is_not_blamed(
    world: World, served: ServedModel
) -> None:
    report = ask(world, served, world.recording, template=False)
    assert failed(report) == {TEMPLATE: "0 equal, first prompt 0"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("prompt_logprobs", None), "an addition of vLLM"),
        (lambda c: c.get("prompt_logprobs", [0]).pop(), "an addition of vLLM"),
        (lambda c: [c.pop(k, None) for k in ("token_ids", "logprobs")], "returned no token ids"),
        (
            lambda c: [r.clear() for r in c.get("prompt_logprobs", []) if r],
            "lack the token of the prompt",
        ),
        (
            lambda c: [
                e.update(logprob=float("nan"))
                for r in c.get("prompt_logprobs", [])
                for e in (r or {}).values()
            ],
            "hold NaN",
        ),
    ],
    ids=["no scores", "too few", "no tokens", "other tokens", "nan"],
)
def test_a_server_without_what_is_needed_says_so(
    world: World, served: ServedModel, edit: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ask(world, served, world.recording, edit=edit)


def test_older_servers_name_their_tokens_in_the_logprobs(world: World, served: ServedModel) -> None:
    report = ask(world, served, world.recording, edit=lambda choice: choice.pop("token_ids", None))
    assert failed(report) == {}


def test_a_recording_of_something_else_is_refused(
    world: World, served: ServedModel, tmp_path: Path
) -> None:
    other = make(tmp_path, family="llama", adapter=True)
    with pytest.raises(ValueError, match="of another base"):
        ask(world, served, other.recording)
    base = open_served(world.export)
    with pytest.raises(ValueError, match="was made with an adapter"):
        ask(world, base, world.recording)


def test_one_prompt_has_no_spread_to_judge_by(world: World, served: ServedModel) -> None:
    # Nothing answers at this address: it is refused before the server is asked.
    nobody, tokenizer = Endpoint("http://127.0.0.1:1"), world.side.tokenizer
    one = world.recording.messages[:1]
    with pytest.raises(ValueError, match="1 prompt: no interval"):
        serve_check(nobody, "mine", served, tokenizer, one, SETTINGS)


def test_names_and_addresses_are_checked(world: World, served: ServedModel) -> None:
    with serving(Backend(served, world.side.tokenizer)) as url:
        assert served_name(Endpoint(url + "/v1"), None) == "base"
        with pytest.raises(ValueError, match="does not serve 'other', but base, mine"):
            served_name(Endpoint(url), "other")
        with pytest.raises(ValueError, match=r"refused the request .404.*no /v1/completions"):
            Endpoint(url).score("other", [1, 2])
    with pytest.raises(ValueError, match="does not answer"):
        Endpoint(url).models()
    with pytest.raises(ValueError, match="give the server's address"):
        Endpoint("localhost:8000")


# --- from the command line ----------------------------------------------------------------------


def command(world: World, url: str, *more: str) -> list[str]:
    sizes = ["--prompts", "4", "--max-new-tokens", "4", "--seeds", "1", "--batch-size", "1"]
    return ["serve-check", "--url", url, "--checkpoint", str(world.export), *sizes, *more]


def test_the_command_judges_by_its_exit_code(
    world: World, served: ServedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = world.side.tokenizer
    world.recording.save(tmp_path / "recording")
    with serving(Backend(served, tokenizer)) as url:
        assert main(command(world, url, "--adapter", "mine")) == 0
        out = capsys.readouterr().out
        assert f"{url} serves the export (as 'mine')" in out and "FAIL" not in out
        recorded = ["--adapter", "mine", "--recording", str(tmp_path / "recording")]
        assert main(command(world, url, *recorded)) == 0
        capsys.readouterr()
        # The base alone is asked for, but the server always applies the adapter.
        assert main(command(world, url, "--json")) == 1
        assert json.loads(capsys.readouterr().out)["verdict"] == "fail"
        assert main(command(world, url, "--adapter", "yours")) == 2
        assert "does not serve 'yours'" in capsys.readouterr().err


def test_the_command_refuses_one_prompt_before_the_server_is_asked(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(world, "http://127.0.0.1:1"), "--prompts", "1"]) == 2
    assert "1 prompt: no interval" in capsys.readouterr().err
    one = replace(SETTINGS, prompts=1, max_new_tokens=2)
    record(world.side, one).save(tmp_path / "one")
    recorded = ["--recording", str(tmp_path / "one"), "--prompts", "4", "--json"]
    assert main([*command(world, "http://127.0.0.1:1"), *recorded]) == 2
    assert "1 prompt: no interval" in capsys.readouterr().err


def test_an_adapter_that_the_export_lacks_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--url", "http://x", "--checkpoint", str(tmp_path), "--adapter", "mine"]
    assert main(["serve-check", *words]) == 2
    assert "holds no adapter to compare with" in capsys.readouterr().err
