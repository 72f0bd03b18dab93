"""From a 16-bit model to a quantised one, and the handle that stays with it.

``prepare_model`` freezes every parameter, replaces the planned linears by ``QuantLinear`` (module
by module, so that the 16-bit weight of one layer can be freed before the next is made) and returns
a ``QuantizedModel``: the switch between phases, the calibration, and the audit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from npu_qat.backends import Backend, EmulationBackend, EncodedInput
from npu_qat.config import Recipe
from npu_qat.layers.audit import Audit, Measurement, measure_weight
from npu_qat.layers.fusion import fuse
from npu_qat.layers.matmul import MatmulMode, choose_matmul
from npu_qat.layers.plan import PlannedLinear, plan_linears, sibling_groups
from npu_qat.layers.quant_linear import PHASES, QuantLinear, QuantState, SharedInput
from npu_qat.layers.rotation import rotate_weight
from npu_qat.numerics import nvfp4_tensor_scale
from npu_qat.numerics.profiles import get_profile


class QuantizedModel:
    """The handle of a prepared model.

    Attributes:
        model: the model itself, prepared in place.
        recipe: what was asked for.
        plan: what became of each linear.
        layers: the quantised layers by path.
        audit: measures what really happens; ``audit.verify()`` raises when it differs.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: list[PlannedLinear],
        state: QuantState,
        measured: dict[str, Measurement],
    ) -> None:
        self.model, self.plan, self._state = model, plan, state
        self.layers = {m.path: m for m in model.modules() if isinstance(m, QuantLinear)}
        self.audit = Audit(state, plan, self.layers, measured)

    @property
    def recipe(self) -> Recipe:
        return self._state.recipe

    @property
    def matmul(self) -> MatmulMode:
        """Who multiplies, and why."""
        return self._state.matmul

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run the body as ``training``, ``rollout`` or ``evaluation`` (the default phase).

        The backward pass belongs inside: gradient checkpointing recomputes the forward in it.
        """
        if name not in PHASES:
            raise ValueError(f"unknown phase {name!r}; choose {', '.join(PHASES)}")
        before, self._state.phase = self._state.phase, name
        try:
            yield
        finally:
            self._state.phase = before

    @contextmanager
    def inputs_in_16_bits(self) -> Iterator[None]:
        """Run the body with 4-bit weights and 16-bit inputs, for comparison: what a server computes
        that drops the quantisation of activations. Not counted by the audit."""
        before, self._state.calibrating = self._state.calibrating, True
        try:
            yield
        finally:
            self._state.calibrating = before

    @property
    def needs_calibration(self) -> bool:
        """Whether activations have a static tensor scale that is not set yet."""
        return any(
            bool(torch.isnan(layer.input_tensor_scale))
            for layer in self.layers.values()
            if hasattr(layer, "input_tensor_scale")
        )

    @torch.no_grad()
    def calibrate(self, run: Callable[[nn.Module], object]) -> None:
        """Set the static tensor scales of activations (NVFP4) from what ``run(model)`` feeds.

        Layers compute in 16 bits meanwhile and record the largest magnitude of their inputs;
        siblings that read one tensor share the result.
        """
        self._state.calibrating = True
        try:
            run(self.model)
        finally:
            self._state.calibrating = False
        for group in sibling_groups(self.layers):
            amax = max(self.layers[path].input_amax for path in group)
            if amax == 0.0:
                raise ValueError(f"calibration never reached {group[0]} or fed it only zeros")
            for path in group:
                layer = self.layers[path]
                layer.input_tensor_scale.copy_(nvfp4_tensor_scale(torch.tensor(amax)))


def prepare_model(
    model: nn.Module,
    recipe: Recipe,
    backend: Backend | None = None,
    device: torch.device | None = None,
) -> QuantizedModel:
    """Freeze ``model`` and replace its linears by quantised ones, in place.

    Args:
        model: a Hugging Face decoder or any module with ``nn.Linear`` layers, in 16 or 32 bits.
        recipe: what is quantised, and how.
        backend: who computes; default the emulation.
        device: where the prepared model shall be; default where ``model`` is. The linears go there
            group by group, so a model on the CPU whose weights are packed needs no room there for
            its 16-bit ones.

    Returns:
        The handle of the prepared model.

    Raises:
        ValueError: the model was prepared before or carries adapters, the plan is impossible (see
            ``plan_linears``), a weight holds NaN or Inf, or (``BackendUnavailable``) the backend
            does not compute the recipe's activation profile or its fused matmul.
    """
    if any(isinstance(m, QuantLinear) for m in model.modules()):
        raise ValueError("the model is prepared already; load it anew to change the recipe")
    if any(type(m).__module__.startswith("peft.") for m in model.modules()):
        raise ValueError("the model carries adapters; prepare it first, add adapters afterwards")
    plan = plan_linears(model, recipe)
    backend = backend or EmulationBackend()
    state = QuantState(recipe, backend, matmul=choose_matmul(recipe, backend, plan))
    chosen = [planned.path for planned in plan if planned.quantized]
    for path in chosen:
        if not torch.isfinite(_linear(model, path).weight).all():
            raise ValueError(f"{path}.weight holds NaN or Inf; the checkpoint is damaged")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    measured: dict[str, Measurement] = {}
    for group in sibling_groups(chosen):
        measured |= _replace_group(model, group, state, device)
    if device is not None:
        model.to(device)
    fuse(model, state)
    return QuantizedModel(model, plan, state, measured)


def _replace_group(
    model: nn.Module, group: tuple[str, ...], state: QuantState, device: torch.device | None
) -> dict[str, Measurement]:
    originals = [_linear(model, path) for path in group]
    if device is not None:
        originals = [linear.to(device) for linear in originals]
    linears = [_folded(linear) if state.recipe.rotates else linear for linear in originals]
    amax = None
    if get_profile(state.recipe.weight_profile).tensor_scale:
        amax = torch.stack(
            [linear.weight.detach().abs().amax().float() for linear in linears]
        ).amax()
    # LoRA on the quantised input reads it once more in each layer; in fused mode it is the only
    # one that reads values, decoded once from the codes.
    lora_reads = state.recipe.lora_input == "quantised"
    fused = state.matmul.fused
    shared: SharedInput[torch.Tensor] = SharedInput(len(group) * (lora_reads + (not fused)))
    encoded: SharedInput[EncodedInput] = SharedInput(len(group) + lora_reads)
    rotated: SharedInput[torch.Tensor] = SharedInput(len(group))
    measured = {}
    for path, original, linear in zip(group, originals, linears, strict=True):
        layer = QuantLinear(linear, path, state, shared, amax, encoded, rotated)
        measured[path] = measure_weight(layer, original.weight.detach())
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return measured


def _folded(linear: nn.Linear) -> nn.Linear:
    """The linear that gives on a rotated input what ``linear`` gives on the input itself."""
    with torch.device("meta"):
        folded = nn.Linear(linear.in_features, linear.out_features, bias=False)
    folded.weight = nn.Parameter(rotate_weight(linear.weight.detach()), False)
    folded.bias = linear.bias
    return folded


def _linear(model: nn.Module, path: str) -> nn.Linear:
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear
