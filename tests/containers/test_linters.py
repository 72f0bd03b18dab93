"""What compose and linters say of the files; no engine, but what make containers installs."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import pytest

from tests.containers.engine import ROOT, Project

pytestmark = pytest.mark.container

SHELL = sorted(
    str(path.relative_to(ROOT))
    for pattern in (
        *("docker/*.sh", "scripts/*.sh", "scripts/containers/*.sh"),
        "tests/containers/stand_in_cann/*",
    )
    for path in ROOT.glob(pattern)
    if path.name != "Dockerfile"
)
YAML = ["compose.yaml", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docker/devices/*"))]
EXAMPLES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("examples/kubernetes/*.yaml"))
YAML_RULES = "{extends: relaxed, rules: {line-length: {max: 120}}}"
COMMANDS = {
    "hadolint": ["hadolint", "docker/Dockerfile"],
    "shellcheck": ["shellcheck", "--shell=bash", *SHELL],
    "yamllint": ["yamllint", "--strict", "-d", YAML_RULES, *YAML, *EXAMPLES],
    "schema": ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", *YAML],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_linters_find_nothing(name: str) -> None:
    command = COMMANDS[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed; make containers brings it")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("soc", "access", "cards"),
    [
        *itertools.product(["950", "a3", "910b"], [""], ["", "2", "4", "8", "16"]),
        *itertools.product(["950", "a3", "910b"], ["runtime"], ["", "8"]),
    ],
)
def test_every_combination_resolves(checkout: Project, soc: str, access: str, cards: str) -> None:
    checkout.write_env()
    named = {"NPU_SOC": soc, "NPU_ACCESS": access, "NPUS": cards}
    settings = {name: value for name, value in named.items() if value}
    train = checkout.service("npu-train", **settings)
    assert train["image"] == f"npu-qat:npu-{soc}"
    assert train["build"]["args"]["BASE_IMAGE"].startswith(f"quay.io/ascend/cann:9.1.0-{soc}-")
    assert ("--nproc_per_node" in train["command"]) is bool(cards)
    devices = [device["source"] for device in train.get("devices", [])]
    if access:
        assert train["runtime"] == "ascend" and devices == []
    else:
        count = int(cards or 1)
        assert [d for d in devices if d[-1].isdigit()] == [f"/dev/davinci{i}" for i in range(count)]
        assert ("/dev/devmm_svm" in devices) is (soc != "950")
        assert ("/dev/ummu" in devices) is (soc == "950")
    parity = checkout.service("npu-parity", **settings)
    assert parity.get("devices") == train.get("devices")
    assert parity["build"]["args"]["DEPENDENCIES"] == "inherited"
    assert list(parity["depends_on"]) == ["parity-folder"], "CANN's image is not needed for it"
    folder = checkout.service("parity-folder", **settings)
    assert (folder["image"], folder["build"]) == (parity["image"], parity["build"])


def test_a_chip_that_is_not_known_is_refused(checkout: Project) -> None:
    done = checkout.compose("config", "--quiet", NPU_SOC="310p")
    assert done.returncode != 0 and "310p.yaml" in done.stdout
