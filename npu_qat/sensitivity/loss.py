"""What each part of a model adds to the loss when it is computed in 4 bits.

Errors of tensors say how far off a linear is, not whether the model minds. With ``L(S)`` the mean
negative log-likelihood of the completions when exactly the linears of the set ``S`` are quantised,
a unit ``u`` (a linear, a decoder layer, or a kind such as ``down_proj``) contributes

* **one at a time**: ``L({u}) - L({})``, what it costs alone, in an otherwise 16-bit model;
* **leave one out**: ``L(all) - L(all - {u})``, what would be won back by leaving it in 16 bits.

The two agree where errors add up, and differ where one error hides or amplifies another. The
differences are paired by text, so their standard errors are far smaller than those of the losses.

Cost: two forward passes over all texts a unit. Batches are padded on the left, so that all
completions end together and only their logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npu_qat.sensitivity.texts import Text
from npu_qat.sensitivity.twins import LinearTap

CLEAR = 2.0
"""Standard errors above which a contribution to the loss is called clear."""


@dataclass(frozen=True)
class Contribution:
    """Change of the loss in nats a token, mean over texts, with its standard error.

    The standard error is None for a single text, which says nothing about others.
    """

    mean: float
    standard_error: float | None

    @property
    def clear(self) -> bool:
        """Whether the loss rises by more than ``CLEAR`` standard errors."""
        return self.standard_error is not None and self.mean > CLEAR * self.standard_error

    def __str__(self) -> str:
        scatter = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.mean:+.4f}{scatter}"


@dataclass(frozen=True)
class LossContribution:
    """What one unit adds to the loss; see the module docstring."""

    one_at_a_time: Contribution
    leave_one_out: Contribution


@dataclass(frozen=True)
class LossReport:
    """``clean`` and ``quantized``: the loss with none and with all linears in 4 bits (nats a token,
    mean over texts). The contributions are by linear path, by decoder layer, and by kind."""

    clean: float
    quantized: float
    gap: Contribution
    linears: dict[str, LossContribution]
    layers: dict[int, LossContribution]
    kinds: dict[str, LossContribution]


class LossMeter:
    """The loss of ``model`` on ``texts`` with any subset of its linears quantised.

    Args:
        model: in evaluation mode, without gradients (``twins.unchanged``).
        linears: path -> linear of the model.
        twins: path -> quantised layer.
        texts: what is read and scored.
        batch_size: texts computed together.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        twins: Mapping[str, nn.Module],
        texts: Sequence[Text],
        batch_size: int,
    ) -> None:
        self._model, self._linears, self._twins = model, linears, twins
        device = next(model.parameters()).device
        self._batches = [
            _Batch(texts[i : i + batch_size], device) for i in range(0, len(texts), batch_size)
        ]

    def losses(self, quantized: set[str]) -> Tensor:
        """fp64 [texts]: mean negative log-likelihood of each completion's tokens."""

        def handle(path: str, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            return self._twins[path](x) if path in quantized else compute()

        with LinearTap(self._linears, handle):
            return torch.cat([batch.losses(self._model) for batch in self._batches])

    def contribution(self, unit: set[str], clean: Tensor, quantized: Tensor) -> LossContribution:
        """Both contributions of ``unit``, given the losses of the two extremes."""
        alone = self.losses(unit)
        without = self.losses(set(self._linears) - unit)
        return LossContribution(_mean(alone - clean), _mean(quantized - without))


def measure_losses(
    meter: LossMeter,
    linears: Sequence[str],
    layers: Mapping[int, set[str]],
    kinds: Mapping[str, set[str]],
    progress: Callable[[str, int, int], None],
    *,
    by_linear: bool,
) -> LossReport:
    """The contributions of ``layers``, ``kinds`` and, if asked for, of each of ``linears``.

    Raises ``ValueError`` if a loss is NaN or infinite, with none or with all of them in 4 bits.
    """
    clean, quantized = meter.losses(set()), meter.losses(set(linears))
    for losses, state in ((clean, "in 16 bits"), (quantized, "with every linear in 4 bits")):
        if not bool(losses.isfinite().all()):
            at = int((~losses.isfinite()).nonzero()[0])
            raise ValueError(f"the loss of text {at + 1} is {float(losses[at])} {state}")
    alone = linears if by_linear else ()
    units: list[tuple[Any, set[str]]] = [
        *((path, {path}) for path in alone),
        *layers.items(),
        *kinds.items(),
    ]
    found: dict[Any, LossContribution] = {}
    for done, (name, unit) in enumerate(units):
        found[name] = meter.contribution(unit, clean, quantized)
        progress("loss", done + 1, len(units))
    return LossReport(
        clean=float(clean.mean()),
        quantized=float(quantized.mean()),
        gap=_mean(quantized - clean),
        linears={path: found[path] for path in alone},
        layers={index: found[index] for index in layers},
        kinds={kind: found[kind] for kind in kinds},
    )


def _mean(differences: Tensor) -> Contribution:
    n = len(differences)
    spread = float(differences.std()) / n**0.5 if n > 1 else None
    return Contribution(float(differences.mean()), spread)


class _Batch:
    """Texts of different lengths, padded on the left."""

    def __init__(self, texts: Sequence[Text], device: torch.device) -> None:
        longest = max(len(t.tokens) for t in texts)
        self._completions = [torch.tensor(t.completion, device=device) for t in texts]
        self._keep = max(len(t.completion) for t in texts) + 1
        padded = [[0] * (longest - len(t.tokens)) + t.tokens for t in texts]
        mask = [[0] * (longest - len(t.tokens)) + [1] * len(t.tokens) for t in texts]
        self._ids = torch.tensor(padded, device=device)
        self._mask = torch.tensor(mask, device=device)
        # Padding must not move a text's positions.
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)

    def losses(self, model: nn.Module) -> Tensor:
        logits = model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            use_cache=False,
            logits_to_keep=self._keep,
        ).logits
        rows = []
        for row, completion in zip(logits, self._completions, strict=True):
            n = len(completion)
            # The logits at position t predict token t + 1; the last position predicts nothing.
            logp = row[-n - 1 : -1].float().log_softmax(-1)
            rows.append(-logp.gather(-1, completion[:, None]).double().mean())
        return torch.stack(rows).cpu()
