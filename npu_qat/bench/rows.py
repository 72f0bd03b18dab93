"""What a benchmark reports: rows with fixed names, and the machine that they were measured on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npu_qat.backends import Selection
from npu_qat.bench.timing import Call, Clock, Times

Note = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One measurement beside its baseline.

    Attributes:
        name: ``<benchmark>/<who>/<what>``; the same on every machine and in every version.
        value, baseline: medians in ``unit``.
        unit: ``ms`` or ``bytes``.
        details: what else was seen (the smallest sample, tokens a second, peak memory).
    """

    name: str
    value: float
    baseline: float
    unit: str = "ms"
    details: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Against the baseline: below 1 is faster, or smaller."""
        return self.value / self.baseline

    def as_dict(self) -> dict[str, Any]:
        """``{"name", "ms", "baseline_ms", "ratio"}`` (or ``bytes``), and the details."""
        return {
            "name": self.name,
            self.unit: round(self.value, 5),
            f"baseline_{self.unit}": round(self.baseline, 5),
            "ratio": round(self.ratio, 4),
            **{key: round(value, 4) for key, value in self.details.items()},
        }

    @classmethod
    def of_times(cls, name: str, times: Times, baseline: Times, **details: float) -> Row:
        """Medians, with the smallest samples among the details."""
        least = {"min_ms": times.least, "baseline_min_ms": baseline.least}
        return cls(name, times.median, baseline.median, details={**least, **details})


@dataclass(frozen=True)
class Setup:
    """What every benchmark is told.

    Attributes:
        selection: device and backend.
        clock: takes the times.
        quick: small shapes and few samples, to see that everything runs.
        peers: measure installed peers as well.
        note: prints a line to the user.
    """

    selection: Selection
    clock: Clock
    quick: bool = False
    peers: bool = False
    note: Note = print

    @property
    def on_gpu(self) -> bool:
        """Whether shapes are those of the 1.5B model: on a GPU, and on an NPU."""
        return self.selection.device.type != "cpu"


def working(calls: Mapping[str, Call], label: str, note: Note) -> dict[str, Call]:
    """Those of ``calls`` that run; of the others ``note`` hears why they are left out.

    Foreign code, and new hardware, fail in any way; the rest of a long benchmark shall not be lost.
    """
    found = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            lines = (str(error) or type(error).__name__).splitlines()
            note(f"{name} {label}: left out, it fails: {lines[0]}")
        else:
            found[name] = call
    return found


def write_json(path: Path, environment: dict[str, Any], rows: list[Row]) -> None:
    """``{"environment": .., "rows": [..]}``."""
    result = {"environment": environment, "rows": [row.as_dict() for row in rows]}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
