"""What makes decoding cheap: a key-value cache that does not move, and a CUDA graph of the step.

**Cache.** transformers' dynamic cache makes a new tensor for each token and copies all that was in
the old one. Here the room for the longest completion is taken once and a token is written behind
the last. Attention sees a view of the filled part, so its numbers are those of the dynamic cache.

**Graph.** One decoding step of a 1.5B model is about a thousand small kernels, and on a GPU
starting them takes longer than running them. A step is therefore recorded once and replayed: the
same kernels at the same addresses. For that all shapes must stand still, so attention reads the
whole room under a mask, and token, position and mask are tensors that are changed in place. The
recording is made anew when rows leave the batch.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

# Shapes [B, 1, 1, capacity] of the steps that a model has run.
_SHAPES_RUN: WeakKeyDictionary[Any, set[torch.Size]] = WeakKeyDictionary()
# The attention of recorded steps, by its name in transformers.
GROUPED = "npu_qat_one_token"
# Modules whose hooks on a model do nothing without a gradient: DeepSpeed's engine starts its timers
# and prepares for backward; checkpointing makes embeddings require a gradient. (ZeRO-3, whose hooks
# gather weights, is another module and stays.)
HOOKS_OF_TRAINING = ("deepspeed.runtime.engine", "transformers.modeling_utils")


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, [B, H, filled, D], in a room for ``capacity`` tokens.

    Attributes:
        slot: None: a token goes behind the last one and the filled part is returned. A tensor
            (int64, one element): it goes there, and the whole room is returned, as a graph needs.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.filled = 0
        self.slot: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms = [self._room(key_states), self._room(value_states)]

    def _room(self, states: torch.Tensor) -> torch.Tensor:
        # Zeros, because attention multiplies what is masked by zero: garbage could be NaN.
        return states.new_zeros((*states.shape[:2], self.capacity, states.shape[3]))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.slot is not None:
            for room, states in zip(self._rooms, (key_states, value_states), strict=True):
                room.index_copy_(2, self.slot, states)
            return self._rooms[0], self._rooms[1]
        end = self.filled + key_states.shape[2]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, self.filled : end] = states
        self.filled = end
        self._show()
        return self.keys, self.values

    def _show(self) -> None:
        self.keys, self.values = (room[:, :, : self.filled] for room in self._rooms)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``; only what is filled is copied."""
        kept = []
        for room in self._rooms:
            new = room.new_zeros((len(indices), *room.shape[1:]))
            new[:, :, : self.filled] = room[indices, :, : self.filled]
            kept.append(new)
        self._rooms = kept
        self._show()


def roomy_cache(config: Any, capacity: int) -> Any:
    """An empty cache for ``capacity`` tokens; layers with a sliding window stay as they are.

    The room is a multiple of 8 tokens, as attention kernels want their masks.
    """
    capacity += -capacity % 8
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def can_record(model: Any, cache: Any) -> bool:
    """Whether decoding steps of ``model`` with ``cache`` may be a CUDA graph.

    The mask of a recorded step is one that PyTorch's attention takes, a sliding window moves, and
    a replay runs no Python: whoever hooks into a forward pass gets plain steps, but for hooks that
    only serve a backward pass (HOOKS_OF_TRAINING).
    """
    return (
        next(model.parameters()).device.type == "cuda"
        and not any(_needs_python(m) for m in model.modules())
        and model.config._attn_implementation == "sdpa"
        and all(isinstance(layer, RoomyLayer) for layer in cache.layers)
    )


def _needs_python(module: Any) -> bool:
    """Whether a hook of ``module`` must run in every forward pass."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) not in HOOKS_OF_TRAINING for hook in hooks)


class RecordedStep:
    """A decoding step of a batch that does not change, recorded when it runs a second time (or at
    once, if the model has run steps of this shape before).

    Args:
        model: a causal language model of transformers.
        cache: from ``roomy_cache``, with the prompt (and perhaps more) in it.
        mask: [B, filled], 1 where a token stands.
        position: [B, 1], positions of the tokens that come next.
        finish: what is done with the logits [B, V], as part of the recording; what it reads must
            stay where it is. Default: nothing.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        mask: torch.Tensor,
        position: torch.Tensor,
        finish: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    ) -> None:
        self.model, self.cache, self.finish = model, cache, finish
        layer = cache.layers[0]
        self._slot = torch.full((1,), layer.filled, device=mask.device)
        self._mask = mask.new_zeros((len(mask), 1, 1, layer.capacity), dtype=torch.bool)
        self._mask[:, 0, 0, : layer.filled] = mask.bool()
        self._position, self._ids = position.clone(), position.clone()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = self._mask.shape in _SHAPES_RUN.get(model, ())
        self._tried = False

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """``finish(logits)`` after ``token`` [B]; it is overwritten by the next call.

        The first call of a shape runs as usual: what kernels do on their first call (compile,
        choose an algorithm) cannot be recorded.
        """
        self._ids.copy_(token[:, None])
        for layer in self.cache.layers:
            layer.filled += 1
        if self._warm and not self._tried and token.device.type == "cuda":
            self._record()
        self._warm = True
        _SHAPES_RUN.setdefault(self.model, set()).add(self._mask.shape)
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._recorded

    def _record(self) -> None:
        self._tried = True
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what it frees (pinned memory, graphs) may call what a recording forbids
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._recorded = self._step()
        except RuntimeError as error:
            warnings.warn(
                f"decoding goes on without a CUDA graph, several times slower: {_root(error)}",
                stacklevel=2,
            )
        else:
            self._graph = graph
        finally:
            if collects:
                gc.enable()

    def _step(self) -> torch.Tensor:
        self._mask.index_fill_(3, self._slot, True)
        out = self.finish(self._forward())
        self._slot.add_(1)
        self._position.add_(1)
        return out

    def _forward(self) -> torch.Tensor:
        for layer in self.cache.layers:
            layer.slot = self._slot
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = GROUPED
        try:
            # Not by a call: DeepSpeed's hook on the model synchronises, which ends a recording.
            out = self.model.forward(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._position,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            config._attn_implementation = before
            for layer in self.cache.layers:
                layer.slot = None
        logits: torch.Tensor = out.logits[:, -1]
        return logits


def _grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one token: query [B, H, 1, D], key and value [B, H / g, S, D] -> [B, 1, H, D].

    The g heads that share a key are g queries of it, so keys and values need not be repeated. (Some
    versions of transformers copy them for each head.)
    """
    batch, heads, _, size = query.shape
    grouped = query.view(batch, key.shape[1], -1, size)
    y = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return y.reshape(batch, 1, heads, size), None


AttentionInterface.register(GROUPED, _grouped_attention)


def _root(error: BaseException) -> str:
    """What went wrong first; ending the recording fails too and would hide it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
