"""Experiment trackers: a run's metrics once more, where people compare runs.

``metrics.jsonl`` is the record of a run; a tracker is a view of it. So a tracker that cannot start
stops the run before it has cost anything, and one that fails later is dropped with one warning
while the training goes on.

=============  ======================  =========================================================
name           package                 where the numbers go
=============  ======================  =========================================================
tensorboard    (always there)          ``tensorboard/`` in the run directory
wandb          ``npu-qat[wandb]``      W&B, or ``wandb/`` with ``WANDB_MODE=offline``
mlflow         ``npu-qat[mlflow]``     ``MLFLOW_TRACKING_URI``; unset: ``mlflow.db`` in the run
                                       directory
swanlab        ``npu-qat[swanlab]``    SwanLab, or ``swanlog/`` with ``SWANLAB_MODE=offline``
=============  ======================  =========================================================

**Names.** The part of a metric's name before its first slash is an arm of the run ("w4a4/loss");
each arm has a step axis of its own. **Secrets** stay in the environment variables of the packages:
no configuration key holds one, and error texts are stripped of them before they are kept.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol


class Tracker(Protocol):
    """What receives the numbers of one run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """The ``metrics`` of ``step`` (from 1)."""

    def finish(self, *, failed: bool = False) -> None:
        """No more numbers come; write out what is left."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that trackers are told about.

    Attributes:
        name: shown to people, e.g. the name of the run directory.
        folder: for what a tracker keeps locally.
        id: equal when the run is resumed, and in no other run; letters and digits.
        project: what groups runs.
        config: the configuration, in JSON types, without secrets.
    """

    name: str
    folder: Path
    id: str
    project: str = "npu-qat"
    config: Mapping[str, Any] = field(default_factory=dict)


class TensorBoardTracker:
    """``torch.utils.tensorboard``: a subfolder for each arm, so that their curves overlay."""

    def __init__(self, run: TrackedRun) -> None:
        self._folder = run.folder / "tensorboard"
        self._writers: dict[str, Any] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for arm, rest in _by_arm(metrics).items():
            writer = self._writers.get(arm)
            if writer is None:
                from torch.utils.tensorboard import SummaryWriter

                # Steps that a killed run wrote after its last checkpoint are hidden.
                writer = SummaryWriter(str(self._folder / arm), purge_step=step)
                self._writers[arm] = writer
            for name, value in rest.items():
                writer.add_scalar(name, value, step)
            writer.flush()

    def finish(self, *, failed: bool = False) -> None:
        for writer in self._writers.values():
            writer.close()


class WandbTracker:
    """Weights & Biases, by its own environment variables (WANDB_API_KEY, WANDB_MODE, ...)."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            # The terminal belongs to the run's own messages.
            settings=wandb.Settings(console="off", silent=True),
        )
        self._arms: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        row: dict[str, float] = dict(metrics)
        for arm in _by_arm(metrics):
            axis = f"{arm}/step" if arm else "step"
            if arm not in self._arms:
                # Arms count their steps from 1 each; W&B's own step may only grow.
                self._run.define_metric(axis)
                self._run.define_metric(f"{arm}/*" if arm else "*", step_metric=axis)
                self._arms.add(arm)
            row[axis] = step
        self._run.log(row)

    def finish(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


class MLflowTracker:
    """MLflow, at MLFLOW_TRACKING_URI; without it a SQLite file in the run directory."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow
        from mlflow.entities import Param

        local = None if os.environ.get("MLFLOW_TRACKING_URI") else run.folder.absolute()
        if local is not None:
            local.mkdir(parents=True, exist_ok=True)
        self._client = mlflow.MlflowClient(
            tracking_uri=None if local is None else f"sqlite:///{local / 'mlflow.db'}"
        )
        found = self._client.get_experiment_by_name(run.project)
        experiment = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(
                run.project,
                artifact_location=None if local is None else (local / "mlartifacts").as_uri(),
            )
        )
        known = self._client.search_runs([experiment], f"tags.npu_qat_run = '{run.id}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(experiment, run_name=run.name, tags={"npu_qat_run": run.id})
        self._id = made.info.run_id
        params = [Param(key, value[:500]) for key, value in _flat(run.config)]
        for start in range(0, len(params), 100):  # the most that one call takes
            self._client.log_batch(self._id, params=params[start : start + 100])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(
            self._id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()]
        )

    def finish(self, *, failed: bool = False) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class SwanLabTracker:
    """SwanLab, by its own environment variables (SWANLAB_API_KEY, SWANLAB_MODE, ...)."""

    def __init__(self, run: TrackedRun) -> None:
        import swanlab

        self._run = swanlab.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            log_dir=str(run.folder / "swanlog"),
            config=dict(run.config),
            settings=swanlab.Settings(terminal={"proxy_type": "none"}, interactive=False),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, *, failed: bool = False) -> None:
        if failed:
            self._run.finish("crashed", error="the run ended with an error")
        else:
            self._run.finish()


# Name -> class, package to import.
TRACKERS: dict[str, tuple[Callable[[TrackedRun], Tracker], str]] = {
    "tensorboard": (TensorBoardTracker, "tensorboard"),
    "wandb": (WandbTracker, "wandb"),
    "mlflow": (MLflowTracker, "mlflow"),
    "swanlab": (SwanLabTracker, "swanlab"),
}
_HINTS = {
    "wandb": "log in with wandb login, or set WANDB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI, or unset it to write into the run directory",
    "swanlab": "log in with swanlab login, or set SWANLAB_MODE=offline",
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ``ValueError`` with the line to install for a tracker whose package is missing."""
    for name in names:
        package = TRACKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"run.trackers: {name} needs the package {package}, which is not installed; "
                f"pip install 'npu-qat[{name}]'"
            )


def open_trackers(
    names: Sequence[str], run: TrackedRun, warn: Callable[[str], None] = print
) -> Trackers:
    """Start the trackers ``names``.

    Args:
        names: keys of ``TRACKERS``; none at all is fine.
        run: what they are told about the run.
        warn: called once for a tracker that fails later.

    Raises:
        ValueError: a package is missing, or a tracker cannot start (no login, no server).
    """
    check_trackers(names)
    started: dict[str, Tracker] = {}
    for name in names:
        try:
            started[name] = TRACKERS[name][0](run)
        except Exception as error:
            Trackers(started, warn).finish(failed=True)
            hint = _HINTS.get(name, "check that the run directory can be written")
            raise ValueError(
                f"run.trackers: {name} cannot start: {without_secrets(error)}; {hint}"
            ) from None  # the cause may hold a secret
    return Trackers(started, warn)


class Trackers:
    """Several trackers as one that never raises; a context manager that finishes them.

    Attributes:
        state: tracker -> "ok", or at which step and how it failed.
    """

    def __init__(
        self, trackers: Mapping[str, Tracker], warn: Callable[[str], None] = print
    ) -> None:
        self._trackers, self._warn = dict(trackers), warn
        self.state = dict.fromkeys(trackers, "ok")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Hand on the numbers among ``metrics``; texts and None are left out."""
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        self._each(f"step {step}", lambda tracker: tracker.log(numbers, step))

    def finish(self, *, failed: bool = False) -> None:
        """Finish the trackers that are left; a second call does nothing."""
        self._each("the end", lambda tracker: tracker.finish(failed=failed))
        self._trackers.clear()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish(failed=error is not None)

    def _each(self, when: str, use: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                use(tracker)
            except Exception as error:
                del self._trackers[name]
                self.state[name] = f"failed at {when}: {without_secrets(error)}"
                self._warn(
                    f"tracker {name} {self.state[name]}; the run goes on without it, and "
                    "metrics.jsonl has every number"
                )


def without_secrets(error: BaseException) -> str:
    """``error`` as a line of text without passwords in addresses and without the values of
    environment variables that look like secrets."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
    for name, value in os.environ.items():
        if re.search(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", name, re.I) and len(value) > 5:
            text = text.replace(value, "***")
    return text[:300]  # shortened last: half a secret would not be found


def _by_arm(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """``{"a/x": 1, "y": 2}`` as ``{"a": {"x": 1}, "": {"y": 2}}``."""
    arms: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        arm, slash, rest = name.partition("/")
        arms.setdefault(arm if slash else "", {})[rest if slash else name] = value
    return arms


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and texts of all values."""
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", str(value)))
    return found
