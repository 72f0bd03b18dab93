"""The serving path, computed from an exported folder and nothing else.

What a serving engine does with a W4A4 linear, on any machine: read packed codes, scale bytes and
bias from the files; encode the input by the engine's own rule; multiply; add the bias in fp32;
round once. ``QuantLinear`` never appears here, and the encoder is the numpy witness of
``independent``, so that an agreement with training is one of two implementations, not of one with
itself.

On an NPU whose backend multiplies codes, ``ServedLinear`` is the device's own matmul
(``fused_linear``) and its own encoder. Elsewhere the decoded operands, which are exact in 16 bits,
go through the same matmul of torch as in training: what may differ is then codes, scales and bias,
and on one CPU nothing does.

An adapter is applied as vLLM's ``torch_ops`` do it: A in fp32 on the 16-bit input, the result
rounded, B scaled beforehand. Training multiplies by the scale afterwards, so adapters agree within
rounding only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from npu_qat.backends.base import Backend, FusedBackend, PackedWeight
from npu_qat.deploy.adapter import Adapter, read_adapter
from npu_qat.deploy.checkpoint import ASCEND_SIGNATURE, read_config
from npu_qat.deploy.core import INPUT_SCALE, divisor
from npu_qat.deploy.reader import ExportedModel, open_export
from npu_qat.numerics import QuantizedTensor, dequantize, fake_quant, get_profile
from npu_qat.parity import independent

FULL = "16 bits"
# What a scheme of AscendV1 makes of the inputs.
_ASCEND = {"W4A4_MXFP4": "ascend950", "W4A8_MXFP": "fp8 e4m3 in blocks of 32"}


class ServedLinear(nn.Module):
    """``y = decode(encode(x)) decode(W)^T + b`` with ``encode`` of the serving engine.

    Args:
        path: of the linear, for messages.
        weight: codes and scales [N, K].
        bias: [N] as stored, or None.
        activations: served profile, or ``16 bits``.
        input_scale: fp32 scalar of NVFP4, else None.
        dtype: of inputs and results.
        backend: of the device; not used on a CPU.
    """

    def __init__(
        self,
        path: str,
        weight: QuantizedTensor,
        bias: torch.Tensor | None,
        activations: str,
        input_scale: torch.Tensor | None,
        dtype: torch.dtype,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.path, self.codes, self.activations = path, weight, activations
        self.out_features, self.in_features = weight.shape
        self.input_scale, self.backend, self.dtype = input_scale, backend, dtype
        # The engine's parameter is 16-bit, whatever the file holds.
        self.bias = None if bias is None else bias.to(dtype)
        # Another rule for the inputs, to find out what a server computes; see ``computing``.
        self.instead: str | None = None
        self.fused: Any = None
        if isinstance(backend, FusedBackend) and activations != FULL:
            self.fused = backend.prepare_weight(PackedWeight.of(weight))
        else:
            self.image = dequantize(weight, dtype, apply_tensor_scale=False)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [M, K] and scale bytes [M, blocks] (uint8) of ``x`` [.., K].

        Raises:
            ValueError: there is no encoder for these activations.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.device.type != "cpu" and self.backend is not None:
            q = self.backend.quantize(rows, self.activations, tensor_scale=self.input_scale)
            return q.codes, q.scales
        scale = None if self.input_scale is None else divisor(self.input_scale).numpy()[0]
        found = independent.encode(rows.double().cpu().numpy(), self.activations, scale)
        if found is None:
            raise ValueError(f"{self.path}: activations in {self.activations!r} are not emulated")
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The numbers that codes [M, K] stand for, without a tensor scale."""
        profile = replace(get_profile(self.activations), tensor_scale=False)
        q = QuantizedTensor(codes, scales, profile, axis=1)
        return dequantize(q, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.instead is not None:
            operand = rows if self.instead == FULL else fake_quant(rows, self.instead)
            y = self._product(operand)
        elif self.fused is not None:
            assert isinstance(self.backend, FusedBackend)
            bias = None if self.bias is None else self.bias.float()
            encoded = self.backend.encode_input(rows, self.activations)
            y = self.backend.fused_linear(encoded, self.fused, bias, self.dtype)
        else:
            operand = rows if self.activations == FULL else self.decode(*self.encode(rows))
            y = self._product(operand)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _product(self, operand: torch.Tensor) -> torch.Tensor:
        scales = [s for s in (self.codes.tensor_scale, self.input_scale) if s is not None]
        if not scales:
            return F.linear(operand, self.image, self.bias)
        y = F.linear(operand, self.image).float() * torch.stack(scales).prod()
        return (y if self.bias is None else y + self.bias.float()).to(self.dtype)


class WithAdapter(nn.Module):
    """``base(x) + B (A x)`` as vLLM's ``torch_ops`` compute it."""

    def __init__(self, base: nn.Module, adapter: Adapter, path: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.enabled = base, True
        self.a = adapter.a[path].to(dtype)
        self.b = (adapter.b[path].float() * adapter.scaling[path]).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        shrunk = F.linear(x.float(), self.a.float()).to(y.dtype)
        return y + F.linear(shrunk, self.b)


@dataclass
class ServedModel:
    """A model as an engine would serve it.

    Attributes:
        folder: the export.
        model: the decoder of transformers with served linears in it.
        layers: the quantised linears by path.
        activations: what the engine makes of their inputs.
        adapter: the adapter that is applied, or None.
    """

    folder: Path
    model: Any
    layers: dict[str, ServedLinear]
    activations: str
    adapter: Path | None


@contextmanager
def computing(served: ServedModel, activations: str | None, *, adapter: bool) -> Iterator[None]:
    """Inside, ``served`` computes as a server that gets something wrong would.

    Args:
        activations: a profile or ``16 bits`` for the inputs of quantised linears; None: as it
            should.
        adapter: whether the adapter is applied.
    """
    adapters = [m for m in served.model.modules() if isinstance(m, WithAdapter)]
    for layer in served.layers.values():
        layer.instead = activations
    for module in adapters:
        module.enabled = adapter
    try:
        yield
    finally:
        for layer in served.layers.values():
            layer.instead = None
        for module in adapters:
            module.enabled = True


def served_activations(folder: Path) -> str:
    """What the engine that reads ``folder`` makes of a quantised linear's input."""
    if (folder / ASCEND_SIGNATURE).exists():
        description = json.loads((folder / ASCEND_SIGNATURE).read_text("utf-8"))
        kinds = {str(v) for v in description.values()} & set(_ASCEND)
        return _ASCEND[kinds.pop()] if len(kinds) == 1 else f"mixed: {sorted(kinds)}"
    settings = read_config(folder).get("quantization_config") or {}
    group: dict[str, Any] = next(iter((settings.get("config_groups") or {}).values()), {})
    if not group.get("input_activations"):
        return FULL
    return "nvfp4" if "nvfp4" in str(settings.get("format")) else "compressed-tensors"


def open_served(
    folder: Path,
    *,
    adapter: Path | None = None,
    device: torch.device | None = None,
    backend: Backend | None = None,
    attention: str = "sdpa",
) -> ServedModel:
    """The model in ``folder`` as an engine serves it.

    Args:
        folder: an export in either format.
        adapter: a LoRA adapter in PEFT's format to apply at run time.
        device: where it computes; default the CPU.
        backend: of the device.
        attention: transformers' ``attn_implementation``.

    Raises:
        ValueError: the folder cannot be read, or lacks a tensor of its architecture.
    """
    exported = open_export(folder)
    device = device or torch.device("cpu")
    model = _empty_model(folder, attention)
    dtype = model.dtype
    activations = served_activations(folder)
    layers = _fill(model, exported, activations, backend, device)
    if adapter is not None:
        found = read_adapter(adapter)
        found.check(
            {p: (m.out_features, m.in_features) for p, m in model.named_modules() if _linear(m)}
        )
        for path in found.paths:
            base = model.get_submodule(path)
            _replace(model, path, WithAdapter(base, found, path, dtype))
    model = model.to(device).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return ServedModel(folder, model, layers, activations, adapter)


def _empty_model(folder: Path, attention: str) -> Any:
    """The architecture of ``folder`` with memory for its tensors, in its dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the model of {folder}/config.json cannot be built: {error}") from error
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _fill(
    model: Any,
    exported: ExportedModel,
    activations: str,
    backend: Backend | None,
    device: torch.device,
) -> dict[str, ServedLinear]:
    """Put every entry of ``exported`` in its place; returns the served linears."""
    names = set(exported.names())
    parameters = dict(model.named_parameters())
    missing = {n for n in parameters if n not in names}
    if missing:
        first = sorted(missing)[0]
        raise ValueError(f"{exported.folder} has no tensor {first}, which its architecture needs")
    layers: dict[str, ServedLinear] = {}
    for name in sorted(names):
        path, _, kind = name.rpartition(".")
        value = exported.read(name)
        if isinstance(value, QuantizedTensor):
            bias = exported.read(f"{path}.bias") if f"{path}.bias" in names else None
            scale = exported.read(f"{path}.{INPUT_SCALE}") if _calibrated(path, names) else None
            assert not isinstance(bias, QuantizedTensor) and not isinstance(scale, QuantizedTensor)
            layers[path] = ServedLinear(
                path,
                _on(value, device),
                None if bias is None else bias.to(device),
                activations,
                None if scale is None else scale.to(device),
                model.dtype,
                backend,
            )
        elif kind != INPUT_SCALE and name in parameters:
            with torch.no_grad():
                parameters[name].copy_(value)
    for path, layer in layers.items():
        _replace(model, path, layer)
    return layers


def _calibrated(path: str, names: set[str]) -> bool:
    return f"{path}.{INPUT_SCALE}" in names


def _on(q: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    scale = None if q.tensor_scale is None else q.tensor_scale.to(device)
    return replace(q, codes=q.codes.to(device), scales=q.scales.to(device), tensor_scale=scale)


def _linear(module: Any) -> bool:
    return isinstance(module, (nn.Linear, ServedLinear))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
