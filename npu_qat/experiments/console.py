"""What a run says to the person who started it: a progress bar on a terminal, lines in a log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_STEP_PARTS = (
    ("accuracy_train", "accuracy {:.2f}"),
    ("reward_mean", "reward {:.2f}"),
    ("loss", "loss {:.4f}"),
    ("grad_norm", "grad {:.2f}"),
    ("logp_gap_off_mean", "gap {:.4f}"),
    ("sigma", "sigma {:.4g}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
    ("seconds", "{:.1f} s"),
)


class RunConsole:
    """Messages and steps of a run on a rich console, which is silent on ranks other than 0."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """A line worth reading."""
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, arm: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        """``done`` of ``total`` steps of ``arm`` are finished; ``metrics`` are the last one's."""
        line = step_line(metrics)
        if not self.console.is_terminal:
            self.say(f"{arm} {done}/{total}  {line}")
            return
        if self._progress is None:
            self._open(arm, total)
        assert self._progress is not None and self._task is not None
        self._progress.update(self._task, completed=done, line=line)
        if done == total:
            self.close()

    def close(self) -> None:
        """End the progress bar, if one is shown."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _open(self, arm: str, total: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
            console=self.console,
        )
        self._progress.start()
        self._task = self._progress.add_task(arm, total=total, line="")


def step_line(metrics: dict[str, Any]) -> str:
    """The few numbers of a step that tell whether it went well."""
    return "  ".join(
        text.format(metrics[key]) for key, text in _STEP_PARTS if metrics.get(key) is not None
    )
