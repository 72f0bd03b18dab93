"""Trackers: the right numbers, errors before a run costs anything, no failure that ends it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from npu_qat.experiments import run as run_module
from npu_qat.integrations import trackers
from npu_qat.integrations.trackers import (
    TRACKERS,
    TrackedRun,
    check_trackers,
    open_trackers,
    without_secrets,
)
from tests.experiments.running import carry_out, configuration
from tests.experiments.running import metrics as recorded
from tests.training.launching import environment, launch
from tests.training.tiny import save_tiny_checkpoint

WORKER = Path(__file__).with_name("tracker_worker.py")
SECRET = "5ec7e7" * 6 + "abcd"


class Fake:
    """Keeps what it is told; fails at a step if asked to."""

    def __init__(self, run: TrackedRun, fails_at: int | None = None) -> None:
        self.run, self.fails_at = run, fails_at
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished: list[bool] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError(f"https://me:{SECRET}@host refused")
        self.rows.append((step, dict(metrics)))

    def finish(self, *, failed: bool = False) -> None:
        self.finished.append(failed)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """``wandb`` works, ``mlflow`` fails at step 2; both without their packages."""
    made: list[Fake] = []

    def make(fails_at: int | None) -> Any:
        def start(run: TrackedRun) -> Fake:
            made.append(Fake(run, fails_at))
            return made[-1]

        return start

    monkeypatch.setitem(TRACKERS, "wandb", (make(None), "json"))
    monkeypatch.setitem(TRACKERS, "mlflow", (make(2), "json"))
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def sft(checkpoint: Path, *names: str, baselines: tuple[str, ...] = ()) -> dict[str, Any]:
    """A run of three steps of SFT."""
    return configuration(
        checkpoint,
        run={"device": "cpu", "threads": 1, "trackers": list(names)},
        noise={"enabled": False},
        train={"method": "sft", "steps": 3, "warmup_steps": 1, "lr": 1e-3},
        evaluation={"problems": 4, "baselines": list(baselines)},
    )


# --- the composite ---------------------------------------------------------------------------


def test_numbers_are_handed_on_and_texts_are_not(fakes: list[Fake], tmp_path: Path) -> None:
    with open_trackers(["wandb"], TrackedRun("n", tmp_path, "id1")) as tracked:
        tracked.log({"w4a4/loss": 2, "data": "f00d", "skipped": None, "on": True, "lr": 0.5}, 1)
    assert fakes[0].rows == [(1, {"w4a4/loss": 2.0, "lr": 0.5})]
    assert fakes[0].finished == [False]
    assert tracked.state == {"wandb": "ok"}


def test_a_failing_tracker_is_dropped_with_one_warning_that_holds_no_secret(
    fakes: list[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    said: list[str] = []
    with open_trackers(["wandb", "mlflow"], TrackedRun("n", tmp_path, "id1"), said.append) as both:
        for step in range(1, 5):
            both.log({"loss": 1.0}, step)
    good, bad = fakes
    assert [step for step, _ in good.rows] == [1, 2, 3, 4] and good.finished == [False]
    assert [step for step, _ in bad.rows] == [1] and bad.finished == []
    assert len(said) == 1 and "mlflow failed at step 2" in said[0]
    assert both.state["wandb"] == "ok" and "refused" in both.state["mlflow"]
    assert SECRET not in said[0] + both.state["mlflow"]


def test_an_error_in_the_run_is_passed_on_and_told(fakes: list[Fake], tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="boom"),
        open_trackers(["wandb"], TrackedRun("n", tmp_path, "id1")),
    ):
        raise RuntimeError("boom")
    assert fakes[0].finished == [True]


def test_secrets_leave_no_trace_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWANLAB_API_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")
    text = without_secrets(ValueError(f"http://me:pw@h:1/x said\n no to {SECRET} and hunter22"))
    assert text == "ValueError: http://***@h:1/x said no to *** and ***"
    across = without_secrets(ValueError("x" * 280 + SECRET))  # where the text is shortened
    assert len(across) <= 300 and SECRET[:6] not in across


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab"])
def test_a_missing_package_names_the_line_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    line = rf"{name} needs the package {name}.*pip install 'npu-qat\[{name}\]'"
    with pytest.raises(ValueError, match=line):
        check_trackers([name])


def test_every_tracker_of_the_configuration_exists_and_every_extra_too() -> None:
    from typing import get_args

    from npu_qat.config.schema import RunSection

    (items, _) = get_args(RunSection.model_fields["trackers"].annotation)
    assert set(get_args(items)) == set(TRACKERS)
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text("utf-8")
    for name in set(TRACKERS) - {"tensorboard"}:
        assert f"\n{name} = [" in project


# --- in a run --------------------------------------------------------------------------------


def test_a_run_shows_every_step_of_both_arms_and_survives_a_tracker(
    checkpoint: Path, fakes: list[Fake], tmp_path: Path
) -> None:
    config = sft(checkpoint, "wandb", "mlflow", "tensorboard", baselines=("bf16_lora",))
    summary = carry_out(config, tmp_path / "run")
    good = fakes[0]
    assert [step for step, _ in good.rows] == [1, 2, 3, 1, 2, 3]
    wanted = [row for row in recorded(tmp_path / "run") if "loss" in row]
    for (step, shown), row in zip(good.rows, wanted, strict=True):
        assert (step, shown[f"{row['arm']}/loss"]) == (row["step"], row["loss"])
    assert summary["trackers"]["wandb"] == summary["trackers"]["tensorboard"] == "ok"
    assert summary["trackers"]["mlflow"].startswith("failed at step 2: ConnectionError")
    assert SECRET not in "".join(
        p.read_text("utf-8") for p in (tmp_path / "run").rglob("*.json*") if p.is_file()
    )
    said = (tmp_path / "said.txt").read_text()
    assert said.count("the run goes on without it") == 1
    assert good.run.name == "run" and good.run.config["train"]["method"] == "sft"
    assert {p.name for p in (tmp_path / "run" / "tensorboard").iterdir()} == {"w4a4", "bf16_lora"}


def test_a_resumed_run_keeps_its_identity(
    checkpoint: Path, fakes: list[Fake], tmp_path: Path
) -> None:
    config = sft(checkpoint, "wandb")
    carry_out(config, tmp_path / "run")
    carry_out(config, tmp_path / "run", resume=True)
    carry_out(config, tmp_path / "other")
    first, resumed, other = (fake.run.id for fake in fakes)
    assert first == resumed != other


def test_a_tracker_that_cannot_start_stops_the_run_before_anything_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(run: TrackedRun) -> Any:
        raise PermissionError(f"no login {SECRET}")

    def loads(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setitem(TRACKERS, "wandb", (refuses, "json"))
    monkeypatch.setattr(run_module, "load_base", loads)
    with pytest.raises(ValueError, match=r"wandb cannot start: .* WANDB_MODE=offline") as error:
        carry_out(sft(checkpoint, "wandb"), tmp_path / "run")
    assert SECRET not in str(error.value) and error.value.__suppress_context__
    # The folder is still free: the same command works once the tracker does.
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_no_trackers_at_all(checkpoint: Path, tmp_path: Path) -> None:
    assert carry_out(sft(checkpoint), tmp_path / "run")["trackers"] == {}
    assert not (tmp_path / "run" / "tensorboard").exists()


# --- the real packages, offline --------------------------------------------------------------


def told(name: str, folder: Path, **variables: str) -> str:
    """What a process says that logs two arms; it knows no login but ``variables``."""
    kept = {
        key: value
        for key, value in environment().items()
        if not key.startswith(("WANDB", "MLFLOW", "SWANLAB"))
    }
    env = {**kept, "HOME": str(folder), "NETRC": str(folder / "netrc"), **variables}
    printed = launch("python", 1, [str(WORKER), name, str(folder)], env)
    return next(x for x in printed.splitlines() if x.startswith(("STATE ", "REFUSED ")))


def bytes_below(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the extra '{package}'")


def test_tensorboard_has_a_curve_for_each_arm(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert told("tensorboard", tmp_path) == "STATE ok"
    events = EventAccumulator(str(tmp_path / "tensorboard" / "bf16_lora"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_wandb_offline_and_without_a_login(tmp_path: Path) -> None:
    needs("wandb")
    assert told("wandb", tmp_path, WANDB_MODE="offline", WANDB_API_KEY=SECRET) == "STATE ok"
    (file,) = (tmp_path / "wandb").rglob("run-*.wandb")
    content = file.read_bytes()
    assert b"bf16_lora/loss" in content and b"w4a4/step" in content
    assert SECRET.encode() not in bytes_below(tmp_path)
    refused = told("wandb", tmp_path)
    assert refused.startswith("REFUSED run.trackers: wandb cannot start")
    assert "WANDB_MODE=offline" in refused


@pytest.mark.slow
def test_mlflow_in_a_file_resumed_and_without_its_server(tmp_path: Path) -> None:
    needs("mlflow")
    assert [told("mlflow", tmp_path) for _ in range(2)] == ["STATE ok"] * 2  # the second resumes
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params == {"train.lr": "0.001"}
    history = client.get_metric_history(found.info.run_id, "bf16_lora/loss")
    assert sorted({(m.step, m.value) for m in history}) == [(1, 1.0), (2, 0.5), (3, 0.25)]

    server = {
        "MLFLOW_TRACKING_URI": f"http://me:{SECRET}@127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    refused = told("mlflow", tmp_path / "away", **server)
    assert refused.startswith("REFUSED run.trackers: mlflow cannot start")
    assert SECRET not in refused and "MLFLOW_TRACKING_URI" in refused


def test_swanlab_offline_and_without_a_login(tmp_path: Path) -> None:
    needs("swanlab")
    assert told("swanlab", tmp_path, SWANLAB_MODE="offline", SWANLAB_API_KEY=SECRET) == "STATE ok"
    (file,) = (tmp_path / "swanlog").rglob("*.swanlab")
    assert b"bf16_lora/loss" in file.read_bytes()
    assert SECRET.encode() not in bytes_below(tmp_path)
    refused = told("swanlab", tmp_path)
    assert refused.startswith("REFUSED run.trackers: swanlab cannot start")
    assert "SWANLAB_MODE=offline" in refused


@pytest.mark.slow
def test_a_whole_run_in_all_trackers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("wandb", "mlflow", "swanlab")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("WANDB", "SWANLAB"):
        monkeypatch.setenv(f"{name}_MODE", "offline")
        monkeypatch.setenv(f"{name}_API_KEY", SECRET)
    summary = carry_out(sft(checkpoint, *TRACKERS), tmp_path / "run")
    assert summary["trackers"] == dict.fromkeys(TRACKERS, "ok")
    for kept in ("wandb", "mlflow.db", "swanlog", "tensorboard"):
        assert (tmp_path / "run" / kept).exists(), kept
    assert SECRET.encode() not in bytes_below(tmp_path / "run")
