"""Rollouts through vllm or vllm-ascend: the engine that will serve the model samples for it.

The base is frozen, so the engine loads its export once and nothing of it is ever sent again;
reloading packed 4-bit linears corrupts them anyway (``tests/contract_vllm``). What changes goes in
each time the policy or its noise did:

* the **adapter**, as a folder in PEFT's format under a number of its own, so that the engine's
  caches cannot mix it up with an earlier one. It holds the 16-bit image that training computes
  with;
* the **norms**, 16-bit vectors that hold the noise of AQN while it is on and the clean weights
  afterwards. The worker's half (``NormReceiver``) loads them, compares what the model then holds
  bit by bit, and takes no other tensor.

The prefix cache is emptied after every change: its keys and values are another model's.

**Processes.** Each process of the run owns an engine on its own device and samples its own share
of the prompts, so no token crosses processes that did not before. vllm runs its engine in a child
process, apart from DeepSpeed's process group; the variables by which a launcher describes the
run's group are taken away while it starts, and it sees one device. Several devices an engine
(tensor parallelism) are not offered.

**Log-probabilities** are those of the distribution that was sampled from, temperature included
(``processed_logprobs``). The engine would include nucleus truncation as well, which the trainer
does not know of, so ``rollout.top_p`` must be 1.

**Random numbers** are the engine's, seeded by row: a run repeats itself as far as the engine's
arithmetic does not depend on which rows it batches.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from npu_qat.config import RolloutConfig
from npu_qat.training.engine import TrainingError
from npu_qat.training.rollout import Completion, SamplingParams

# What vllm accepts for --max-lora-rank.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Below this, vllm-ascend calls LoRA kernels that its build for the Ascend 950 does not have.
NPU_LORA_RANK = 128
VISIBLE_DEVICES = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
# How a launcher describes the run's process group; the engine would take it for its own.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Keys of rollout.engine_options that this program decides.
RESERVED = {
    "model",
    "tokenizer",
    "skip_tokenizer_init",
    "dtype",
    "quantization",
    "enable_lora",
    "max_loras",
    "max_lora_rank",
    "logprobs_mode",
    "tensor_parallel_size",
    "worker_extension_cls",
}


class NormReceiver:
    """What the engine's worker can do besides its own work (vllm's ``worker_extension_cls``)."""

    get_model: Callable[[], Any]

    @torch.no_grad()
    def npu_qat_load_norms(self, file: str) -> int:
        """Put the norms in the safetensors ``file`` into the model; returns how many.

        Raises ValueError for a tensor that is no norm of the model, and if the model does not hold
        what was loaded.
        """
        from safetensors.torch import load_file

        tensors, model = load_file(file), self.get_model()
        held = dict(model.named_parameters())
        for name, tensor in tensors.items():
            if not name.endswith("norm.weight") or tensor.ndim != 1 or name not in held:
                raise ValueError(f"{name} is no norm of the engine's model")
        model.load_weights(tensors.items())
        for name, tensor in tensors.items():
            found = held[name].cpu()
            # torch.equal would convert one of the two first.
            if found.dtype != tensor.dtype or not torch.equal(found, tensor):
                raise ValueError(f"{name} did not arrive: the engine's model holds other numbers")
        return len(tensors)


class VllmSampler:
    """Samples with a vllm engine of its own on this process's device.

    Args:
        base: the exported base, without adapter.
        config: lengths, and arguments for the engine.
        rank: of the adapters.
        eos_ids: tokens that end a completion.
        device: of this process.

    Raises:
        ValueError: vllm is not installed, or an option is decided by this program.
    """

    name = "vllm"
    in_modules = False

    def __init__(
        self,
        base: Path,
        config: RolloutConfig,
        rank: int,
        eos_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self.proven = False
        self.eos_ids = list(eos_ids)
        self._folder = tempfile.TemporaryDirectory(prefix="npu-qat-engine-")
        self._adapter = ""  # digest of what the engine has
        self._norms: dict[str, torch.Tensor] = {}
        self._pushes = 0
        self._request: Any = None
        arguments = engine_arguments(base, config, rank, device.type)
        with engine_environment(device):
            self.llm = start_engine(arguments)

    # --- what the engine computes -----------------------------------------------------------

    def follow(self, model: nn.Module) -> None:
        """Push the adapter and the norms of ``model`` as far as they changed."""
        changed = self._push_norms(model)
        changed |= self._push_adapter(model)
        if changed:
            self.llm.reset_prefix_cache()

    def _push_norms(self, model: nn.Module) -> bool:
        from safetensors.torch import save_file

        from npu_qat.noise.norms import find_rms_norms

        now = {f"{path}.weight": _bits(norm.weight) for path, norm in find_rms_norms(model).items()}
        changed = {
            name: weight
            for name, weight in now.items()
            if name not in self._norms or not torch.equal(weight, self._norms[name])
        }
        if not changed:
            return False
        file = Path(self._folder.name) / "norms.safetensors"
        save_file(changed, file)
        for loaded in self.llm.collective_rpc("npu_qat_load_norms", args=(str(file),)):
            if loaded != len(changed):
                raise TrainingError(f"the engine took {loaded} of {len(changed)} norms")
        self._norms = now
        return True

    def _push_adapter(self, model: Any) -> bool:
        state = {n: _bits(p) for n, p in model.named_parameters() if ".lora_" in n}
        digest = _digest(state)
        if digest == self._adapter:
            return False
        from vllm.lora.request import LoRARequest

        self._pushes += 1
        folder = Path(self._folder.name) / f"adapter-{self._pushes}"
        model.save_pretrained(folder, state_dict=state)
        before = self._request
        self._request = LoRARequest(folder.name, self._pushes, str(folder))
        if before is not None:
            self.llm.llm_engine.remove_lora(before.lora_int_id)
        if not self.llm.llm_engine.add_lora(self._request):
            raise TrainingError(f"the engine refused the adapter in {folder}")
        self._adapter = digest
        return True

    # --- sampling ---------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        params: SamplingParams,
        *,
        stop: Callable[[], None],
    ) -> list[Completion]:
        """One completion for each prompt, from the model last followed."""
        from vllm import SamplingParams as EngineParams

        assert self._request is not None, "follow() comes first"
        stop()
        wanted = [
            EngineParams(
                temperature=params.temperature,
                max_tokens=params.max_new_tokens,
                seed=row_seed(key),
                logprobs=0,  # of the sampled token alone
                stop_token_ids=self.eos_ids,
                ignore_eos=True,  # but for those above: the run decides what ends a completion
                detokenize=False,
            )
            for key in keys
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = self.llm.generate(requests, wanted, lora_request=self._request, use_tqdm=False)
        return [_completion(answer.outputs[0]) for answer in answers]


def start_engine(arguments: dict[str, Any]) -> Any:
    """vllm's ``LLM``. Raises ValueError if vllm is not installed."""
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(
            f"rollout.engine: vllm needs vllm (and vllm-ascend on an NPU): {error}. Install them, "
            "or set rollout.engine: hf"
        ) from error
    return LLM(**arguments)


def engine_arguments(base: Path, config: RolloutConfig, rank: int, device: str) -> dict[str, Any]:
    """Arguments of vllm's ``LLM``, the user's ``engine_options`` among them."""
    options = dict(config.engine_options)
    if reserved := sorted(RESERVED & set(options)):
        raise ValueError(f"rollout.engine_options: {reserved[0]!r} is decided by this program")
    ascend = device == "npu" or config.engine_format == "ascend"
    wanted = max(rank, NPU_LORA_RANK if ascend else 0)
    ranks = [allowed for allowed in LORA_RANKS if allowed >= wanted]
    if not ranks:
        raise ValueError(f"lora.r {rank} is above vllm's largest, {LORA_RANKS[-1]}")
    return {
        "max_model_len": config.max_prompt_tokens + config.max_new_tokens,
        "max_num_seqs": config.batch_size,
        # The trainer lives on the same device.
        "gpu_memory_utilization": 0.4,
        "disable_log_stats": True,
        **options,
        "model": str(base),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": ranks[0],
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": f"{NormReceiver.__module__}.{NormReceiver.__name__}",
    }


@contextmanager
def engine_environment(device: torch.device) -> Iterator[None]:
    """Environment in which an engine starts that has this process's device for itself."""
    before = dict(os.environ)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"  # the device is in use already
    if device.type in VISIBLE_DEVICES:
        variable = VISIBLE_DEVICES[device.type]
        visible = [d for d in before.get(variable, "").split(",") if d]
        os.environ[variable] = visible[local] if visible else str(local)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            # What vllm set for itself stays; the run's own variables come back.
            if name in VISIBLE_DEVICES.values():
                del os.environ[name]
        os.environ.update(before)


def row_seed(key: tuple[int, ...]) -> int:
    """A seed of 63 bits for the row with this key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


def _completion(output: Any) -> Completion:
    tokens = list(output.token_ids)
    logp = [step[token].logprob for token, step in zip(tokens, output.logprobs or [], strict=True)]
    if not tokens or not all(map(math.isfinite, logp)):
        raise TrainingError("the engine's logits hold NaN or Inf while sampling")
    return Completion(tokens, logp, truncated=output.finish_reason == "length")


def _bits(weight: Any) -> torch.Tensor:
    """The 16-bit image on the CPU, in memory of its own."""
    image: torch.Tensor = weight.detach().to(torch.bfloat16)
    return image.to("cpu", copy=True).contiguous()


def _digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].view(torch.uint8).numpy().data)
    return found.hexdigest()
