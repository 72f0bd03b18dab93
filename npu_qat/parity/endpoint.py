"""What a server says, asked over HTTP: an OpenAI-compatible API with vLLM's additions.

Tokens go in and come out as ids, so that no tokenizer stands between the two sides. Used are

    GET  /v1/models
    POST /v1/completions   prompt as ids; ``prompt_logprobs`` (vLLM) for every prompt token;
                           ``return_token_ids`` or ``return_tokens_as_token_ids`` for completions
    POST /tokenize         (vLLM) the server's own rendering of chat messages, where it has it

Source: vLLM 0.23, ``entrypoints/openai/completion/protocol.py``, ``entrypoints/serve/tokenize``.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from npu_qat.parity.observe import Observed

# The most alternatives that vLLM returns a token unless it was started with --max-logprobs.
TOP = 20


class Endpoint:
    """A running server.

    Args:
        url: ``http://host:port``, with or without ``/v1``.
        api_key: sent as a bearer token, if given.
        timeout: seconds for one request.

    Raises:
        ValueError: ``url`` is no HTTP address.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 120.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"--url {url}: give the server's address, as http://localhost:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.api_key, self.timeout = api_key, timeout

    def models(self) -> list[str]:
        """Names of the models and adapters that are served."""
        answer = self._ask("/v1/models")
        return [str(model["id"]) for model in answer.get("data", [])]

    def tokenize(self, model: str, messages: list[dict[str, str]]) -> list[int] | None:
        """The server's tokens of a chat prompt; None where it has no ``/tokenize``."""
        body = {"model": model, "messages": messages, "add_generation_prompt": True}
        try:
            answer = self._ask("/tokenize", body)
        except urllib.error.HTTPError as error:
            if error.code in (404, 405):
                return None
            raise ValueError(self._explain("/tokenize", error)) from error
        return [int(token) for token in answer["tokens"]]

    def generate(self, model: str, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        """The greedy completion of ``tokens``, the end-of-sequence token included."""
        choice = self._complete(
            model,
            tokens,
            max_tokens=max_new_tokens,
            logprobs=1,
            return_token_ids=True,
            return_tokens_as_token_ids=True,
        )
        if choice.get("token_ids") is not None:
            return [int(token) for token in choice["token_ids"]]
        named = (choice.get("logprobs") or {}).get("tokens") or []
        if not named or not all(str(t).startswith("token_id:") for t in named):
            raise ValueError(
                f"{self.url} returned no token ids; it must know return_token_ids or "
                "return_tokens_as_token_ids, as vLLM does"
            )
        return [int(str(token).partition(":")[2]) for token in named]

    def score(self, model: str, tokens: Sequence[int]) -> Observed:
        """Log-probabilities of every token of ``tokens`` after the first.

        Raises:
            ValueError: the server returns none, too few, or NaN.
        """
        choice = self._complete(model, tokens, max_tokens=1, prompt_logprobs=TOP)
        given = choice.get("prompt_logprobs")
        if not isinstance(given, list) or len(given) != len(tokens):
            found = "none" if not isinstance(given, list) else str(len(given))
            raise ValueError(
                f"{self.url} returned prompt_logprobs for {found} of {len(tokens)} tokens; "
                "they are an addition of vLLM, which serve-check needs"
            )
        return _observed(tokens, given[1:], self.url)

    def _complete(self, model: str, tokens: Sequence[int], **options: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": list(tokens), "temperature": 0.0, "n": 1, **options}
        try:
            answer = self._ask("/v1/completions", body)
        except urllib.error.HTTPError as error:
            raise ValueError(self._explain("/v1/completions", error)) from error
        choices = answer.get("choices") or []
        if len(choices) != 1 or not isinstance(choices[0], dict):
            raise ValueError(f"{self.url}/v1/completions returned {len(choices)} choices, not one")
        found: dict[str, Any] = choices[0]
        return found

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ValueError(f"{self.url}{path} does not answer: {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.url}{path} did not answer in JSON: {error}") from error
        if not isinstance(answer, dict):
            raise ValueError(f"{self.url}{path} answered with a {type(answer).__name__}")
        return answer

    def _explain(self, path: str, error: urllib.error.HTTPError) -> str:
        text = error.read().decode(errors="replace")[:400]
        return f"{self.url}{path} refused the request ({error.code}): {text}"


def _observed(
    tokens: Sequence[int], given: Sequence[Mapping[str, Any] | None], url: str
) -> Observed:
    """vLLM's ``{id: {"logprob": ..}}`` a position as tensors with the same K everywhere."""
    logp, best, ids, values = [], [], [], []
    for token, row in zip(tokens[1:], given, strict=True):
        found = {int(key): float(entry["logprob"]) for key, entry in (row or {}).items()}
        if token not in found:
            raise ValueError(f"{url}: prompt_logprobs lack the token of the prompt, {token}")
        if any(math.isnan(value) for value in found.values()):
            raise ValueError(f"{url}: the server's log-probabilities hold NaN")
        ranked = sorted(found, key=lambda key: -found[key])
        logp.append(found[token])
        best.append(ranked[0])
        ids.append(ranked)
        values.append([found[key] for key in ranked])
    kept = min(TOP, *map(len, ids))
    return Observed(
        logp=torch.tensor(logp),
        best=torch.tensor(best),
        top_ids=torch.tensor([row[:kept] for row in ids], dtype=torch.int32),
        top_logp=torch.tensor([row[:kept] for row in values]),
    )
