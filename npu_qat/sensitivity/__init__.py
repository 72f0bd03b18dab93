"""Which parts of a model suffer from 4 bits, and what noise that suggests (SRDD done right).

``scan`` measures every linear that a recipe quantises and what it costs the loss;
``published_scan`` repeats the design documents' own method; ``guide`` turns scores into layer
multipliers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_qat.sensitivity.guidance import (
        SCORES,
        STRATEGIES,
        check_score,
        guide,
        layer_scores,
        layer_sigma_config,
        spread,
    )
    from npu_qat.sensitivity.published import Thresholds, published_scan
    from npu_qat.sensitivity.scanner import LinearScan, Scan, scan
    from npu_qat.sensitivity.texts import Text

_HOME = {
    "SCORES": "guidance",
    "STRATEGIES": "guidance",
    "check_score": "guidance",
    "guide": "guidance",
    "layer_scores": "guidance",
    "layer_sigma_config": "guidance",
    "spread": "guidance",
    "Thresholds": "published",
    "published_scan": "published",
    "LinearScan": "scanner",
    "Scan": "scanner",
    "scan": "scanner",
    "Text": "texts",
}

__all__ = [
    "SCORES",
    "STRATEGIES",
    "LinearScan",
    "Scan",
    "Text",
    "Thresholds",
    "check_score",
    "guide",
    "layer_scores",
    "layer_sigma_config",
    "published_scan",
    "scan",
    "spread",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562): scans need torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
