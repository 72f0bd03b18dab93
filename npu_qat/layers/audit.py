"""Evidence that the configuration happened.

Quantisation that is configured but never runs is the commonest defect of this field: hooks that do
not fire in a compiled engine, substring exclusions, noise that is zero, restored weights that stay
quantised. None of them raises. The audit therefore looks at tensors, not at settings:

* every planned layer is a ``QuantLinear`` inside the model that is trained, no other module is;
* the weight that the matmul uses equals decode(encode(W)) of the reference arithmetic, bit for
  bit, and its checksum never changes;
* the operand that enters the matmul equals the reference fake-quant of the layer's input, bit for
  bit, in every phase that ran (observed on the first pass of the phase); where the result is
  quantised, it equals the reference fake-quant of the matmul's result likewise;
* the result of the matmul is the product of that operand with that weight, up to the rounding of
  its dtype: a device that multiplies codes could read them in another order or under other scales;
* every layer quantised in the phases where the recipe says so, and in no other.

``verify()`` raises ``AuditError`` naming the layer and the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from npu_qat.layers.plan import PlannedLinear
from npu_qat.layers.quant_linear import QuantLinear, QuantState
from npu_qat.layers.rotation import INPUT_FACTOR, rotate_blocks, rotate_weight
from npu_qat.numerics import dequantize, fake_quant, quantize

# Rows of an input that are compared and measured; enough for statistics, cheap on real models.
SAMPLE_ROWS = 256
# Rows whose product is computed once more in fp32, and its largest relative error (Frobenius). A
# 16-bit result is off by about 2^-9; a block under its neighbour's scale by far more.
PRODUCT_ROWS = 16
PRODUCT_TOLERANCE = 0.02


class AuditError(RuntimeError):
    """A measurement contradicts the configuration."""


@dataclass
class Check:
    """One comparison of what was configured with what was measured."""

    name: str
    expected: str
    measured: str
    ok: bool


def raise_failed(checks: Sequence[Check]) -> None:
    """Raise ``AuditError`` for the first of ``checks`` that failed."""
    for check in checks:
        if not check.ok:
            raise AuditError(
                f"audit: {check.name}: expected {check.expected}, measured {check.measured}"
            )


@dataclass
class Measurement:
    """What one layer did, measured from its tensors. Relative errors are Frobenius norms."""

    weight_rel_error: float = 0.0
    weight_sqnr_db: float | None = None
    weight_mismatches: int = 0
    input_rel_error: dict[str, float] = field(default_factory=dict)
    operand_mismatches: dict[str, int] = field(default_factory=dict)
    product_rel_error: dict[str, float] = field(default_factory=dict)


def measure_weight(layer: QuantLinear, original: torch.Tensor) -> Measurement:
    """Compare the stored weight of ``layer`` with ``original`` [N, K] and with the reference."""
    recipe = layer.state.recipe
    if recipe.rotates:
        original = rotate_weight(original)
    reference = original
    if recipe.quantizes_weight:
        scale = getattr(layer, "weight_tensor_scale", None)
        q = quantize(original, recipe.weight_profile, layer.weight_axis, tensor_scale=scale)
        reference = dequantize(q, layer.operand_dtype, apply_tensor_scale=False)
    exact = original.float()
    error, norm = (exact - layer.weight.float()).norm().item(), exact.norm().item()
    return Measurement(
        weight_rel_error=error / norm if norm else 0.0,
        weight_sqnr_db=_decibel(norm, error),
        weight_mismatches=_differing(layer.weight_operand(), reference),
    )


class Audit:
    """Observes the layers of one prepared model; ``QuantizedModel.audit``."""

    def __init__(
        self,
        state: QuantState,
        plan: list[PlannedLinear],
        layers: Mapping[str, QuantLinear],
        measured: dict[str, Measurement],
    ) -> None:
        self._state, self._plan, self._layers = state, plan, layers
        self._measured = measured
        self._checksums = {path: _checksum(layer) for path, layer in layers.items()}
        self._extra: list[Check] = []
        state.observer = self._observe

    def add_checks(self, checks: Sequence[Check]) -> None:
        """Add checks made elsewhere (noise, gradients); those of the same name are replaced."""
        names = {check.name for check in checks}
        self._extra = [c for c in self._extra if c.name not in names] + list(checks)

    def _observe(
        self,
        layer: QuantLinear,
        x: torch.Tensor,
        operand: Callable[[], torch.Tensor],
        result: torch.Tensor,
        y: torch.Tensor,
    ) -> None:
        measured = self._measured[layer.path]
        phase = self._state.phase
        if phase in measured.operand_mismatches:
            return
        recipe = self._state.recipe
        with torch.no_grad():
            rows, seen = _sample(x), _sample(operand())
            if recipe.rotates:
                rows = rotate_blocks(rows, INPUT_FACTOR)
            mismatches = _differing(seen, self._reference_operand(layer, rows))
            expected = _sample(result)
            if recipe.quantizes_output:
                expected = fake_quant(expected, recipe.activation_profile)
            measured.operand_mismatches[phase] = mismatches + _differing(_sample(y), expected)
            measured.product_rel_error[phase] = _product_error(layer, seen, _sample(result))
            if recipe.quantizes_input:
                values = seen.float() * getattr(layer, "input_tensor_scale", 1.0)
                error, norm = (rows.float() - values).norm(), rows.float().norm()
                measured.input_rel_error[phase] = (error / norm).item() if norm else 0.0

    def _reference_operand(self, layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        recipe = self._state.recipe
        if not recipe.quantizes_input:
            return x
        scale = getattr(layer, "input_tensor_scale", None)
        q = quantize(x, recipe.activation_profile, tensor_scale=scale)
        return dequantize(q, layer.operand_dtype, apply_tensor_scale=False)

    # --- the verdict ------------------------------------------------------------------------

    def checks(self, model: nn.Module | None = None) -> list[Check]:
        """Every comparison, in the order of the module docstring, then those added."""
        checks = [] if model is None else [self._check_replaced(model)]
        checks += [
            self._check_weights(),
            self._check_unchanged(),
            self._check_operands(),
            self._check_products(),
            self._check_phases(),
        ]
        return checks + self._extra

    def verify(self, model: nn.Module | None = None) -> None:
        """Raise ``AuditError`` for the first check that failed.

        Args:
            model: the module that is trained (wrapped or not), to look for the layers inside it.
        """
        raise_failed(self.checks(model))

    def report(
        self, model: nn.Module | None = None, phases: Collection[str] = ()
    ) -> dict[str, Any]:
        """The content of ``audit.json``.

        Args:
            model: as in ``verify``.
            phases: those that must have run and been observed in every layer.
        """
        checks = self.checks(model)
        if phases:
            checks.append(self._check_observed(phases))
        return {
            "verdict": "pass" if all(c.ok for c in checks) else "fail",
            "computed_by": self._state.describe(),
            "checks": [asdict(c) for c in checks],
            "modules": [self._module_report(p) for p in self._plan],
        }

    def _module_report(self, planned: PlannedLinear) -> dict[str, Any]:
        row: dict[str, Any] = {
            "name": planned.path,
            "layer": planned.layer,
            "mode": planned.mode,
            "quantized": planned.quantized,
            "reason": planned.reason,
            "weight_profile": planned.weight_profile,
            "activation_profile": planned.activation_profile,
            "axis": planned.block_axis,
            "storage": planned.storage,
        }
        if planned.path in self._layers:
            layer, measured = self._layers[planned.path], self._measured[planned.path]
            errors = measured.input_rel_error
            error = next(
                (errors[p] for p in ("training", "rollout", "evaluation") if p in errors), None
            )
            row |= {
                "calls": dict(layer.calls.total),
                "quantized_calls": dict(layer.calls.quantized),
                "weight_rel_error": measured.weight_rel_error,
                "weight_sqnr_db": measured.weight_sqnr_db,
                "input_rel_error": error,
                "input_sqnr_db": None if error is None else _decibel(1.0, error),
                "operand_mismatches": measured.operand_mismatches,
                "product_rel_error": measured.product_rel_error,
            }
        return row

    def _check_replaced(self, model: nn.Module) -> Check:
        present = {id(m) for m in model.modules()}
        missing = [path for path, layer in self._layers.items() if id(layer) not in present]
        planned = sum(p.quantized for p in self._plan)
        known = {id(layer) for layer in self._layers.values()}
        others = [
            path
            for path, module in model.named_modules()
            if isinstance(module, QuantLinear) and id(module) not in known
        ]
        detail = f", missing {missing[0]}" if missing else ""
        detail += f", not planned {others[0]}" if others else ""
        return Check(
            "planned layers are in the trained model",
            f"{planned} quantised layers",
            f"{len(self._layers) - len(missing)}{detail}",
            not missing and not others and planned == len(self._layers),
        )

    def _check_weights(self) -> Check:
        wrong = [p for p, m in self._measured.items() if m.weight_mismatches]
        return Check(
            "stored weights equal the reference quantisation",
            "0 layers differ",
            f"{len(wrong)} layers differ" + (f", first {wrong[0]}" if wrong else ""),
            not wrong,
        )

    def _check_unchanged(self) -> Check:
        changed = [p for p, layer in self._layers.items() if _checksum(layer) != self._checksums[p]]
        return Check(
            "frozen weights never change",
            "0 changed",
            f"{len(changed)} changed" + (f", first {changed[0]}" if changed else ""),
            not changed,
        )

    def _check_operands(self) -> Check:
        wrong = [
            (path, phase, n)
            for path, m in self._measured.items()
            for phase, n in m.operand_mismatches.items()
            if n
        ]
        observed = sum(len(m.operand_mismatches) for m in self._measured.values())
        detail = f", first {wrong[0][0]} in {wrong[0][1]}: {wrong[0][2]} elements" if wrong else ""
        return Check(
            "quantised tensors equal the reference quantisation",
            "0 layers differ",
            f"{len(wrong)} of {observed} observations differ{detail}",
            not wrong,
        )

    def _check_products(self) -> Check:
        errors = [
            (error, path, phase)
            for path, m in self._measured.items()
            for phase, error in m.product_rel_error.items()
        ]
        worst, path, phase = max(errors, default=(0.0, "", ""))
        return Check(
            "products equal the reference matmul",
            f"relative error at most {PRODUCT_TOLERANCE}",
            f"{worst:.1e}" + (f" in {path} in {phase}" if path else ""),
            worst <= PRODUCT_TOLERANCE,
        )

    def _check_observed(self, phases: Collection[str]) -> Check:
        recipe = self._state.recipe
        active = sorted(p for p in phases if recipe.active_in(p))
        blind = [
            f"{path} in {phase}"
            for path, m in self._measured.items()
            for phase in active
            if phase not in m.operand_mismatches
        ]
        total = len(self._measured) * len(active)
        return Check(
            "every layer was observed in every phase",
            f"{total} observations in {', '.join(active)}",
            f"{total - len(blind)}" + (f", not {blind[0]}" if blind else ""),
            not blind and total > 0,
        )

    def _check_phases(self) -> Check:
        recipe = self._state.recipe
        ran = {phase for layer in self._layers.values() for phase in layer.calls.total}
        wrong = []
        for path, layer in self._layers.items():
            for phase in sorted(ran):
                total, quantized = layer.calls.total[phase], layer.calls.quantized[phase]
                expected = total if recipe.active_in(phase) else 0
                if total == 0 or quantized != expected:
                    wrong.append(f"{path} in {phase}: {quantized} of {total} calls quantised")
        return Check(
            "layers quantise in the configured phases",
            f"apply_during {recipe.apply_during}, evaluation always",
            wrong[0]
            if wrong
            else f"{len(self._layers)} layers in {', '.join(sorted(ran)) or 'no phase'}",
            not wrong,
        )


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])[:SAMPLE_ROWS]


def _product_error(layer: QuantLinear, operand: torch.Tensor, result: torch.Tensor) -> float:
    """Relative error of the first rows of ``result`` [M, N] against the fp32 product; Inf if it is
    NaN or Inf where the product is not."""
    rows = operand[:PRODUCT_ROWS].float()
    exact = rows @ layer.weight_operand().float().T
    scale = layer.result_scale()
    exact = exact if scale is None else exact * scale
    exact = exact if layer.bias is None else exact + layer.bias.float()
    finite = torch.isfinite(exact)
    exact = exact.masked_fill(~finite, 0.0)
    found = result[:PRODUCT_ROWS].float().masked_fill(~finite, 0.0)
    error, norm = (found - exact).norm().item(), exact.norm().item()
    if not math.isfinite(error):
        return math.inf
    return error / norm if norm else error


def _differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """Number of elements that differ; NaN equals NaN."""
    return int(((a != b) & ~(a.isnan() & b.isnan())).sum())


# Everything of a layer that is frozen from the start.
_FROZEN = (
    "weight_image",
    "weight_packed",
    "weight_scale",
    "weight_level0",
    "weight_tensor_scale",
    "weight_full",
    "bias",
)


def _checksum(layer: QuantLinear) -> tuple[float, ...]:
    """Order-sensitive sums of the frozen tensors' bits; cheap, moved by any changed element."""
    sums = []
    for name in _FROZEN:
        tensor = getattr(layer, name, None)
        if tensor is None:
            continue
        data = tensor.detach()
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[data.element_size()]
        bits = data.contiguous().view(integer).flatten()
        positions = torch.arange(bits.numel(), device=bits.device) % 65521 + 1
        sums.append((bits.to(torch.int64) * positions).sum().item())
    return tuple(sums)


def _decibel(signal: float, error: float) -> float | None:
    """SQNR in dB; None where it is infinite or undefined."""
    return 20 * math.log10(signal / error) if signal > 0 and error > 0 else None
