"""One checkout and one CPU image for all tests that need an engine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.engine import Project, copy_checkout


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the checkout, and docker compose to use in it; no engine yet."""
    done = None
    if shutil.which("docker"):
        done = subprocess.run(["docker", "compose", "version"], capture_output=True)
    if done is None or done.returncode != 0:
        pytest.fail("docker compose is not here: sudo make containers brings its own")
    folder = tmp_path_factory.mktemp("npu-qat")
    folder.chmod(0o755)  # users of containers look into it
    copy_checkout(folder)
    return Project(folder)


@pytest.fixture(scope="session")
def cpu_image(checkout: Project) -> str:
    """The image of cpu-train, built by compose."""
    checkout.write_env()
    checkout.succeed("build", "cpu-train", timeout=600)
    return "npu-qat:cpu"


@pytest.fixture
def project(checkout: Project, cpu_image: str) -> Iterator[Project]:
    """The checkout with its CPU image; containers and runs of the test go with it."""
    yield checkout
    checkout.down()


@pytest.fixture(scope="session")
def stand_in_image(checkout: Project, cpu_image: str) -> str:
    """The base of an NPU image without CANN in it: its ``set_env.sh``, and a cmake that writes down
    what it is asked for, on top of the CPU image, so that no torch is installed again."""
    folder = Path(__file__).with_name("stand_in_cann")
    tag = "npu-qat-stand-in:cann"
    subprocess.run(["docker", "build", "--quiet", "-t", tag, str(folder)], check=True)
    return tag
