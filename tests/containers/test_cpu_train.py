"""``docker compose up cpu-train`` with a real engine: a report, as nobody in particular."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.containers.engine import SHORT, USER, Project, wait_for

pytestmark = pytest.mark.container

PS = ("ps", "--all", "--format", "json", "cpu-train")


def metrics(run: Path) -> list[tuple[str, int]]:
    """(arm, step) of each line of the run's metrics."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(record["arm"], record["step"]) for record in map(json.loads, lines)]


def inspect(image: str) -> dict[str, Any]:
    done = subprocess.run(["docker", "inspect", image], capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)[0]["Config"]
    return found


def exit_code(project: Project) -> int:
    code: int = json.loads(project.succeed(*PS))["ExitCode"]
    return code


def test_a_run_that_is_stopped_and_killed_ends_with_its_report_on_the_host(
    project: Project,
) -> None:
    project.write_env(TRAIN_ARGS=SHORT.format(steps=6))
    run = project.run_directory("cpu-train")
    checkpoints = run / "checkpoints" / "w4a4"

    # docker stop sends SIGTERM, which has to reach the program through the entry point.
    project.succeed("up", "--detach", "cpu-train")
    assert wait_for((run / "metrics.jsonl").exists, 180), project.succeed("logs", "cpu-train")
    alive = project.compose("exec", "cpu-train", "npu-qat", "healthcheck", "--max-age", "60")
    assert (alive.returncode, alive.stdout[:6]) == (0, "alive:")
    project.succeed("stop", "cpu-train")
    assert exit_code(project) == 130
    assert "Go on with: --output runs/cpu-train --resume auto" in project.succeed("logs")
    stopped_at = max(metrics(run))[1]
    assert (checkpoints / f"step-{stopped_at:06d}" / "manifest.json").exists()

    # A kill gives it no time for anything.
    project.succeed("up", "--detach", "cpu-train")
    saved = checkpoints / f"step-{stopped_at + 1:06d}" / "manifest.json"
    assert wait_for(saved.exists, 180), project.succeed("logs", "cpu-train")
    project.succeed("kill", "cpu-train")
    assert exit_code(project) == 137
    assert not (run / "report.html").exists()

    rest = project.up("cpu-train")
    assert rest.returncode == 0, rest.stdout[-4000:]
    assert "w4a4: going on after step " in rest.stdout and "w4a4 1/6" not in rest.stdout
    assert metrics(run) == [(arm, i) for arm in ("w4a4", "bf16_lora") for i in range(1, 7)]
    assert "<html" in (run / "report.html").read_text()
    assert json.loads((run / "audit.json").read_text())["verdict"] == "pass"
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in (run, *run.rglob("*"))}
    assert owners == {(USER, USER)}


def test_a_stop_during_the_start_is_quick(project: Project) -> None:
    """Nothing handles signals yet, so there is nothing to wait for."""
    project.write_env(TRAIN_ARGS=SHORT.format(steps=6))
    project.succeed("up", "--detach", "cpu-train")
    began = time.monotonic()
    project.succeed("stop", "cpu-train")
    assert time.monotonic() - began < 30
    assert exit_code(project) in (130, 143)


def test_a_failed_run_fails_the_command(project: Project) -> None:
    project.write_env(TRAIN_ARGS="--set train.setps=2")
    done = project.up("cpu-train")
    assert done.returncode == 2 and "setps" in done.stdout and "train.steps" in done.stdout


def test_the_image_is_for_nobody_in_particular_and_says_how_it_is(cpu_image: str) -> None:
    config = inspect(cpu_image)
    assert config["User"] == "1000:1000"
    assert config["Healthcheck"]["Test"][:3] == ["CMD", "npu-qat", "healthcheck"]
    assert config["Entrypoint"] == ["entrypoint.sh"]


def test_an_edit_of_the_source_costs_no_installation(project: Project) -> None:
    edited = project.folder / "npu_qat" / "cli" / "doctor.py"
    before = edited.read_text()
    try:
        edited.write_text(before + "# edited\n")
        done = project.succeed("--progress", "plain", "build", "cpu-train")
    finally:
        edited.write_text(before)
    cached = [block for block in done.split("\n\n") if "bootstrap.py --venv" in block]
    assert cached and all("CACHED" in block for block in cached)
    compiled = [block for block in done.split("\n\n") if "compileall" in block]
    assert compiled and not any("CACHED" in block for block in compiled)


def test_the_test_service_runs_tests(project: Project) -> None:
    project.succeed("build", "test", timeout=600)
    words = ["run", "--rm", "test", "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    chosen = ["tests/noise", "tests/tasks", "tests/test_house.py"]  # house: there is no git
    done = project.succeed(*words, *chosen, timeout=600)
    assert " passed" in done and " failed" not in done
