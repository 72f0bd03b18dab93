"""A checkout of its own, and docker compose in it, as a user would type it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Who runs in the containers: neither root nor anybody that the images know.
USER = 4321
# Containers and volumes that a user of this machine has stay as they are. The images do not.
OWN_NAME = {"COMPOSE_PROJECT_NAME": f"npu-qat-tests-{os.getpid()}"}
SETTINGS = f"RUN_UID={USER}\nRUN_GID={USER}\n"
# The demo, short: a few steps a arm, a checkpoint after each.
SHORT = (
    "--set evaluation.problems=16 --set train.checkpoint_every=1 --set dapo.prompts_per_rollout=4 "
    "--set dapo.generation_prompts=8 --set dapo.max_generation_tries=1 --set train.steps={steps}"
)


class Project:
    """docker compose in a copy of the checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_env(self, **settings: str) -> None:
        """The whole ``.env``; settings of the machine come from the environment, as in a shell."""
        lines = "".join(f"{name}={value}\n" for name, value in settings.items())
        (self.folder / ".env").write_text(SETTINGS + lines)

    def compose(
        self, *words: str, timeout: float = 300, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """``docker compose WORDS``; what it prints on both streams is ``stdout``."""
        return subprocess.run(
            ["docker", "compose", *words],
            cwd=self.folder,
            env={**os.environ, **OWN_NAME, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def succeed(self, *words: str, timeout: float = 300) -> str:
        done = self.compose(*words, timeout=timeout)
        assert done.returncode == 0, f"docker compose {' '.join(words)}\n{done.stdout[-8000:]}"
        return done.stdout

    def service(self, name: str, **environ: str) -> dict[str, Any]:
        """The service as compose resolves it."""
        done = subprocess.run(
            ["docker", "compose", "config", "--format", "json"],
            cwd=self.folder,
            env={**os.environ, **OWN_NAME, **environ},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "level=warning" not in done.stderr, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)["services"][name]
        return found

    def up(self, service: str) -> subprocess.CompletedProcess[str]:
        return self.compose("up", "--no-color", "--exit-code-from", service, service)

    def down(self) -> None:
        self.succeed("down", "--volumes", "--remove-orphans")
        shutil.rmtree(self.folder / "runs", ignore_errors=True)

    def run_directory(self, name: str) -> Path:
        return self.folder / "runs" / name


def copy_checkout(target: Path) -> None:
    """What git has or would take, as a clone would have it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    wheels = os.environ.get("NPU_QAT_WHEELS")
    for wheel in Path(wheels).glob("*.whl") if wheels else []:
        shutil.copy2(wheel, target / "docker" / "wheels")


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    """Whether ``what`` came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.1)
    return False
