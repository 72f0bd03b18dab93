"""Fused norms and MLPs give what the separate modules and quantisers give, forward and backward.

On a GPU where one is there, else in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="the fused kernels are Triton's")

from npu_qat.backends import Backend, EmulationBackend
from npu_qat.backends.cuda.backend import CudaBackend
from npu_qat.config import LoraSection, NoiseConfig, Recipe
from npu_qat.layers import QuantizedModel, add_lora, prepare_model
from npu_qat.layers.fusion import NORMS, fuse
from npu_qat.noise import AQN
from tests.backends.kernels import DEVICE, needs_kernels
from tests.training.tiny import tiny_model

IDS = torch.arange(3, 19).view(2, 8)
pytestmark = needs_kernels


class Counting(CudaBackend):
    """Counts what is quantised apart from its producer."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def fake_quant(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        return super().fake_quant(x, *args, **kwargs)  # type: ignore[arg-type]


def prepared(
    backend: Backend, family: str = "qwen2", recipe: Recipe | None = None
) -> tuple[nn.Module, QuantizedModel]:
    model = tiny_model(family, dtype=torch.bfloat16).to(DEVICE)
    return model, prepare_model(model, recipe or Recipe(), backend)


def gradients(backend: Backend, *, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    model, handle = prepared(backend)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    wrapped = add_lora(model, LoraSection(r=4, alpha=8), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    wrapped.train()
    with handle.phase("training"):
        ids = IDS.to(DEVICE)
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.cpu() for n, p in wrapped.named_parameters() if p.grad is not None}


def test_the_linears_get_their_quantised_input_from_its_producer() -> None:
    backend = Counting()
    model, handle = prepared(backend)
    layers = model.config.num_hidden_layers
    with torch.no_grad():
        model(input_ids=IDS.to(DEVICE), use_cache=False)
    assert len(backend.shapes) == layers, "only the attention's output has no fused producer"
    handle.audit.verify(model)


def test_modules_keep_their_class_their_paths_and_their_state() -> None:
    plain, _ = prepared(EmulationBackend())
    fused, handle = prepared(CudaBackend())
    assert list(plain.state_dict()) == list(fused.state_dict())
    for path, module in plain.named_modules():
        assert isinstance(fused.get_submodule(path), type(module))
    kinds = {type(m).__name__ for m in fused.modules()}
    assert "FusedQwen2RMSNorm" in kinds and "FusedQwen2MLP" in kinds
    assert not kinds & set(NORMS)
    assert fuse(plain, handle._state) and not fuse(fused, handle._state)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_logits_are_those_of_separate_modules(family: str) -> None:
    results = []
    for backend in (EmulationBackend(), CudaBackend()):
        model, _ = prepared(backend, family)
        with torch.no_grad():
            results.append(model(input_ids=IDS.to(DEVICE), use_cache=False).logits.float().cpu())
    # A last bit of y may cross a rounding boundary of the 4-bit grid; most of it must not.
    wanted, measured = results
    assert (measured - wanted).norm() < 0.05 * wanted.norm()
    assert ((measured - wanted).abs() < 0.02).float().mean() > 0.9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_separate_modules(checkpointing: bool) -> None:
    wanted = gradients(EmulationBackend())
    measured = gradients(CudaBackend(), checkpointing=checkpointing)
    assert wanted.keys() == measured.keys() and wanted
    for name, grad in wanted.items():
        assert grad.norm() > 0
        assert (measured[name] - grad).norm() < 0.1 * grad.norm(), name


def test_the_recomputed_forward_pass_gives_the_same_gradients() -> None:
    kept, again = (gradients(CudaBackend(), checkpointing=c) for c in (False, True))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_backend_without_such_kernels_changes_nothing() -> None:
    model, _ = prepared(EmulationBackend())
    assert not any(type(m).__name__.startswith("Fused") for m in model.modules())


@pytest.mark.parametrize("norm_dtype", ["model", "fp32"])
def test_noise_on_a_norm_reaches_the_kernel(norm_dtype: str) -> None:
    changes = {"enabled": True, "sigma_start": 0.2, "sigma_end": 0.1, "norm_dtype": norm_dtype}
    results: dict[str, list[torch.Tensor]] = {"plain": [], "fused": []}
    for kind, backend in (("plain", EmulationBackend()), ("fused", CudaBackend())):
        model, _ = prepared(backend)
        aqn = AQN(model, NoiseConfig.model_validate(changes), total_steps=10, seed=3)
        norm = model.model.layers[0].input_layernorm
        x = torch.linspace(-2, 2, 64).to(torch.bfloat16).to(DEVICE)[None]
        with torch.no_grad():
            results[kind].append(norm(x).float().cpu())
            with aqn.applied(step=5):
                results[kind].append(norm(x).float().cpu())
    for plain, fused in zip(*results.values(), strict=True):
        torch.testing.assert_close(fused, plain, rtol=2**-7, atol=0)
    assert not torch.equal(*results["fused"])
