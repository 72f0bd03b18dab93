"""``docker compose up npu-train`` with a real engine and no NPU: what is wired, and what is said.

CANN's images cannot be had everywhere, so the NPU image is built on a stand-in: everything of the
Dockerfile and of compose runs, nothing of CANN does.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.containers.engine import USER, Project

pytestmark = pytest.mark.container

CONSTRAINTS = "constraints.txt"  # those of the NPU need a torch that x86 has only from PyTorch
STAND_IN = """
services:
  npu-train: {build: {args: {EXTRAS: "", TORCH_VERSION: "%(torch)s"}}}
  npu-folder: {build: {args: {EXTRAS: "", TORCH_VERSION: "%(torch)s"}}}
"""
# What a process in the container sees.
LOOK = """
import grp, json, os, pathlib
mounts = {l.split()[1]: l.split()[3] for l in pathlib.Path("/proc/mounts").read_text().splitlines()}
print(json.dumps({
    "uid": os.getuid(),
    "groups": os.getgroups(),
    "nodes": [str(p) for p in pathlib.Path("/dev").rglob("*") if p.is_char_device()],
    "read_only": [t for t, options in mounts.items() if "ro" in options.split(",")],
    "cann": os.environ.get("ASCEND_HOME_PATH"),
    "capabilities": [l for l in open("/proc/self/status") if l.startswith("CapEff")][0].split()[1],
}))
"""


def torch_version(project: Project) -> str:
    lines = (project.folder / CONSTRAINTS).read_text().splitlines()
    return next(line.removeprefix("torch==") for line in lines if line.startswith("torch=="))


@pytest.fixture(scope="module", params=["950", "a3"])
def soc(request: pytest.FixtureRequest, checkout: Project, stand_in_image: str) -> str:
    """A chip for which the NPU image was built, on the stand-in."""
    name: str = request.param
    override = checkout.folder / "stand-in.yaml"
    override.write_text(STAND_IN % {"torch": torch_version(checkout)})
    checkout.write_env(NPU_SOC=name, NPU_BASE=stand_in_image)
    files = ["-f", "compose.yaml", "-f", override.name]
    checkout.succeed(*files, "build", "npu-train", timeout=600)
    return name


@pytest.fixture
def host(tmp_path: Path) -> dict[str, str]:
    """Settings that name a driver's files, as a host with NPUs has them."""
    tmp_path.chmod(0o755)
    driver = tmp_path / "driver"
    (driver / "lib64").mkdir(parents=True)
    (driver / "version.info").write_text("Version=25.2.1\n")
    (tmp_path / "dcmi").mkdir()
    for name in ("npu-smi", "ascend_install.info"):
        (tmp_path / name).write_text("")
    return {
        "ASCEND_DRIVER": str(driver),
        "ASCEND_DCMI": str(tmp_path / "dcmi"),
        "NPU_SMI": str(tmp_path / "npu-smi"),
        "ASCEND_INSTALL_INFO": str(tmp_path / "ascend_install.info"),
    }


def stand_in_nodes(project: Project, folder: Path, soc: str) -> Path:
    """Nodes in ``folder`` under the names that compose asks for; the override that takes them."""
    devices = []
    for device in project.service("npu-train", NPU_SOC=soc)["devices"]:
        node = folder / Path(device["source"]).name
        if node.name in ("uburma", "ummu"):  # folders on the host
            node.mkdir()
            device["source"] = str(node)
            node = node / "0"
        else:
            device["source"] = str(node)
        os.mknod(node, stat.S_IFCHR | 0o660, os.makedev(1, 3))
        os.chown(node, 0, 1000)  # the group HwHiAiUser, which the container is to be in
        devices.append(f"{device['source']}:{device['target']}")
    override = project.folder / "nodes.yaml"
    override.write_text(f"services: {{npu-train: {{devices: !override {json.dumps(devices)}}}}}\n")
    return override


def test_without_devices_it_says_at_once_which_are_missing(
    project: Project, soc: str, host: dict[str, str]
) -> None:
    project.write_env(NPU_SOC=soc, **host)
    done = project.up("npu-train")
    assert done.returncode != 0
    assert "/dev/davinci" in done.stdout and "no such file or directory" in done.stdout


def test_without_a_driver_it_says_which_path_is_missing(
    project: Project, soc: str, host: dict[str, str]
) -> None:
    project.write_env(NPU_SOC=soc, **{**host, "ASCEND_DRIVER": "/nowhere/driver"})
    done = project.up("npu-train")
    assert done.returncode != 0 and "/nowhere/driver" in done.stdout
    assert not Path("/nowhere").exists()


def test_the_ascend_runtime_is_asked_for_where_it_is_named(project: Project, soc: str) -> None:
    project.write_env(NPU_SOC=soc, NPU_ACCESS="runtime")
    done = project.up("npu-train")
    assert done.returncode != 0 and "ascend" in done.stdout and "untime" in done.stdout


def test_with_stand_in_nodes_the_container_has_what_an_npu_needs(
    project: Project, soc: str, host: dict[str, str], tmp_path: Path
) -> None:
    project.write_env(NPU_SOC=soc, **host)
    override = stand_in_nodes(project, tmp_path, soc)
    files = ["-f", "compose.yaml", "-f", override.name]
    done = project.succeed(*files, "run", "--rm", "--no-TTY", "npu-train", "python", "-c", LOOK)
    seen = json.loads(done.splitlines()[-1])
    nodes = {"/dev/davinci0", "/dev/davinci_manager", "/dev/hisi_hdc"}
    nodes |= {"/dev/uburma/0", "/dev/ummu/0"} if soc == "950" else {"/dev/devmm_svm"}
    assert nodes <= set(seen["nodes"])
    assert seen["uid"] == USER and 1000 in seen["groups"] and int(seen["capabilities"], 16) == 0
    assert {
        "/usr/local/Ascend/driver",
        "/usr/local/dcmi",
        "/usr/local/bin/npu-smi",
        "/workspace/models",
        "/workspace/data",
    } <= set(seen["read_only"])
    assert seen["cann"] == "/usr/local/Ascend/ascend-toolkit"  # the entry point sourced it

    # The nodes are there and nothing behind them: the program says what it lacks.
    trained = project.compose(
        *files, "up", "--no-color", "--exit-code-from", "npu-train", "npu-train"
    )
    assert trained.returncode == 2
    assert "an NPU is asked for (run.device: npu) and cannot be used" in trained.stdout
    assert "torch-npu:" in trained.stdout and "libhccl.so" in trained.stdout
    assert "a device file" not in trained.stdout and "the driver:" not in trained.stdout


def test_the_kernels_are_built_for_the_chips_that_lack_4_bit_operators(
    soc: str, cpu_image: str
) -> None:
    library = "/opt/npu-qat/npu_qat/backends/ascendc/libnpu_qat_ascendc.so"
    done = subprocess.run(
        ["docker", "run", "--rm", "--network", "none", f"npu-qat:npu-{soc}", "cat", library],
        capture_output=True,
        text=True,
    )
    if soc == "950":
        assert done.returncode != 0
    else:  # the stand-in compiler's library is what it was asked for
        assert "-DCMAKE_ASC_ARCHITECTURES=dav-2201" in done.stdout
        assert "-DPython3_EXECUTABLE=/opt/venv/bin/python" in done.stdout
