"""The NPU backend end to end on a CPU: numbers, layers, training steps and a whole run.

Everything but the operators' arithmetic is the product's own code, and what it calls is the real
``torch_npu``. The losses are compared with a run on the reference backend.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_qat.backends import EmulationBackend, Selection
from npu_qat.backends.npu import NpuBackend
from npu_qat.config import LoraSection, Recipe
from npu_qat.experiments import run as run_module
from npu_qat.layers import add_lora, prepare_model
from npu_qat.numerics import dequantize, quantize
from npu_qat.parity.device import judge, measure, passed, report
from npu_qat.parity.device_recording import read_recording
from tests.contract import op_kernels
from tests.contract.record import FOLDER, name_of, record
from tests.contract.test_op_kernels import CASES, GOLDEN, ROOT, SHARED, golden
from tests.experiments.running import carry_out, configuration, metrics
from tests.layers.test_quant_linear import Block
from tests.training.tiny import save_tiny_checkpoint, tiny_model

pytestmark = pytest.mark.contract


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [ROOT / "tests/numerics/data", SHARED / "golden"])
@pytest.mark.parametrize(("profile", "arguments", "prefix"), CASES)
def test_golden_vectors_through_both_backends(
    npu_backend: NpuBackend, profile: str, arguments: dict, prefix: str, folder: Path
) -> None:
    if not (folder / GOLDEN).is_file():
        pytest.skip(f"no golden vectors at {folder}; set NPU_QAT_SHARED to the folder above them")
    for x, codes, scales in golden(folder, prefix):
        for backend in (npu_backend, EmulationBackend()):
            q = backend.quantize(x, profile)
            assert torch.equal(q.packed, codes) and torch.equal(q.scales, scales)
            values = backend.fake_quant(x, profile)
            want = dequantize(q, torch.bfloat16)
            assert torch.equal(values.nan_to_num(), want.nan_to_num())
            assert torch.equal(values.isnan(), want.isnan())


def test_the_conformance_kit_passes(npu_backend: NpuBackend) -> None:
    recording = measure(npu_backend, torch.device("cpu"), large=False)
    verdicts = judge(recording)
    assert recording.stubbed and passed(verdicts), report(recording, verdicts)
    refused = {(v.entry.case, v.entry.profile) for v in verdicts if v.refused}
    assert all(case.startswith("fp16") and "alg2" in profile for case, profile in refused)
    assert sum(v.entry.kind == "product" for v in verdicts) == 16


# --- layers -------------------------------------------------------------------------------------


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"weight_profile": "ascend950", "activation_profile": "ascend950", **changes})


def model(backend: Any, **changes: Any) -> Any:
    return prepare_model(tiny_model(dtype=torch.bfloat16), recipe(**changes), backend)


TOKENS = torch.arange(3, 35).reshape(2, 16)


@pytest.mark.parametrize("profile", ["ascend950", "ascend950-rint", "ascend950-alg2-max7"])
@pytest.mark.parametrize("base_storage", ["image", "packed"])
def test_the_emulated_matmul_equals_the_reference_bit_for_bit(
    npu_backend: NpuBackend, profile: str, base_storage: str
) -> None:
    named = {
        "weight_profile": profile,
        "activation_profile": profile,
        "base_storage": base_storage,
    }
    with torch.no_grad():
        found = model(npu_backend, matmul="emulated", **named).model(TOKENS).logits
        want = model(EmulationBackend(), **named).model(TOKENS).logits
    assert torch.equal(found, want)


@pytest.mark.parametrize("profile", ["ascend950", "ascend950-floor", "ascend950-dual"])
def test_a_fused_layer_multiplies_the_same_values(npu_backend: NpuBackend, profile: str) -> None:
    """fp32 sums of the same products, so equal to the reference up to the order of summation."""
    named = {"weight_profile": profile, "activation_profile": profile}
    fused = model(npu_backend, matmul="fused", **named)
    reference = model(EmulationBackend(), **named)
    assert fused.matmul.name == "fused" and reference.matmul.name == "emulated"
    for path, layer in fused.layers.items():
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
        x = x.to(torch.bfloat16)
        with torch.no_grad():
            a, b = layer(x), reference.layers[path](x)
        exact = quantized_product(x, layer, profile)
        for y in (a, b):
            error = (y.double() - exact).abs()
            assert (error <= 2.0**-8 * exact.abs() + 1e-5 * exact.abs().max()).all(), path


@pytest.mark.parametrize(
    ("profile", "width", "output_error", "gradient_error"),
    [("ascend950", 96, 0.0, 0.0), ("ascend950-dual", 1024, 1e-4, 5e-3)],
)
def test_both_ways_to_multiply_agree_as_the_page_says(
    npu_backend: NpuBackend,
    profile: str,
    width: int,
    output_error: float,
    gradient_error: float,
) -> None:
    """docs/ascend.md, "Two ways to multiply"; 96 products of codes have an exact fp32 sum."""
    found = {}
    for matmul in ("fused", "emulated"):
        torch.manual_seed(0)
        block = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Block(width)])}).bfloat16()
        named = {"weight_profile": profile, "activation_profile": profile, "matmul": matmul}
        assert prepare_model(block, recipe(**named), npu_backend).matmul.name == matmul
        x = torch.randn(2, 6, width, generator=torch.Generator().manual_seed(1)).bfloat16()
        y = block["layers"][0](x.requires_grad_())
        y.float().sum().backward()
        found[matmul] = (y.detach().float(), x.grad.float())
    for a, b, room in zip(*found.values(), (output_error, gradient_error), strict=True):
        assert (a - b).norm() <= room * b.norm()


def quantized_product(x: Tensor, layer: Any, profile: str) -> Tensor:
    """float64 product of the values that the codes stand for."""
    weight = dequantize(layer.packed_weight().unpack(), torch.float32).double()
    y = dequantize(quantize(x, profile), torch.float32).double() @ weight.t()
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("lora_input", ["full", "quantised"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_step_equals_the_reference(
    npu_backend: NpuBackend, lora_input: str, checkpointing: bool
) -> None:
    """Loss and every adapter's gradient: emulated bit for bit, fused up to fp32 summation."""
    named = {"lora_input": lora_input}
    want_loss, want = lora_step(EmulationBackend(), checkpointing, **named)
    loss, found = lora_step(npu_backend, checkpointing, matmul="emulated", **named)
    assert torch.equal(loss, want_loss) and list(found) == list(want)
    assert all(torch.equal(found[name], want[name]) for name in want)
    loss, found = lora_step(npu_backend, checkpointing, matmul="fused", **named)
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-3)
    for name, gradient in want.items():
        assert gradient.abs().max() > 0
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def lora_step(
    backend: Any, checkpointing: bool, **changes: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and adapter gradients of one step of a small model with live adapters."""
    quantized = model(backend, **changes)
    adapted = add_lora(quantized.model, LoraSection(r=4, alpha=8), seed=0).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    with quantized.phase("training"):
        loss = adapted(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
    quantized.audit.verify(adapted)
    return loss.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def without_bias(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model-without-bias")
    return save_tiny_checkpoint(folder, dtype=torch.bfloat16, family="llama")


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "write_report", lambda folder: folder / "report.html")


def run(
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    folder: Path,
    backend: Any,
    method: str,
    matmul: str,
) -> list[dict[str, Any]]:
    """The metrics of a run whose backend is ``backend``."""
    selection = Selection(torch.device("cpu"), backend, f"test: {backend.describe()}")
    monkeypatch.setattr(run_module, "select", lambda *arguments: selection)
    config = configuration(
        checkpoint,
        quant={"matmul": matmul},
        train={"method": method, "steps": 2},
        noise={"apply_during": "rollout" if method == "dapo" else "training"},
        evaluation={"problems": 4, "baselines": []},
    )
    carry_out(config, folder)
    audit = json.loads((folder / "audit.json").read_text())
    assert audit["verdict"] == "pass"
    assert audit["computed_by"].get("soc") == backend.describe().get("soc")
    assert audit["computed_by"]["matmul"] == ("fused" if matmul == "fused" else "emulated")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["device"] == "cpu"
    assert ("stubbed" in environment["reason"]) is (backend.name == "npu")
    found = metrics(folder)
    assert len([line for line in found if "loss" in line]) == 2
    return found


@pytest.mark.parametrize("method", ["dapo", "sft"])
def test_a_run_on_the_npu_code_has_the_losses_of_the_emulation(
    npu_backend: NpuBackend,
    method: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rollout, training and evaluation; every number of every step, bit for bit."""
    reference = EmulationBackend()
    want = run(monkeypatch, checkpoint, tmp_path / "reference", reference, method, "auto")
    found = run(monkeypatch, checkpoint, tmp_path / "npu", npu_backend, method, "emulated")
    assert found == want
    if method == "sft":  # with rollouts, another last bit may become another token
        fused = run(monkeypatch, checkpoint, tmp_path / "fused", npu_backend, method, "fused")
        assert losses(fused) == pytest.approx(losses(want), rel=2e-3)


def test_a_fused_step_that_sums_like_the_emulation_has_its_loss(
    npu_backend: NpuBackend, without_bias: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of summation is all in which the fused forward pass may differ: with the
    emulation's own order inside the operator, rollout and losses of the first DAPO step are equal
    bit for bit. (Its gradients are added up in another order, layer by layer instead of once for
    all readers of an input.)"""
    monkeypatch.setattr(op_kernels, "multiply", multiply_in_16_bits)
    reference = EmulationBackend()
    want = run(monkeypatch, without_bias, tmp_path / "reference", reference, "dapo", "auto")[0]
    found = run(monkeypatch, without_bias, tmp_path / "fused", npu_backend, "dapo", "fused")[0]
    assert found.pop("grad_norm") == pytest.approx(want.pop("grad_norm"), rel=1e-3)
    assert found == want


def multiply_in_16_bits(left: Tensor, right: Tensor) -> Tensor:
    weight = right.t().contiguous().bfloat16()
    return torch.nn.functional.linear(left.contiguous().bfloat16(), weight).float()


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def test_the_committed_recording_is_what_the_backend_answers_now(npu_backend: NpuBackend) -> None:
    """Else make it anew: ``python -m tests.contract.record`` in this environment."""
    now = record(npu_backend)
    committed = read_recording(FOLDER / f"{name_of(now)}.json")
    assert committed.stubbed and now.stubbed
    a, b = ({(e.case, e.profile): e.digests for e in r.entries} for r in (committed, now))
    assert list(a) == list(b)
    for case, profile in a:  # dual-level sums are exact in no case, so the machine may show
        if case.startswith("exact") and profile == "ascend950-dual":
            continue
        assert a[case, profile] == b[case, profile], case
