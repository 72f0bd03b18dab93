"""What was measured of a device and its host, as far as step times depend on it.

Numbers come from ``calibration.py``, which fits them to some measured rows and reports the error on
the others. The ones that this package ships were measured on NVIDIA H100 GPUs
(``docs/results/scaling``); for other devices they are an assumption, and a plan says so.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[1] / "assets" / "calibration" / "h100.json"


@dataclass(frozen=True)
class Efficiency:
    """One number for each kind of work (``steps.py`` has the formulas).

    Attributes:
        matmul: share of the peak that matmuls reach.
        activation_moves: times a saved byte moves through memory in forward and backward.
        logit_moves: the same for a byte of fp32 logits: counted, not fitted (``calibration.py``).
        forward_host_seconds, backward_host_seconds: of Python and launches, a layer and pass.
        adapter_step_seconds: of the optimiser, an adapter tensor.
        zero3_layer_seconds: of stage 3's hooks, a layer and pass; None: not measured.
        link: share of the link's rate that collectives reach.
        decode_weight_moves, decode_cache_moves, decode_logit_moves: times a byte is moved in a
            decoding step.
        decode_layer_seconds: of a decoding step's kernels that move little, a layer.
        reserved: bytes of the allocator's pool over bytes of tensors.
    """

    matmul: float
    activation_moves: float
    logit_moves: float
    forward_host_seconds: float
    backward_host_seconds: float
    adapter_step_seconds: float
    zero3_layer_seconds: float | None
    link: float
    decode_weight_moves: float
    decode_cache_moves: float
    decode_logit_moves: float
    decode_layer_seconds: float
    reserved: float


@dataclass(frozen=True)
class Error:
    """Measured over predicted, each model by a fit to the others.

    Attributes:
        rows: how many.
        low, high: a 95 % prediction interval of the ratio for one more case.
        worst: the ratio farthest from 1.
    """

    rows: int
    low: float
    high: float
    worst: float


@dataclass(frozen=True)
class Calibration:
    """Efficiencies, how well they predict, and where they come from: a file of rows, the device and
    the storages that it measured."""

    efficiency: Efficiency
    errors: dict[str, Error] = field(default_factory=dict)
    source: str = ""
    device: str = ""
    storages: tuple[str, ...] = ()

    def error(self, quantity: str) -> Error | None:
        """Of ``update memory``, ``update time`` and so on; None where it was not tested."""
        return self.errors.get(quantity)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def shipped_calibration() -> Calibration | None:
    """The one that comes with this package; None if it comes with none."""
    return load_calibration(SHIPPED) if SHIPPED.is_file() else None


def load_calibration(path: Path) -> Calibration:
    """A calibration that ``python -m npu_qat.planning.calibration`` wrote.

    Raises ``ValueError`` if ``path`` is not one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Calibration(
            Efficiency(**found["efficiency"]),
            {name: Error(**error) for name, error in found["errors"].items()},
            found["source"],
            found["device"],
            tuple(found["storages"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no calibration of npu-qat plan: {error}") from error
