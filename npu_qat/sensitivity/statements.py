"""What a scan found, in sentences: what a reader must not miss, and what a number is not."""

from __future__ import annotations

from collections.abc import Sequence

from npu_qat.sensitivity.loss import LossReport
from npu_qat.sensitivity.scanner import LinearScan, Scan

NORM_READERS = (
    *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    *("qkv_proj", "gate_up_proj"),  # the same in one, as Phi-3 has them
)
"""Linears that read a norm's output: a channel of theirs is a channel of the hidden state."""

_DOMINATED = 0.5


def statements(scan: Scan) -> list[str]:
    """The sentences, the most telling first."""
    found = []
    if scan.loss is not None and scan.loss.linears:
        found.append(_significance(scan.loss))
        found.append(_additivity(scan.loss))
    found += _outliers(scan.linears)
    found += _dominated(scan.linears)
    found += _misleading(scan.linears)
    found.append(scan.growth.statement)
    return found


def _significance(loss: LossReport) -> str:
    """How many linears clearly add to the loss; all and none are said plainly."""
    if loss.gap.standard_error is None:
        return "One text has no standard error: what adds to the loss here may be chance."
    clear = [path for path, c in loss.linears.items() if c.one_at_a_time.clear]
    total = len(loss.linears)
    rule = "alone, by more than two standard errors"
    if not clear:
        return f"None of the {total} linears clearly adds to the loss {rule}: use more texts."
    if len(clear) == total:
        return f"Every one of the {total} linears adds to the loss {rule}."
    worst = max(clear, key=lambda path: loss.linears[path].one_at_a_time.mean)
    return f"{len(clear)} of {total} linears clearly add to the loss ({rule}), most {worst}."


def _additivity(loss: LossReport) -> str:
    alone = sum(c.one_at_a_time.mean for c in loss.linears.values())
    return f"One at a time the linears add {alone:+.4f} nats a token, together {loss.gap}."


def _outliers(linears: Sequence[LinearScan]) -> list[str]:
    """The hidden-state channel that is an outlier in the most linears."""
    readers = [s for s in linears if s.kind in NORM_READERS and s.input]
    where: dict[int, list[tuple[LinearScan, float]]] = {}
    for linear in readers:
        for outlier in linear.input.outlier_channels if linear.input else []:
            where.setdefault(outlier.channel, []).append((linear, outlier.ratio))
    if not where:
        return []
    channel = max(where, key=lambda c: (len(where[c]), max(ratio for _, ratio in where[c])))
    hits = where[channel]
    layers = sorted({s.layer for s, _ in hits if s.layer is not None})
    return [
        f"Channel {channel} of the hidden state is an outlier in {len(hits)} of the {len(readers)} "
        f"linears that read a norm ({_layers(layers)}), up to "
        f"{max(ratio for _, ratio in hits):.0f} times the median channel."
    ]


def _layers(indices: Sequence[int]) -> str:
    return f"layer{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"


def _dominated(linears: Sequence[LinearScan]) -> list[str]:
    hit = [s for s in linears if s.input and s.input.largest_row_energy > _DOMINATED]
    if not hit:
        return []
    return [
        f"In the inputs of {len(hit)} linears one token holds more than half of all energy (first "
        f"{hit[0].path}): the pooled ratio there is a statement about that token."
    ]


def _misleading(linears: Sequence[LinearScan]) -> list[str]:
    inputs = [s for s in linears if s.input]
    hit = [s for s in inputs if s.input and s.input.relative_error_misleading]
    if not hit:
        return []
    return [
        f"The mean relative error of elements misleads in {len(hit)} of {len(inputs)} inputs: it "
        "mostly counts elements that became zero and hold almost no energy."
    ]
