"""The metrics once more, for TensorBoard. ``metrics.jsonl`` is the record; this is a view of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npu_qat.training.rundir import RunDirectory

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes ``tensorboard/<arm>/`` below a run directory; nothing on ranks other than 0."""

    def __init__(self, rundir: RunDirectory) -> None:
        self._rundir = rundir
        self._writers: dict[str, SummaryWriter] = {}

    def add(self, arm: str, step: int, metrics: dict[str, Any]) -> None:
        """The numbers of one step of ``arm``."""
        if not self._rundir.writer:
            return
        writer = self._writers.get(arm)
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Steps that a killed run wrote after its last checkpoint are hidden.
            folder = str(self._rundir.path / "tensorboard" / arm)
            writer = self._writers[arm] = SummaryWriter(folder, purge_step=step)
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, step)
        writer.flush()
