"""scripts/launch_multinode.sh: which launcher it chooses, with what, and what it refuses."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from npu_qat.training.network import interface_to
from tests.training.launching import RENDEZVOUS, ROOT

SCRIPT = ROOT / "scripts" / "launch_multinode.sh"
JOB = ["--", "train", "my run.yaml", "--output", "runs/x"]
MASTER = ["--master", "127.0.0.1:29777", "--nodes", "2"]


def script(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in RENDEZVOUS}
    env = {**kept, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [str(SCRIPT), *words], capture_output=True, text=True, env=env, timeout=60
    )


def dry(*words: str, **variables: str) -> list[str]:
    done = script("--dry-run", *words, *JOB, **variables)
    assert done.returncode == 0, done.stderr
    found = shlex.split(done.stdout)
    assert found[0] == sys.executable and found[-4:] == JOB[1:]
    return found


def world(command: list[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(
        base64.urlsafe_b64decode(command[command.index("--world_info") + 1])
    )
    return found


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_a_numbered_machine_gets_the_launcher_for_pods() -> None:
    command = dry(*MASTER, "--node-rank", "1", "--devices", "4")
    assert command[1:3] == ["-m", "deepspeed.launcher.launch"]
    assert world(command) == {"node-0": [0, 1, 2, 3], "node-1": [0, 1, 2, 3]}
    assert value(command, "--node_rank") == "1"
    assert value(command, "--master_addr") == "127.0.0.1"
    assert value(command, "--master_port") == "29777"


def test_what_the_ascend_operator_sets_is_enough() -> None:
    """Its RANK counts pods, its WORLD_SIZE devices."""
    command = dry(
        MASTER_ADDR="job-master-0", MASTER_PORT="2222", RANK="2", WORLD_SIZE="24",
        LOCAL_WORLD_SIZE="8",
    )  # fmt: skip
    assert world(command) == {f"node-{n}": list(range(8)) for n in range(3)}
    assert value(command, "--node_rank") == "2"
    assert value(command, "--master_addr") == "job-master-0"
    assert value(command, "--master_port") == "2222"


def test_an_indexed_job_gives_the_number() -> None:
    command = dry("--nodes", "2", "--devices", "1", MASTER_ADDR="x-0.x", JOB_COMPLETION_INDEX="0")
    assert value(command, "--node_rank") == "0" and value(command, "--master_port") == "29500"


def test_a_machine_without_a_number_meets_the_others() -> None:
    command = dry(*MASTER, "--devices", "2", "--wait", "77")
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert value(command, "--rdzv_backend") == "c10d"
    assert value(command, "--rdzv_endpoint") == "127.0.0.1:29777"
    assert value(command, "--rdzv_conf") == "is_host=true,join_timeout=77,read_timeout=20"
    assert value(command, "--local_addr") == "127.0.0.1"


def test_a_machine_that_is_not_the_master_does_not_keep_the_rendezvous() -> None:
    try:
        here = interface_to("192.0.2.1").address
    except ValueError:
        pytest.skip("this machine has no route to anywhere")
    command = dry("--master", "192.0.2.1", "--nodes", "2", "--via", "rendezvous")
    assert value(command, "--rdzv_conf").startswith("is_host=false")
    assert value(command, "--local_addr") == here


def test_a_hostfile_goes_to_deepspeed(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=8\nb slots=8\n")
    command = dry("--hostfile", str(hostfile), "--master", "a")
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert value(command, "--hostfile") == str(hostfile) and value(command, "--master_addr") == "a"


def test_what_is_started_sees_no_pod_for_a_rank_and_knows_how_it_was_started(
    tmp_path: Path,
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n'
        'echo "rank ${RANK-none} of ${WORLD_SIZE-none} at ${MASTER_ADDR-none}"\n'
        'echo "$NPU_QAT_LAUNCH"\n'
    )
    python.chmod(0o755)
    pod = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = script(*JOB, PYTHON=str(python), **pod)
    first, launch = done.stdout.splitlines()
    assert first == "rank none of none at none"
    assert shlex.split(launch) == [str(SCRIPT), *JOB]


def stand_in(folder: Path, text: str) -> str:
    """A program in the place of Python, which the script takes for the launcher."""
    program = folder / "launcher"
    program.write_text(text)
    program.chmod(0o755)
    (folder / "hostfile").write_text("a slots=1\nb slots=1\n")
    return str(program)


def test_secrets_reach_neither_the_file_nor_the_launcher(tmp_path: Path) -> None:
    """What is carried can be read by all: ps shows the arguments of ssh, the launcher logs them."""
    python = stand_in(tmp_path, '#!/bin/sh\ncat "$DS_ENV_FILE"\necho ---\nenv\n')
    secrets = {
        "HF_TOKEN": "hf_hidden",
        "HUGGING_FACE_HUB_TOKEN": "hf_hidden",
        "WANDB_API_KEY": "hidden",
        "MLFLOW_TRACKING_PASSWORD": "hidden",  # DeepSpeed itself carries MLFLOW*
        "NPU_QAT_SECRET": "hidden",
    }
    carried = {"HF_HOME": "/models/hub", "TOKENIZERS_PARALLELISM": "false", "MINE": "a 'b'"}
    words = ["--hostfile", str(tmp_path / "hostfile"), "--env", "MINE", *JOB]
    done = script(*words, PYTHON=python, UNNAMED="x", **secrets, **carried)
    assert done.returncode == 0, done.stderr
    file, _, seen = done.stdout.partition("---\n")
    assert "hidden" not in file + seen
    found = dict(line.split("=", 1) for line in file.splitlines())
    assert {k: shlex.split(found[k]) for k in carried} == {k: [v] for k, v in carried.items()}
    assert not (secrets.keys() | {"UNNAMED"}) & found.keys()


def test_the_script_ends_after_the_launcher_that_it_stops(tmp_path: Path) -> None:
    slow = """#!/usr/bin/env bash
trap 'sleep 0.5; echo ended; exit 7' TERM
echo ready
while :; do sleep 0.05; done
"""
    command = [SCRIPT, "--hostfile", tmp_path / "hostfile", *JOB]
    env = {**os.environ, "PYTHON": stand_in(tmp_path, slow), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) == 7
        assert started.stdout.read() == "ended\n"
    assert not list(tmp_path.glob("tmp.*")), "the file of variables is gone"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "2", *JOB], "needs --master HOST"),
        (["--master", "a", *JOB], "needs --nodes"),
        ([*MASTER, "--node-rank", "2", *JOB], "--node-rank is 2, but --nodes is 2"),
        ([*MASTER, "--via", "pods", *JOB], "needs --node-rank"),
        ([*MASTER, "--via", "mpi", *JOB], "hostfile, pods or rendezvous"),
        ([*MASTER, "--devices", "many", *JOB], "--devices is 'many'"),
        (["--hostfile", "/nowhere", *JOB], "'/nowhere' is not there"),
        (["--hostfile", "/nowhere", "--env", "MY_API_KEY", *JOB], "log in on each machine"),
        (
            ["--master", "no-such-host.invalid", "--nodes", "2", "--wait", "1", *JOB],
            "does not resolve",
        ),
        ([*MASTER], "no command behind --"),
        (["train", "x"], "'train' is no option"),
        (["--speed", "9", *JOB], "unknown option '--speed'"),
        (["--nodes"], "--nodes needs a value"),
    ],
)
def test_mistakes_are_told_and_nothing_starts(words: list[str], told: str) -> None:
    done = script(*words)
    assert done.returncode != 0 and done.stdout == ""
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


def test_help_names_every_option() -> None:
    done = script("--help")
    assert done.returncode == 0
    options = set(re.findall(r"^    (--[a-z-]+)\)", SCRIPT.read_text(), re.MULTILINE))
    assert len(options) >= 8 and all(option in done.stdout for option in options)
