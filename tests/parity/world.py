"""A small run and its export, and ways of breaking one of the two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npu_qat.backends import Selection, select
from npu_qat.config import RunConfig, dump_yaml, load_config
from npu_qat.config.schema import LoraSection
from npu_qat.deploy import AscendWriter, CompressedTensorsWriter, PackedCore, open_checkpoint
from npu_qat.deploy.adapter import read_adapter
from npu_qat.deploy.export import export
from npu_qat.layers import add_lora
from npu_qat.parity.levels import Level, ParityReport, check
from npu_qat.parity.recording import Recording, Settings, record
from npu_qat.parity.training_side import TrainingSide, open_training
from tests.deploy.models import damage
from tests.training.tiny import save_tiny_checkpoint

WRITERS = {"ascend": AscendWriter, "compressed-tensors": CompressedTensorsWriter}
SMALL = Settings(prompts=6, max_new_tokens=8, seeds=2, batch_size=4)
LORA = LoraSection(r=4, alpha=6)


@dataclass
class World:
    """A training side, its recording, and its export."""

    folder: Path
    config: RunConfig
    side: TrainingSide
    recording: Recording
    export: Path
    selection: Selection

    def copy(self, target: Path) -> Path:
        """A copy of the export, to be damaged."""
        shutil.copytree(self.export, target)
        return target

    def judge(self, folder: Path | None = None, **options: Any) -> ParityReport:
        """The report on ``folder`` (default: the export itself)."""
        where = folder or self.export
        return check(self.recording, where, self.selection, side=self.side, **options)


def make(
    folder: Path,
    format: str = "ascend",
    *,
    family: str = "qwen2",
    dtype: str = "bf16",
    adapter: bool = False,
    settings: Settings = SMALL,
    **quant: Any,
) -> World:
    """A random model of ``family`` with the demo's tokenizer, recorded and exported."""
    source = save_tiny_checkpoint(folder / "model", family=family)
    config = load_config(
        preset="demo",
        overrides=[
            f"model.path={source}",
            f"model.dtype={dtype}",
            "run.device=cpu",
            "run.backend=reference",
            "task.train_size=40",
            "task.test_size=20",
            f"lora.r={LORA.r}",
            f"lora.alpha={LORA.alpha}",
            *(f"quant.{key}={value}" for key, value in quant.items()),
        ],
    )
    lora = save_lora(folder / "lora", source) if adapter else None
    selection = select("cpu", "reference")
    side = open_training(config, lora, selection)
    core = PackedCore(
        open_checkpoint(config.model), config.quant, input_scales=side.core.input_scales
    )
    found = None if lora is None else read_adapter(lora)
    export(core, WRITERS[format](), folder / "served", adapter=found)
    recording = record(side, settings, {"device": "cpu"})
    return World(folder, config, side, recording, folder / "served", selection)


def save_lora(folder: Path, source: Path, size: float = 0.3) -> Path:
    """An adapter that changes the model in ``source`` visibly."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    adapted = add_lora(model, LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, size, generator=generator)
    adapted.save_pretrained(folder)
    return folder


def save_run(world: World, run: Path) -> Path:
    """The run directory that training would have left."""
    (run / "adapters" / "w4a4").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_yaml(world.config))
    if world.side.adapter is not None:
        shutil.copytree(world.side.adapter, run / "adapters" / "w4a4", dirs_exist_ok=True)
    return run


def break_tensor(folder: Path, name: str, edit: Callable[[torch.Tensor], object]) -> None:
    """Change one stored tensor in place; index and checksums follow, as a bad exporter's would."""
    damage(folder, lambda tensors: edit(tensors[name]))


def verdicts(report: ParityReport) -> dict[str, str]:
    return {level.key: level.verdict for level in report.levels}


def level(report: ParityReport, key: str) -> Level:
    return next(found for found in report.levels if found.key == key)


def failed(report: ParityReport) -> dict[str, str]:
    """Failed check -> what was measured."""
    return {c.name: c.measured for found in report.levels for c in found.checks if not c.ok}
