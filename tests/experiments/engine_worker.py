"""A whole run whose rollouts come from an engine: vllm's interface on the serving path of parity.

Usage: torchrun ... engine_worker.py CONFIG.json RUN_DIR; writes what each process's engine saw to
RUN_DIR/../engine-RANK.json. Vllm itself is in ``tests/contract_vllm``, in one process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from npu_qat.config import RunConfig
from npu_qat.experiments.run import execute
from npu_qat.parity.serving import open_served
from npu_qat.training.rollout_vllm import LAUNCHER


class LLM:
    """The calls that training makes of vllm's class, one row at a time."""

    made: list[LLM]

    def __init__(self, model: str, **arguments: Any) -> None:
        self.llm_engine = self
        self.base = Path(model)
        self.saw: dict[str, Any] = {
            "launcher": [name for name in LAUNCHER if name in os.environ],
            "norms": [],
            "adapters": 0,
            "rows": 0,
        }
        self.served = open_served(self.base).model
        self.norms: dict[str, torch.Tensor] = {}
        LLM.made.append(self)

    def collective_rpc(self, method: str, args: tuple[str]) -> list[int]:
        assert method == "npu_qat_load_norms"
        tensors = load_file(args[0])
        self.norms |= tensors
        self.saw["norms"].append(len(tensors))
        self._load_norms()
        return [len(tensors)]

    def _load_norms(self) -> None:
        held = dict(self.served.named_parameters())
        for name, tensor in self.norms.items():
            held[name].copy_(tensor)

    def add_lora(self, request: Any) -> bool:
        self.served = open_served(self.base, adapter=Path(request.lora_path)).model
        self._load_norms()
        self.saw["adapters"] += 1
        return True

    def remove_lora(self, number: int) -> None:
        """The next one replaces it."""

    def reset_prefix_cache(self) -> None:
        """There is none."""

    def generate(self, requests: Any, params: Any, lora_request: Any, use_tqdm: bool) -> list[Any]:
        return [
            SimpleNamespace(outputs=[self._complete(request["prompt_token_ids"], wanted)])
            for request, wanted in zip(requests, params, strict=True)
        ]

    @torch.no_grad()
    def _complete(self, prompt: list[int], wanted: Any) -> Any:
        self.saw["rows"] += 1
        generator = torch.Generator().manual_seed(wanted.seed)
        tokens: list[int] = []
        steps: list[dict[int, Any]] = []
        while len(tokens) < wanted.max_tokens:
            logits = self.served(torch.tensor([prompt + tokens])).logits[0, -1].float()
            if wanted.temperature == 0:
                logp = logits.log_softmax(-1)
                token = int(logp.argmax())
            else:
                logp = (logits / wanted.temperature).log_softmax(-1)
                token = int(torch.multinomial(logp.exp(), 1, generator=generator))
            tokens.append(token)
            steps.append({token: SimpleNamespace(logprob=float(logp[token]))})
            if token in wanted.stop_token_ids:
                break
        ended = bool(tokens) and tokens[-1] in wanted.stop_token_ids
        reason = "stop" if ended else "length"
        return SimpleNamespace(token_ids=tokens, logprobs=steps, finish_reason=reason)


def install() -> None:
    """Put the modules of vllm that training imports in their place."""
    LLM.made = []
    vllm, lora, requests = (ModuleType(n) for n in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.LLM = LLM  # type: ignore[attr-defined]
    vllm.SamplingParams = lambda **keys: SimpleNamespace(**keys)  # type: ignore[attr-defined]
    requests.LoRARequest = lambda name, number, path: SimpleNamespace(  # type: ignore[attr-defined]
        lora_name=name, lora_int_id=number, lora_path=path
    )
    sys.modules.update({module.__name__: module for module in (vllm, lora, requests)})


def main() -> None:
    rank = os.environ.get("RANK", "0")
    run_dir = Path(sys.argv[2])
    install()
    config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
    execute(config, run_dir, Console(width=200, quiet=rank != "0"))
    (engine,) = LLM.made
    run_dir.parent.joinpath(f"engine-{rank}.json").write_text(json.dumps(engine.saw))


if __name__ == "__main__":
    main()
