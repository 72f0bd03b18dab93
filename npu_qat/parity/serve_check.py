"""Is a running server the model that was exported?

The reference is a recording of the training side; or, without one, the exported folder computed
here as an engine should (``serving``), which ``parity run`` compares with the training modules bit
for bit. The server reads the same tokens, and its log-probabilities and greedy tokens must lie
within the noise that was measured on the reference (``observe``).

That alone would pass a server with a small fault, one that changes less than noise does: another
rule for ties, say. So the server is also compared with what it might compute *instead*: other rules
for activations, activations in 16 bits, no adapter. Whatever it computes, noise included, is nearer
to that than to anything else. A server that is nearer to one of the alternatives, by more than
``SIGMAS`` standard errors over the texts, fails, and the report names the alternative. The spread
over texts is all that says how far such a nearness can be trusted, so one text is refused: there is
no verdict without it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from npu_qat.deploy.reader import open_export
from npu_qat.layers.audit import Check
from npu_qat.layers.base_model import prompt_ids, stop_ids
from npu_qat.parity.endpoint import TOP, Endpoint
from npu_qat.parity.observe import (
    TITLES,
    NoiseFloor,
    Observed,
    compare,
    generate,
    measure_noise,
    observe,
)
from npu_qat.parity.recording import Recording, Settings, adapter_fingerprint
from npu_qat.parity.serving import FULL, ServedModel, computing

SIGMAS = 2.0
# Fewer have no spread.
MIN_PROMPTS = 2
ALTERNATIVES = ("ascend950", "ascend950-rint", "ascend950-floor", "compressed-tensors", FULL)


@dataclass
class ServeReport:
    """What was found.

    Attributes:
        url, model: of the server.
        checks: each comparison.
        data: the numbers behind them.
    """

    url: str
    model: str
    checks: list[Check]
    data: dict[str, Any]

    @property
    def passed(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": "pass" if self.passed else "fail",
            "url": self.url,
            "model": self.model,
            "checks": [asdict(check) for check in self.checks],
            **self.data,
        }


def served_name(endpoint: Endpoint, name: str | None) -> str:
    """The model to ask for: ``name``, or the only base that is served.

    Raises:
        ValueError: the server does not have it.
    """
    names = endpoint.models()
    if not names:
        raise ValueError(f"{endpoint.url} serves no model")
    if name is None:
        return names[0]
    if name not in names:
        raise ValueError(f"{endpoint.url} does not serve {name!r}, but {', '.join(names)}")
    return name


def require_spread(prompts: int) -> None:
    """Raise ``ValueError`` if so many prompts have no spread to judge by."""
    if prompts < MIN_PROMPTS:
        raise ValueError(
            f"{prompts} prompt: no interval. Whether the server is nearer to something else than "
            "to the export is judged by the spread over prompts, which one prompt does not have. "
            f"Take --prompts {MIN_PROMPTS} or more; with --recording, one that 'parity record' "
            "made with as many"
        )


@dataclass(frozen=True)
class Reference:
    """What the server is compared with.

    Attributes:
        prompts, greedy: token ids of each prompt and of its greedy completion.
        noise: the noise floor.
        observed: what the training side said of ``rows`` (recording), or None.
    """

    prompts: list[list[int]]
    greedy: list[list[int]]
    noise: NoiseFloor
    observed: list[Observed] | None = None

    @property
    def rows(self) -> list[list[int]]:
        """Prompt and completion together."""
        return [p + c for p, c in zip(self.prompts, self.greedy, strict=True)]


def recorded_reference(recording: Recording, served: ServedModel) -> Reference:
    """The training side, as it was recorded.

    Raises:
        ValueError: the recording is of another base or adapter than ``served``.
    """
    content = recording.content
    found = open_export(served.folder).fingerprint()
    if found != content["base_fingerprint"]:
        raise ValueError(
            f"the recording is of another base ({content['base_fingerprint'][:16]}...) than "
            f"{served.folder} ({found[:16]}...)"
        )
    adapter = None if served.adapter is None else adapter_fingerprint(served.adapter)
    if adapter != content["adapter"]:
        raise ValueError(
            "the recording was made "
            + ("without an adapter" if content["adapter"] is None else "with an adapter")
            + "; give --adapter NAME exactly if it was made with the adapter of the export"
        )
    return Reference(
        [p["tokens"] for p in content["prompts"]],
        [p["completion"] for p in content["prompts"]],
        recording.noise,
        recording.observed,
    )


def computed_reference(
    served: ServedModel,
    tokenizer: Any,
    messages: Sequence[list[dict[str, str]]],
    settings: Settings,
) -> Reference:
    """The export itself, computed here."""
    prompts = [prompt_ids(tokenizer, m) for m in messages]
    eos = stop_ids(served.model, tokenizer)
    pad = _pad(served, tokenizer)

    def decode(model: Any, size: int) -> list[list[int]]:
        return generate(
            model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            eos_ids=eos,
            pad_id=pad,
            batch_size=size,
        )

    greedy = decode(served.model, settings.batch_size)
    rows = [p + c for p, c in zip(prompts, greedy, strict=True)]
    seen = observe(served.model, rows, batch_size=settings.batch_size, pad_id=pad)
    # As many tokens a position as the server gives, so that both divergences mean the same.
    seen = [replace(o, top_ids=o.top_ids[:, :TOP], top_logp=o.top_logp[:, :TOP]) for o in seen]
    noise = measure_noise(
        served.model,
        rows,
        seen,
        greedy,
        seeds=settings.seeds,
        batch_size=settings.batch_size,
        pad_id=pad,
        decode=decode,
    )
    return Reference(prompts, greedy, noise)


def serve_check(
    endpoint: Endpoint,
    name: str,
    served: ServedModel,
    tokenizer: Any,
    messages: Sequence[list[dict[str, str]]],
    settings: Settings,
    *,
    recording: Recording | None = None,
) -> ServeReport:
    """Compare a server with the export that it should serve.

    Args:
        endpoint: the server.
        name: of the model or adapter at the server.
        served: the export, with the adapter if the server should apply one.
        tokenizer: of the export.
        messages: chat prompts, 2 or more; those of ``recording``, if it is given.
        settings: lengths, seeds and batch size.
        recording: of the training side.

    Raises:
        ValueError: the server does not answer, or not what is needed, or the recording is of
            something else, or there is one prompt only.
    """
    require_spread(len(messages))
    pad = _pad(served, tokenizer)

    def look(tops: Sequence[torch.Tensor]) -> list[Observed]:
        size = settings.batch_size
        return observe(served.model, reference.rows, batch_size=size, pad_id=pad, tops=tops)

    if recording is None:
        reference = computed_reference(served, tokenizer, messages, settings)
    else:
        reference = recorded_reference(recording, served)
    length = max(map(len, reference.greedy))
    checks = [_same_prompts(endpoint, name, messages, reference.prompts)]
    answers = [endpoint.score(name, row) for row in reference.rows]
    completions = [endpoint.generate(name, prompt, length) for prompt in reference.prompts]
    if reference.observed is None:
        expected = look([answer.top_ids for answer in answers])
    else:
        expected = [aligned(a, b) for a, b in zip(reference.observed, answers, strict=True)]
    noise = reference.noise
    found = compare(expected, answers, (reference.greedy, completions))
    limits, floor = noise.limits(), asdict(noise.floor)
    checks += [
        Check(
            TITLES[key],
            f"at most {limits[key]:.3g} (noise floor {floor[key]:.3g})",
            f"{value:.3g}",
            value <= limits[key],
        )
        for key, value in asdict(found).items()
    ]
    nearest, distances = _nearest(served, look, expected, answers)
    checks.append(nearest)
    data = {
        "positions": noise.positions,
        "measured": asdict(found),
        "limits": limits,
        "noise": {key: asdict(value) for key, value in noise.variants.items()},
        "instead": distances,
    }
    return ServeReport(endpoint.url, name, checks, data)


def aligned(recorded: Observed, answer: Observed) -> Observed:
    """``recorded`` at the tokens that ``answer`` holds; -inf where they were not recorded."""
    same = recorded.top_ids[:, None, :] == answer.top_ids[:, :, None]
    values = recorded.top_logp[:, None, :].expand(same.shape).masked_fill(~same, -torch.inf)
    return replace(recorded, top_ids=answer.top_ids, top_logp=values.amax(-1))


def _pad(served: ServedModel, tokenizer: Any) -> int:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return stop_ids(served.model, tokenizer)[0]


def _same_prompts(
    endpoint: Endpoint,
    name: str,
    messages: Sequence[list[dict[str, str]]],
    prompts: Sequence[list[int]],
) -> Check:
    """The server's chat template and tokenizer make our tokens."""
    title = "the server's chat template makes the same prompt tokens"
    wrong = []
    for i, (chat, expected) in enumerate(zip(messages, prompts, strict=True)):
        found = endpoint.tokenize(name, chat)
        if found is None:
            return Check(title, "equal", "not asked: the server has no /tokenize", True)
        if found != expected:
            wrong.append(i)
    detail = f", first prompt {wrong[0]}" if wrong else ""
    measured = f"{len(prompts) - len(wrong)} equal{detail}"
    return Check(title, f"{len(prompts)} prompts", measured, not wrong)


def _nearest(
    served: ServedModel, look: Any, expected: Sequence[Observed], answers: Sequence[Observed]
) -> tuple[Check, dict[str, dict[str, float]]]:
    """Whether the server is nearer to something else than to what it should compute."""
    own = [_gap(a, b) for a, b in zip(expected, answers, strict=True)]
    instead: dict[str, tuple[str | None, bool]] = {
        f"activations {profile}": (profile, True)
        for profile in ALTERNATIVES
        if profile != served.activations
    }
    if served.adapter is not None:
        instead["no adapter"] = (None, False)
    distances: dict[str, dict[str, float]] = {}
    nearer = []
    for title, (activations, adapter) in instead.items():
        with computing(served, activations, adapter=adapter):
            other = look([answer.top_ids for answer in answers])
        gaps = [_gap(a, b) for a, b in zip(other, answers, strict=True)]
        advantage = [mine - theirs for mine, theirs in zip(own, gaps, strict=True)]
        mean = statistics.fmean(advantage)
        error = statistics.stdev(advantage) / len(advantage) ** 0.5
        distances[title] = {
            "logp_mean": statistics.fmean(gaps),
            "nearer_by": mean,
            "standard_error": error,
        }
        if mean > SIGMAS * error and mean > 0:
            nearer.append((statistics.fmean(gaps), title))
    measured = "the export"
    if nearer:
        distance, title = min(nearer)
        measured = (
            f"{title} (mean |d log p| {distance:.3g}, to the export {statistics.fmean(own):.3g})"
        )
    return Check("what the server computes is nearest to", "the export", measured, not nearer), (
        distances
    )


def _gap(a: Observed, b: Observed) -> float:
    return (a.logp - b.logp).abs().double().mean().item()
