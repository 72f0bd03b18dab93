"""What serve-check sends and reads, against the classes with which vLLM 0.23 defines its API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from npu_qat.parity.endpoint import TOP, Endpoint

pytestmark = pytest.mark.contract
vllm = pytest.importorskip("vllm", reason="needs vllm (make contract-vllm)")


class Recorded(Endpoint):
    """Keeps what is sent, and answers with what vLLM's own class writes."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__("http://localhost:8000")
        self.answer, self.sent = answer, {}

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self.sent[path] = dict(body or {})
        return self.answer


def choice(**content: Any) -> dict[str, Any]:
    from vllm.entrypoints.openai.completion.protocol import CompletionResponseChoice

    written = CompletionResponseChoice(index=0, text="", **content).model_dump_json()
    return {"choices": [json.loads(written)]}


def test_requests_hold_only_fields_that_vllm_knows() -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

    client = Recorded(choice(token_ids=[3]))
    client.generate("m", [1, 2], 4)
    request = CompletionRequest.model_validate(client.sent["/v1/completions"])
    assert not request.model_extra and request.return_token_ids and request.max_tokens == 4
    client.answer = {"tokens": [1]}
    assert client.tokenize("m", [{"role": "user", "content": "x"}]) == [1]
    chat = TokenizeChatRequest.model_validate(client.sent["/tokenize"])
    assert not chat.model_extra and chat.add_generation_prompt


def test_log_probabilities_are_read_as_vllm_writes_them() -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.logprobs import Logprob

    rows = [None, {2: Logprob(-1.0, 2, "a"), 5: Logprob(-0.5, 1, "b")}]
    client = Recorded(choice(prompt_logprobs=rows))
    seen = client.score("m", [1, 2])
    assert seen.logp.tolist() == [-1.0] and seen.best.tolist() == [5]
    assert seen.top_ids.tolist() == [[5, 2]]
    request = CompletionRequest.model_validate(client.sent["/v1/completions"])
    assert not request.model_extra and request.prompt_logprobs == TOP
