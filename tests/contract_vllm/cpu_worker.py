"""A worker for vllm's engine that needs no device: the engine around it is the real one.

vllm takes the class of its worker from the configuration (``worker_cls``). Where vllm-ascend's
own worker would drive a device, this one keeps no cache and computes every sequence anew from its
first token, one after another, with the model of ``stack.py``. Real are thus the ``LLM`` class, the
engine core, its scheduler, requests and outputs, the LoRA manager behind ``LoRARequest``,
``collective_rpc`` and the worker extension, the model, its loader and its layers, and vllm's
sampler with its seeds and log-probabilities. Not real: the model runner, its batches and the
paged cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from tests.contract_vllm.stack import Served, load


@dataclass
class Sequence:
    """A running request."""

    tokens: list[int]
    params: Any
    lora: Any
    generator: torch.Generator | None
    prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)


class Runner:
    """What the engine and worker extensions expect of a model runner: the model."""

    def __init__(self, served: Served) -> None:
        self.served = served

    @property
    def model(self) -> Any:
        return self.served.model


class CpuWorker(WorkerBase):
    """The worker's interface, method by method."""

    def init_device(self) -> None:
        self.device = torch.device("cpu")
        self.sequences: dict[str, Sequence] = {}

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        assert not load_dummy_weights
        self.model_runner = Runner(load(self.vllm_config))

    def get_model(self) -> Any:
        return self.model_runner.model

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        text = self.model_config
        heads = text.get_num_kv_heads(self.parallel_config)
        return {
            name: FullAttentionSpec(
                block_size=self.cache_config.block_size,
                num_kv_heads=heads,
                head_size=text.get_head_size(),
                dtype=torch.bfloat16,
            )
            for name in self.compilation_config.static_forward_context
        }

    def determine_available_memory(self) -> int:
        return 64 << 20  # what the scheduler counts with; nothing is kept

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        return None

    def compile_or_warm_up_model(self) -> CompilationTimes:
        return CompilationTimes(0.0, 0.0)

    def add_lora(self, lora_request: Any) -> bool:
        return bool(self.model_runner.served.adapters.add_adapter(lora_request))

    def remove_lora(self, lora_id: int) -> bool:
        return bool(self.model_runner.served.adapters.remove_adapter(lora_id))

    def list_loras(self) -> set[int]:
        return set(self.model_runner.served.adapters.list_adapters())

    def pin_lora(self, lora_id: int) -> bool:
        return bool(self.model_runner.served.adapters.pin_adapter(lora_id))

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        raise AssertionError("execute_model samples")

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput:
        for done in scheduler_output.finished_req_ids:
            self.sequences.pop(done, None)
        for new in scheduler_output.scheduled_new_reqs:
            assert new.num_computed_tokens == 0, "a prefix cache that nobody keeps was used"
            generator = None
            if new.sampling_params.seed is not None:
                generator = torch.Generator().manual_seed(new.sampling_params.seed)
            self.sequences[new.req_id] = Sequence(
                list(new.prompt_token_ids), new.sampling_params, new.lora_request, generator
            )
        ids = list(scheduler_output.num_scheduled_tokens)
        drawn = [self.next_token(self.sequences[name]) for name in ids]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: i for i, name in enumerate(ids)},
            sampled_token_ids=[[int(out.sampled_token_ids[0, 0])] for out in drawn],
            logprobs=LogprobsLists(*_stacked([out.logprobs_tensors for out in drawn])),
        )

    def next_token(self, sequence: Sequence) -> Any:
        """vllm's own sampler on the last logits of the whole sequence."""
        from vllm.v1.sample.sampler import Sampler

        served = self.model_runner.served
        with set_current_vllm_config(self.vllm_config):
            served.use_lora(sequence.lora, len(sequence.tokens))
            logits = served.logits(sequence.tokens)[-1:]
            sampler = Sampler(logprobs_mode=self.model_config.logprobs_mode)
            out = sampler(logits, _metadata(sequence, logits.shape[-1]))
        sequence.tokens.append(int(out.sampled_token_ids[0, 0]))
        return out


def _stacked(tensors: list[Any]) -> tuple[Any, Any, Any]:
    return (
        torch.cat([t.logprob_token_ids for t in tensors]).numpy(),
        torch.cat([t.logprobs for t in tensors]).numpy(),
        torch.cat([t.selected_token_ranks for t in tensors]).numpy(),
    )


def _metadata(sequence: Sequence, vocabulary: int) -> Any:
    """The sampler's view of one request."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    params = sequence.params
    greedy = params.temperature == 0
    return SamplingMetadata(
        temperature=None if greedy else torch.tensor([params.temperature]),
        all_greedy=greedy,
        all_random=not greedy,
        top_p=None if params.top_p == 1 else torch.tensor([params.top_p]),
        top_k=None,
        generators={} if sequence.generator is None else {0: sequence.generator},
        max_num_logprobs=params.logprobs,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(1),
        presence_penalties=torch.zeros(1),
        repetition_penalties=torch.ones(1),
        output_token_ids=[sequence.tokens[sequence.prompt :]],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
