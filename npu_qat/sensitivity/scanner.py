"""The scan: every linear that a recipe quantises, its errors and what they cost.

Texts go through the 16-bit model one after another, and at each linear the clean input meets the
quantised twin (``twins.py``). Of what passes only statistics are kept (``metrics.py``): one or two
numbers a token and a handful of sums a linear, never the activations. So the memory of a scan is
that of the model, of its quantised twin, and of one text.

What is measured for each linear is what the recipe quantises: its weight, its input, its output;
and, for every recipe, the error of its result ``y``. Then come the hidden states behind each
decoder layer with everything quantised (``depth.py``), and the loss (``loss.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npu_qat.backends import Backend
from npu_qat.config import Recipe
from npu_qat.config.paths import layer_index
from npu_qat.layers import QuantizedModel, QuantLinear
from npu_qat.layers.rotation import rotate_input, rotate_weight
from npu_qat.numerics import QuantizedTensor, quantize
from npu_qat.sensitivity.depth import Growth, compare_with_plan, fit_growth
from npu_qat.sensitivity.loss import LossMeter, LossReport, measure_losses
from npu_qat.sensitivity.metrics import (
    ErrorSummary,
    QuantizationErrors,
    QuantizationSummary,
    RowErrors,
)
from npu_qat.sensitivity.texts import Text, check_texts
from npu_qat.sensitivity.twins import (
    LinearTap,
    decoder_layers,
    linears_of,
    make_twins,
    unchanged,
    watch_outputs,
)

SCHEMA = "npu-qat-scan/1"
LOSS_UNITS = ("none", "layer", "linear")

Progress = Callable[[str, int, int], None]
"""(stage, done, total)"""


@dataclass(frozen=True)
class LinearScan:
    """One linear. ``weight``, ``input`` and ``output_rounding`` are None where the recipe leaves
    them in 16 bits; ``output`` compares the result with the 16-bit one in any case."""

    path: str
    layer: int | None
    kind: str
    mode: str
    weight: QuantizationSummary | None
    input: QuantizationSummary | None
    output: ErrorSummary
    output_rounding: QuantizationSummary | None


@dataclass(frozen=True)
class Scan:
    """A finished scan.

    Attributes:
        recipe: what was quantised, as the ``quant`` section.
        texts, tokens, scored_tokens: how much was read, and how much of it the loss counts.
        linears: in the model's order.
        accumulated: decoder layer -> relative error of the hidden state behind it.
        growth: the accumulated error over depth.
        plan: the experiment plan's table beside the measurement.
        loss: None if it was not asked for.
        audit: verdict and checks of the quantised layers that were used.
    """

    recipe: dict[str, Any]
    texts: int
    tokens: int
    scored_tokens: int
    linears: list[LinearScan]
    accumulated: dict[int, ErrorSummary]
    growth: Growth
    plan: list[dict[str, object]]
    loss: LossReport | None
    audit: dict[str, Any]

    @property
    def layers(self) -> list[int]:
        """The decoder layers with a quantised linear."""
        return sorted({s.layer for s in self.linears if s.layer is not None})

    def as_dict(self) -> dict[str, Any]:
        """In JSON types; layer indices become texts."""
        data = asdict(self)
        data["accumulated"] = {str(i): s for i, s in data["accumulated"].items()}
        if data["loss"] is not None:
            data["loss"]["layers"] = {str(i): c for i, c in data["loss"]["layers"].items()}
        return {"schema": SCHEMA, **data}


def scan(
    model: nn.Module,
    texts: Sequence[Text],
    recipe: Recipe,
    *,
    backend: Backend | None = None,
    loss: str = "linear",
    batch_size: int = 8,
    progress: Progress = lambda stage, done, total: None,
) -> Scan:
    """Measure what ``recipe`` does to ``model`` on ``texts``. The model is not changed.

    Args:
        model: a Hugging Face decoder (Qwen2, Qwen3, Llama and the like) in 16 or 32 bits.
        texts: token ids with a completion to score.
        recipe: profiles, injection point, exclusions; phases and gradients play no part.
        backend: who computes; default the reference.
        loss: ``none``, ``layer`` (decoder layers and kinds), or ``linear`` (each linear as well).
        batch_size: texts computed together for the loss.
        progress: called as it goes on.

    Raises:
        ValueError: no texts, one that is longer than the model's context, an unknown ``loss``, a
            recipe that does not fit the model, or NaN or Inf in what the model computes.
        AuditError: a quantised layer computed something else than the reference arithmetic.
    """
    check_texts(texts, model)
    if loss not in LOSS_UNITS:
        raise ValueError(f"loss is one of {', '.join(LOSS_UNITS)}, not {loss!r}")
    recipe = recipe.model_copy(update={"apply_during": "both", "lora_input": "full"})
    handle = make_twins(model, recipe, backend)
    return _Scanner(model, texts, handle, batch_size, progress).scan(loss)


class _Scanner:
    """The stages of one scan."""

    def __init__(
        self,
        model: nn.Module,
        texts: Sequence[Text],
        handle: QuantizedModel,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self.model, self.texts, self.handle = model, texts, handle
        self.batch_size, self.progress = batch_size, progress
        self.recipe, self.twins = handle.recipe, handle.layers
        self.linears = linears_of(model, handle)
        self.layers = decoder_layers(model, [planned.path for planned in handle.plan])
        if not any(layer_index(path) is not None for path in self.twins):
            raise ValueError(
                "a scan needs quantised linears in numbered decoder layers (as model.layers.0...); "
                f"this model has {next(iter(self.twins))} and the like"
            )
        self.device = next(model.parameters()).device

    def scan(self, loss: str) -> Scan:
        with unchanged(self.model):
            if self.handle.needs_calibration:
                self.handle.calibrate(lambda _: self._calibrate())
            linears, accumulated = self._measure()
            report = None if loss == "none" else self._losses(by_linear=loss == "linear")
        # Layers before the first quantised one have no error, and a growth has no use for them.
        first = min(index for path in self.twins if (index := layer_index(path)) is not None)
        errors = [s.relative_error for index, s in accumulated.items() if index >= first]
        self.handle.audit.verify()
        return Scan(
            recipe=self.recipe.model_dump(mode="json"),
            texts=len(self.texts),
            tokens=sum(len(text.tokens) for text in self.texts),
            scored_tokens=sum(len(text.completion) for text in self.texts),
            linears=linears,
            accumulated=accumulated,
            growth=fit_growth(errors),
            plan=compare_with_plan(errors_by_layer(linears, accumulated)),
            loss=report,
            audit={
                "verdict": "pass",
                "checks": [asdict(check) for check in self.handle.audit.checks()],
            },
        )

    def _forward(self, text: Text) -> None:
        # The head of a large vocabulary is the dearest linear, and only one position needs it.
        ids = torch.tensor([text.tokens], device=self.device)
        self.model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def _calibrate(self) -> None:
        def handle(path: str, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            self.twins[path](x)  # records the largest magnitude of its input
            return compute()

        with LinearTap(self.linears, handle):
            for text in self.texts:
                self._forward(text)

    def _measure(self) -> tuple[list[LinearScan], dict[int, ErrorSummary]]:
        """The clean pass with its measurements, and the quantised pass behind it, text by text."""
        meters = {path: _LinearMeter(twin) for path, twin in self.twins.items()}
        drift = {index: RowErrors() for index in self.layers}
        hidden: dict[int, Tensor] = {}

        def measure(path: str, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            y = compute()
            meters[path].add(x, y)
            return y

        def quantized(path: str, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            y: Tensor = self.twins[path](x)
            return y

        def compare(index: int, state: Tensor) -> None:
            with _about(f"the hidden state behind layer {index}"):
                drift[index].add(hidden[index], state)

        for done, text in enumerate(self.texts):
            with watch_outputs(self.layers, hidden.__setitem__), LinearTap(self.linears, measure):
                self._forward(text)
            with (
                watch_outputs(self.layers, compare),
                LinearTap(self.linears, quantized),
            ):
                self._forward(text)
            self.progress("errors", done + 1, len(self.texts))
        self._check_all_ran(meters)
        linears = [
            meters[planned.path].finish(self.linears[planned.path], planned.layer, planned.mode)
            for planned in self.handle.plan
            if planned.path in meters
        ]
        accumulated = {}
        for index, errors in drift.items():
            with _about(f"the hidden state behind layer {index}"):
                accumulated[index] = errors.summary()
        return linears, accumulated

    def _check_all_ran(self, meters: dict[str, _LinearMeter]) -> None:
        silent = [path for path, meter in meters.items() if not meter.calls]
        if silent:
            raise ValueError(
                f"{len(silent)} linears were never called on these texts, first {silent[0]}: the "
                "model computes them without torch.nn.functional.linear, or routes around them; "
                "leave them out with quant.exclude"
            )

    def _losses(self, *, by_linear: bool) -> LossReport:
        meter = LossMeter(self.model, self.linears, self.twins, self.texts, self.batch_size)
        layers: dict[int, set[str]] = {}
        kinds: dict[str, set[str]] = {}
        for path in self.twins:
            if (index := layer_index(path)) is not None:
                layers.setdefault(index, set()).add(path)
            kinds.setdefault(kind_of(path), set()).add(path)
        return measure_losses(
            meter, list(self.twins), layers, kinds, self.progress, by_linear=by_linear
        )


class _LinearMeter:
    """Statistics of one linear, from its clean inputs and results."""

    def __init__(self, twin: QuantLinear) -> None:
        self._twin, self._recipe = twin, twin.state.recipe
        self.calls = 0
        self._input = QuantizationErrors()
        self._rounding = QuantizationErrors()
        self._output = RowErrors()

    def add(self, x: Tensor, y: Tensor) -> None:
        """``x`` [..., K] and the 16-bit result ``y`` [..., N]."""
        recipe = self._recipe
        self.calls += 1
        for tensor, name in ((x, "input"), (y, "result")):
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"the {name} of {self._twin.path} holds NaN or Inf in the 16-bit model: its "
                    "checkpoint is damaged, or these texts overflow it"
                )
        if recipe.quantizes_input:
            rotated = rotate_input(x) if recipe.rotates else x
            scale = getattr(self._twin, "input_tensor_scale", None)
            self._input.add(rotated, _codes(rotated, recipe.activation_profile, scale))
        approximate = self._twin(x)
        with _about(f"the 4-bit result of {self._twin.path}"):
            self._output.add(y, approximate)
        if recipe.quantizes_output:
            self._rounding.add(y, _codes(y, recipe.activation_profile))

    def finish(self, linear: nn.Linear, layer: int | None, mode: str) -> LinearScan:
        recipe = self._recipe
        with _about(f"{self._twin.path} (quant.exclude can leave it out)"):
            return LinearScan(
                path=self._twin.path,
                layer=layer,
                kind=kind_of(self._twin.path),
                mode=mode,
                weight=self._weight(linear) if recipe.quantizes_weight else None,
                input=self._input.summary() if recipe.quantizes_input else None,
                output=self._output.summary(),
                output_rounding=self._rounding.summary() if recipe.quantizes_output else None,
            )

    def _weight(self, linear: nn.Linear) -> QuantizationSummary:
        weight = linear.weight.detach()
        if self._recipe.rotates:
            weight = rotate_weight(weight)
        scale = getattr(self._twin, "weight_tensor_scale", None)
        errors = QuantizationErrors()
        errors.add(
            weight, _codes(weight, self._recipe.weight_profile, scale, self._twin.weight_axis)
        )
        return errors.summary()


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Name what an error inside is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def kind_of(path: str) -> str:
    """The last segment of a path: ``q_proj``, ``down_proj``."""
    return path.rpartition(".")[2]


def _codes(
    x: Tensor, profile: str, tensor_scale: Tensor | None = None, axis: int = -1
) -> QuantizedTensor:
    return quantize(x, profile, axis, tensor_scale=tensor_scale)


def errors_by_layer(
    linears: Sequence[LinearScan], accumulated: dict[int, ErrorSummary]
) -> dict[int, dict[str, float]]:
    """What the plan's table has a column for, by decoder layer.

    ``weight`` and ``activation`` are means of ``mean(|e| / |x|)``, the plan's unit, over the
    layer's linears (0 where they stay in 16 bits); ``accumulated`` is the median token's relative
    error.
    """
    rows = {}
    for index, summary in accumulated.items():
        inside = [s for s in linears if s.layer == index]
        weights = [s.weight.relative_error_elementwise for s in inside if s.weight]
        rounded = [s.input or s.output_rounding for s in inside]
        inputs = [s.relative_error_elementwise for s in rounded if s]
        rows[index] = {
            "weight": sum(weights) / len(weights) if weights else 0.0,
            "activation": sum(inputs) / len(inputs) if inputs else 0.0,
            "accumulated": summary.relative_error,
        }
    return rows
