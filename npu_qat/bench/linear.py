"""``linear``: forward and backward of a frozen linear, beside the frozen bf16 ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from npu_qat.bench.models import FP8, STORAGES, recipe, storages
from npu_qat.bench.rows import Row, Setup
from npu_qat.bench.timing import Times
from npu_qat.numerics import get_profile

if TYPE_CHECKING:
    from npu_qat.layers import QuantLinear

# Qwen2.5-1.5B: q (and o), gate (and up), down. The demo model's on a CPU.
GPU_SHAPES = {"q": (1536, 1536), "gate": (1536, 8960), "down": (8960, 1536)}
CPU_SHAPES = {"q": (128, 128), "gate": (128, 384), "down": (384, 128)}
GPU_TOKENS, CPU_TOKENS = 4096, 2048
PROFILES = ("ascend950", "nvfp4-one-level")


def rows(setup: Setup) -> Iterator[Row]:
    """A row a layer, profile and storage, and the bytes of the three weights in each storage."""
    shapes = GPU_SHAPES if setup.on_gpu else CPU_SHAPES
    tokens = 64 if setup.quick else GPU_TOKENS if setup.on_gpu else CPU_TOKENS
    for layer, (features, out) in shapes.items():
        yield from _of_layer(setup, layer, tokens, features, out)
    yield from _memory(setup, shapes)


def quantized_linear(setup: Setup, linear: nn.Linear, storage: str, profile: str) -> QuantLinear:
    """A quantised layer of ``linear``, as ``prepare_model`` makes it."""
    from npu_qat.layers import QuantLinear, prepare_model

    holder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"proj": _copy(linear)})])})
    prepare_model(holder, recipe(storage, profile), setup.selection.backend)
    made = holder.get_submodule("layers.0.proj")
    assert isinstance(made, QuantLinear)
    return made


def _copy(linear: nn.Linear) -> nn.Linear:
    made = nn.Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        dtype=linear.weight.dtype,
        device=linear.weight.device,
    )
    made.load_state_dict(linear.state_dict())
    return made


def _profiles(setup: Setup) -> list[str]:
    """Those of PROFILES that the backend computes."""
    from npu_qat.backends import BackendUnavailable

    found = []
    for profile in PROFILES:
        try:
            setup.selection.backend.check_profile(profile)
        except BackendUnavailable as error:
            setup.note(f"linear: no rows for {profile} ({error})")
        else:
            found.append(profile)
    return found


def _of_layer(setup: Setup, layer: str, tokens: int, features: int, out: int) -> Iterator[Row]:
    device = setup.selection.device
    torch.manual_seed(0)
    frozen = nn.Linear(features, out, bias=layer == "q", dtype=torch.bfloat16, device=device)
    frozen.requires_grad_(False)
    layers: dict[str, nn.Module] = {"bf16": frozen}
    for storage in storages(setup.selection):
        for profile in _profiles(setup):
            if storage in FP8 and get_profile(profile).block_size != 32:
                continue  # E4M3 scales do not fit into FP8
            layers[f"{storage}-{profile}"] = quantized_linear(setup, frozen, storage, profile)
    x = torch.randn(tokens, features, device=device).bfloat16().requires_grad_()
    gradient = torch.randn(tokens, out, device=device).bfloat16()
    calls = {name: partial(_step, module, x, gradient) for name, module in layers.items()}
    times = _times(setup, calls)
    for name in list(layers)[1:]:
        label = f"linear/{name}/{layer}-{features}x{out}/{tokens}-tokens"
        yield Row.of_times(label, times[name], times["bf16"])


def _step(module: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(module(x), x, gradient)[0]


def _times(setup: Setup, calls: Mapping[str, Callable[[], torch.Tensor]]) -> dict[str, Times]:
    if setup.selection.device.type == "cuda":
        try:
            return setup.clock.measure_graphs({name: [call] for name, call in calls.items()})
        except RuntimeError as error:
            torch.cuda.synchronize()
            setup.note(f"linear: measured without graphs ({str(error).splitlines()[0]})")
    return setup.clock.measure(calls)


def _memory(setup: Setup, shapes: dict[str, tuple[int, int]]) -> Iterator[Row]:
    for profile in _profiles(setup):
        for storage in STORAGES:
            stored = original = 0
            for features, out in shapes.values():
                linear = nn.Linear(features, out, bias=False, dtype=torch.bfloat16)
                linear = linear.to(setup.selection.device)
                stored += quantized_linear(setup, linear, storage, profile).storage_bytes
                original += linear.weight.numel() * linear.weight.element_size()
            yield Row(f"memory/{storage}-{profile}/weights", stored, original, unit="bytes")
