"""What a run is: schema and defaults, YAML, overrides, presets, the design documents' own keys.

Names are imported on first use: the schema needs pydantic, which takes longer to import than
``npu-qat --help`` should take to answer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_qat.config.dump import describe_yaml, dump_yaml
    from npu_qat.config.errors import ConfigError
    from npu_qat.config.load import Loaded, load_config, load_run, preset_names
    from npu_qat.config.overrides import Override, parse_overrides
    from npu_qat.config.schema import (
        DapoConfig,
        DeepSpeedSection,
        DistillSection,
        EvaluationConfig,
        LayerSigma,
        LoraSection,
        ModelConfig,
        NoiseConfig,
        Recipe,
        RolloutConfig,
        RunConfig,
        RunSection,
        SftConfig,
        TaskConfig,
        TrainConfig,
        ZoneSchedule,
    )

# Public name -> the module of this package that defines it.
_HOME = {
    "ConfigError": "errors",
    "DapoConfig": "schema",
    "DeepSpeedSection": "schema",
    "DistillSection": "schema",
    "EvaluationConfig": "schema",
    "LayerSigma": "schema",
    "Loaded": "load",
    "LoraSection": "schema",
    "ModelConfig": "schema",
    "NoiseConfig": "schema",
    "Override": "overrides",
    "Recipe": "schema",
    "RolloutConfig": "schema",
    "RunConfig": "schema",
    "RunSection": "schema",
    "SftConfig": "schema",
    "TaskConfig": "schema",
    "TrainConfig": "schema",
    "ZoneSchedule": "schema",
    "describe_yaml": "dump",
    "dump_yaml": "dump",
    "load_config": "load",
    "load_run": "load",
    "parse_overrides": "overrides",
    "preset_names": "load",
}

__all__ = [
    "ConfigError",
    "DapoConfig",
    "DeepSpeedSection",
    "DistillSection",
    "EvaluationConfig",
    "LayerSigma",
    "Loaded",
    "LoraSection",
    "ModelConfig",
    "NoiseConfig",
    "Override",
    "Recipe",
    "RolloutConfig",
    "RunConfig",
    "RunSection",
    "SftConfig",
    "TaskConfig",
    "TrainConfig",
    "ZoneSchedule",
    "describe_yaml",
    "dump_yaml",
    "load_config",
    "load_run",
    "parse_overrides",
    "preset_names",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562) and keep it."""
    if name not in _HOME:
        raise AttributeError(f"module 'npu_qat.config' has no attribute {name!r}")
    value = getattr(import_module(f"npu_qat.config.{_HOME[name]}"), name)
    globals()[name] = value
    return value
