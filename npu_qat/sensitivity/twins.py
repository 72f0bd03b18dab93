"""Quantised twins of a model's linears, and a tap on the model that lets them stand in.

A scan must say what W4A4 *would* do to a model, many times over and for one linear at a time,
without touching the model. Two pieces make that possible:

* **Twins.** ``prepare_model`` is run on a skeleton that holds the model's linears at their paths
  and nothing else. What comes back are the very ``QuantLinear`` layers that training would use
  (their profiles, tensor scales, rotation and audit included), beside the model and not in it.
* **The tap.** ``torch.overrides.TorchFunctionMode`` sees every call of ``F.linear`` that the model
  makes, and recognises the linear by its weight. A handler may look at the input, or answer with a
  twin's result. No module, hook or weight of the model is changed, so there is nothing to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from npu_qat.backends import Backend
from npu_qat.config import Recipe
from npu_qat.config.paths import layer_index
from npu_qat.layers import QuantizedModel, prepare_model

Handler = Callable[[str, Tensor, Callable[[], Tensor]], Tensor]
"""(path of a linear, its input [..., K], its 16-bit result on demand) -> the result to use."""


def make_twins(model: nn.Module, recipe: Recipe, backend: Backend | None = None) -> QuantizedModel:
    """The quantised layers that ``recipe`` makes of ``model``, which stays as it is.

    Raises:
        ValueError: as ``prepare_model``; and if ``model`` is prepared already or the recipe
            quantises nothing.
    """
    if recipe.injection_point == "none":
        raise ValueError(
            "injection_point is none, so there is nothing to scan; set quant.injection_point"
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        return prepare_model(_skeleton(model), recipe, backend)
    finally:
        for parameter in trainable:  # prepare_model freezes; the parameters are the model's own
            parameter.requires_grad_(True)


def _skeleton(model: nn.Module) -> nn.Module:
    """A module tree with ``model``'s linears and embeddings only, at their paths.

    The leaves are new modules around the model's parameters. Embeddings are there because tied
    weights are recognised by them.
    """
    root = nn.Module()
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        parent = root
        *parents, name = path.split(".")
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        leaf = object.__new__(type(module))
        nn.Module.__init__(leaf)
        leaf.__dict__.update({k: v for k, v in module.__dict__.items() if k not in leaf.__dict__})
        leaf._parameters = dict(module._parameters)
        parent.add_module(name, leaf)
    return root


class LinearTap(TorchFunctionMode):
    """Hands every call of a known linear to ``handler``; everything else passes.

    Args:
        linears: path -> linear of the model; recognised by the identity of their weights.
        handler: see ``Handler``.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], handler: Handler) -> None:
        super().__init__()
        self._paths = {id(linear.weight): path for path, linear in linears.items()}
        self._handler = handler

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) > 1 and (path := self._paths.get(id(args[1]))):
            return self._handler(path, args[0], lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def linears_of(model: nn.Module, handle: QuantizedModel) -> dict[str, nn.Linear]:
    """The model's own linears at the paths that ``handle`` quantises."""
    found = {path: model.get_submodule(path) for path in handle.layers}
    return {path: module for path, module in found.items() if isinstance(module, nn.Linear)}


def decoder_layers(model: nn.Module, paths: list[str]) -> dict[int, nn.Module]:
    """Index -> decoder layer module, of the layers in which the linears ``paths`` lie."""
    layers: dict[int, nn.Module] = {}
    for path in paths:
        index = layer_index(path)
        if index is not None and index not in layers:
            parts = path.split(".")
            layers[index] = model.get_submodule(".".join(parts[: parts.index(str(index)) + 1]))
    return dict(sorted(layers.items()))


@contextmanager
def watch_outputs(
    layers: Mapping[int, nn.Module], see: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call ``see(index, output)`` with the hidden state behind each decoder layer."""

    def watcher(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            see(index, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [layer.register_forward_hook(watcher(i)) for i, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; fails if a parameter or buffer was written to.

    Every in-place change of a tensor counts up its version, so the check costs nothing.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (id(t), t._version) for name, t in tensors.items()}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    changed = [n for n, t in tensors.items() if before.get(n) != (id(t), t._version)]
    if changed or len(before) != len(tensors):
        raise RuntimeError(f"the scan changed the model: {changed or 'tensors are missing'}")
