"""A small OpenAI-compatible server with vLLM's additions, on our own modules, right or wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from npu_qat.layers.base_model import prompt_ids, stop_ids
from npu_qat.parity.observe import generate
from npu_qat.parity.serving import ServedModel, computing


class Backend:
    """What the server computes.

    Args:
        served: the exported model.
        tokenizer: for ``/tokenize``; None: the server has no such path.
        activations, adapter: see ``computing``.
        temperature: divides the logits, as a server would that was misconfigured.
        edit: changes an answer to ``/v1/completions`` before it is sent.
        names: of the models served.
    """

    def __init__(
        self,
        served: ServedModel,
        tokenizer: Any,
        *,
        activations: str | None = None,
        adapter: bool = True,
        temperature: float = 1.0,
        edit: Callable[[dict[str, Any]], object] = lambda choice: None,
        names: Sequence[str] = ("base", "mine"),
        template: bool = True,
    ) -> None:
        self.served, self.tokenizer = served, tokenizer
        self.activations, self.adapter, self.temperature = activations, adapter, temperature
        self.edit, self.names, self.template = edit, names, template
        self.lock = threading.Lock()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = body["prompt"]
        with self.lock, computing(self.served, self.activations, adapter=self.adapter):
            choice: dict[str, Any] = {"index": 0, "text": ""}
            if body.get("prompt_logprobs") is not None:
                choice["prompt_logprobs"] = self._score(tokens, body["prompt_logprobs"])
            (out,) = generate(
                self.served.model,
                [tokens],
                max_new_tokens=body["max_tokens"],
                eos_ids=stop_ids(self.served.model, self.tokenizer),
                pad_id=0,
                batch_size=1,
            )
        if body.get("return_token_ids"):
            choice["token_ids"] = out
        if body.get("return_tokens_as_token_ids"):
            choice["logprobs"] = {"tokens": [f"token_id:{t}" for t in out]}
        self.edit(choice)
        return {"object": "text_completion", "choices": [choice]}

    @torch.no_grad()
    def _score(self, tokens: list[int], top: int) -> list[dict[str, Any] | None]:
        logits = self.served.model(torch.tensor([tokens])).logits[0, :-1].float()
        logp = torch.log_softmax(logits / self.temperature, -1)
        rows: list[dict[str, Any] | None] = [None]
        for i, token in enumerate(tokens[1:]):
            ids = {*logp[i].topk(top).indices.tolist(), token}
            rows.append({str(k): {"logprob": logp[i, k].item(), "rank": 0} for k in ids})
        return rows

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = prompt_ids(self.tokenizer, body["messages"])
        return {"tokens": tokens if self.template else tokens[1:]}


@contextmanager
def serving(backend: Backend) -> Iterator[str]:
    """The address of a server that runs inside the block."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def _send(self, content: Any, code: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            known = self.path == "/v1/models"
            data = [{"id": name} for name in backend.names]
            self._send({"data": data} if known else {"error": "not found"}, 200 if known else 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize" and backend.tokenizer is not None:
                self._send(backend.tokenize(body))
            elif self.path == "/v1/completions" and body["model"] in backend.names:
                self._send(backend.complete(body))
            else:
                self._send({"error": f"no {self.path} for {body.get('model')}"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
