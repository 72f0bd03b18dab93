"""Whether a run's noise was what its schedule asked for: checks for the audit.

What is expected comes from the schedule, never from the records that are being checked: noise that
was never added leaves no record that could look wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from npu_qat.layers.audit import Check
from npu_qat.noise.injector import AQN, NoiseRecord


def as_row(record: NoiseRecord) -> dict[str, Any]:
    """What metrics and ``audit.json`` keep of one ``applied`` block; steps count from 1 there."""
    return {
        "step": record.step + 1,
        "phase": record.phase,
        "sigma": record.sigma,
        "norms_changed": record.norms_changed,
        "sigma_realized": record.sigma_realized,
        "norms_expected": record.norms_expected,
        "rms_realized": record.rms_realized,
        "inert": record.inert,
    }


def noise_check(rows: Iterable[Mapping[str, Any]], phase: str, due: Collection[int]) -> Check:
    """Whether the blocks of ``phase`` changed every norm in the steps ``due`` and in no other.

    Args:
        rows: as ``as_row`` makes them, of any phase.
        phase: the phase that is checked.
        due: steps (from 1) in which the schedule has noise.
    """
    of_phase = {row["step"]: row for row in rows if row["phase"] == phase}
    reached = {
        step
        for step, row in of_phase.items()
        if row["sigma"] > 0 and (row["inert"] or row["norms_changed"] == row["norms_expected"] > 0)
    }
    missing = sorted(set(due) - reached)
    stray = sorted(reached - set(due))
    detail = f", not in step {missing[0]}" if missing else f", also in {stray[0]}" if stray else ""
    return Check(
        f"noise reaches the norms in {phase}",
        f"{len(due)} steps, by the schedule",
        f"{len(reached)} steps{detail}",
        not missing and not stray,
    )


def multiplier_checks(aqn: AQN) -> list[Check]:
    """Whether each decoder layer gets its multiple of the noise; for a run with multipliers."""
    checks = []
    for found in aqn.check_multipliers():
        off = found.off
        shown = {name: f"{value:.3g}" for name, value in found.expected.items()}
        measured = {name: f"{value:.3g}" for name, value in found.measured.items()}
        checks.append(
            Check(
                f"noise multipliers by layer from step {found.first_step + 1} on",
                ", ".join(f"{name}: {value}" for name, value in shown.items()),
                ", ".join(f"{name}: {value}" for name, value in measured.items())
                + (f"; off: {', '.join(off)}" if off else ""),
                not off,
            )
        )
    return checks
