"""The serving stack on a CPU: real vllm, vllm-ascend and torch-npu, and a model of ours in it.

    served = serve(exported.folder)
    served.linear("model.layers.0.self_attn.qkv_proj", x)
    served.logits(tokens)

Real: the choice of ``ascend`` from the folder, ``NPUPlatform`` and ``AscendModelSlimConfig``, the
model class with its fused linears, ``DefaultModelLoader``, ``process_weights_after_loading`` and
``apply`` with torch-npu's own operator signatures. Not real, and so not tested:

* the operators compute with the CPU kernels of ``tests/contract/op_kernels.py``;
* attention is causal attention over one whole sequence instead of a paged cache;
* norms, rotary embedding and SiLU are vllm's PyTorch versions: those of vllm-ascend take over only
  in its worker process, which needs a device;
* vllm-ascend's wheel is built for the A2; its build record is changed to A5 (Ascend 950).

Every parameter is poisoned before it is loaded, since the real loader does not notice a tensor
that is missing.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Read when vllm is imported.
os.environ["VLLM_PLUGINS"] = "ascend"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the platform would trace the sampler, and gain nothing

import torch
from torch import nn
from torch.nn import functional as F

POISON = 0xA5
MAX_LENGTH = 128


@cache
def stack() -> list[torch.library.Library]:
    """Make vllm and vllm-ascend ready, once; returns the operators' registrations."""
    import torch_npu  # noqa: F401  (declares the operators)
    import vllm_ascend._build_info as build

    build.__device_type__ = "A5"

    import vllm.lora.lora_model
    import vllm.utils.platform_utils
    import vllm_ascend.quantization  # noqa: F401  (registers "ascend")
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.utils import torch_utils

    from npu_qat.training.engine import launch_environment
    from tests.contract_vllm.operators import register_operators

    # Else they are inspected in another process each, which takes most of a minute.
    for model in (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM):
        ModelRegistry.register_model(model.__name__, model)
    # The platform says that memory can be pinned, and there is no device to pin it for.
    type(current_platform).is_pin_memory_available = classmethod(lambda cls: False)
    for module in (vllm.utils.platform_utils, vllm.lora.lora_model):
        module.is_pin_memory_available = lambda: False
    torch_utils.async_tensor_h2d.__defaults__ = (False,)
    # torch-npu asks its device before an optimiser's step on any device.
    sys.modules["torch.optim.optimizer"]._get_foreach_kernels_supported_devices = lambda: []
    Attention.forward = causal_attention
    from vllm.config import VllmConfig, set_current_vllm_config

    # One group of one process for the run and the engine, which here share a process.
    launch_environment(torch.device("cpu"))
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "env://", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
    return [*register_operators(), linear_of_16_bits()]


def linear_of_16_bits() -> torch.library.Library:
    """vllm-ascend registers its 16-bit linear for its own device alone."""
    library = torch.library.Library("vllm", "IMPL", "CPU")
    library.impl("unquantized_gemm", F.linear)
    return library


def causal_attention(
    self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """One sequence that starts at position 0: [T, heads * size] each."""

    def heads(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(len(x), count, -1).transpose(0, 1)[None]

    out = F.scaled_dot_product_attention(
        heads(q, self.num_heads),
        heads(k, self.num_kv_heads),
        heads(v, self.num_kv_heads),
        is_causal=True,
        scale=self.impl.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).flatten(1)


@dataclass
class Served:
    """A model in the engine's layers; ``adapters`` is the worker's manager, if LoRA is on."""

    model: nn.Module
    config: Any
    adapters: Any = None

    def use_adapter(self, folder: Path | None, tokens: int) -> None:
        """Add the adapter in ``folder`` for the next call with ``tokens`` tokens; None: without."""
        from vllm.lora.request import LoRARequest

        self.use_lora(None if folder is None else LoRARequest("adapter", 1, str(folder)), tokens)

    def use_lora(self, request: Any, tokens: int) -> None:
        """As ``use_adapter`` with the engine's request for an adapter, or None."""
        if self.adapters is None:
            assert request is None
            return
        from vllm.lora.layers import LoRAMapping

        index = 0 if request is None else request.lora_int_id
        mapping = LoRAMapping((index,) * tokens, (index,), is_prefill=True)
        self.adapters.set_active_adapters({request} - {None}, mapping)

    def module(self, path: str) -> Any:
        return self.model.get_submodule(path)

    @torch.no_grad()
    def linear(self, path: str, x: torch.Tensor) -> torch.Tensor:
        """Output of a (fused) linear of the engine for x [T, K]."""
        out = self.module(path)(x)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """fp32 [T, V] of one sequence."""
        from vllm.forward_context import set_forward_context

        ids = torch.tensor(tokens)
        with set_forward_context(None, self.config):
            hidden = self.model(ids, torch.arange(len(tokens)), None)
        out: torch.Tensor = self.model.compute_logits(hidden)
        return out.float()


def engine_config(folder: Path, **options: Any) -> Any:
    """vllm's configuration for a folder, made as ``vllm serve FOLDER`` makes it."""
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

    model = ModelConfig(
        model=str(folder),
        tokenizer=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=MAX_LENGTH,
    )
    return VllmConfig(model_config=model, load_config=LoadConfig(use_tqdm_on_load=False), **options)


def serve(folder: Path, *, max_lora_rank: int | None = None) -> Served:
    """Load an exported folder with the real loader into poisoned parameters.

    Whatever the loader raises comes through. ``max_lora_rank``: as ``--enable-lora
    --max-lora-rank``.
    """
    stack()
    from vllm.config import LoRAConfig

    options = {}
    if max_lora_rank is not None:
        options["lora_config"] = LoRAConfig(
            max_lora_rank=max_lora_rank, max_loras=1, lora_dtype=torch.bfloat16
        )
    return load(engine_config(folder, **options))


def load(config: Any) -> Served:
    """Load the model that vllm's ``config`` names, as its model runners do."""
    from vllm.config import set_current_vllm_config
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )

    model_config, cpu = config.model_config, torch.device("cpu")
    with set_current_vllm_config(config):
        # Not vllm's own block for this, which does not end when the model refuses to be made.
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = initialize_model(vllm_config=config, model_config=model_config)
        finally:
            torch.set_default_dtype(before)
        for parameter in model.parameters():
            integers = not parameter.is_floating_point()
            parameter.data.fill_(POISON if integers else float("nan"))
        DefaultModelLoader(config.load_config).load_weights(model, model_config)
        process_weights_after_loading(model, model_config, cpu)
        served = Served(model.eval(), config)
        if config.lora_config is not None:
            served.adapters = LRUCacheWorkerLoRAManager(config, cpu, model.embedding_modules)
            served.adapters.create_lora_manager(model, config)
    return served


def poisoned(served: Served) -> list[str]:
    """Parameters that nothing was loaded into, or not everywhere."""
    return [
        name
        for name, parameter in served.model.named_parameters()
        if (
            bool(torch.isnan(parameter).any())
            if parameter.is_floating_point()
            # A row of poison: single bytes may be what the checkpoint holds.
            else bool((parameter.reshape(parameter.shape[0], -1) == POISON).all(0).any())
        )
    ]
