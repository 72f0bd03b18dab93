"""Two machines, in two network namespaces of this one: launch, pre-check, loss of one, resume.

Over gloo. What it cannot show: HCCL and NCCL between machines, real networks, several clocks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import Node, TwoNodes, why_not
from tests.experiments.running import configuration, metrics
from tests.training.launching import BIN, ROOT, launch
from tests.training.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.distributed

SCRIPT = ROOT / "scripts" / "launch_multinode.sh"
PORT = 29517
STEPS = 4
# A rank that has broken off hears the verdict within about ten seconds; the machine is busy.
SOON = 40.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    if reason := why_not():
        pytest.skip(reason)
    with TwoNodes() as made:
        yield made


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny model in fp32, where another split of rows changes the last digits only."""
    folder = tmp_path_factory.mktemp("job")
    content = configuration(
        save_tiny_checkpoint(folder / "model"),
        model={"dtype": "fp32"},
        train={"steps": STEPS, "checkpoint_every": 2, "micro_batch_size": 3},
        evaluation={"problems": 7, "baselines": ["bf16_lora"]},
        deepspeed={"zero_stage": 2},
    )
    path = folder / "config.yaml"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def straight(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process without a launcher."""
    output = tmp_path_factory.mktemp("straight") / "run"
    launch("python", 1, ["-m", "npu_qat", *train(config, output)])
    return output


def train(config: Path, output: Path, *more: str) -> list[str]:
    return ["train", str(config), "--device", "cpu", "--output", str(output), *more]


def by_script(nodes: Sequence[Node], way: str, rank: int, *options: str) -> list[str]:
    """The command line of machine ``rank``."""
    words = [str(SCRIPT), "--via", way, "--master", f"{nodes[0].address}:{PORT}", "--nodes", "2"]
    if way == "pods":
        words += ["--node-rank", str(rank)]
    return [*words, "--devices", "1", *options, "--"]


def start_both(
    nodes: Sequence[Node], way: str, job: Sequence[str], logs: Path, **start: Any
) -> list[subprocess.Popen[bytes]]:
    return [
        node.start(
            [*by_script(nodes, way, rank), *job],
            logs / f"{node.host}.log",
            variables(),
            **start if rank == 1 else {},
        )
        for rank, node in enumerate(nodes)
    ]


def variables(**more: str) -> dict[str, str]:
    return {"PYTHON": str(BIN / "python"), "NPU_QAT_PEER_TIMEOUT": "15", **more}


def finish(started: Sequence[subprocess.Popen[bytes]], seconds: float = 240) -> list[int]:
    until = time.monotonic() + seconds
    return [process.wait(max(until - time.monotonic(), 1)) for process in started]


def said(logs: Path, node: Node) -> str:
    return (logs / f"{node.host}.log").read_text()


def await_step(output: Path, step: int, started: Sequence[subprocess.Popen[bytes]]) -> None:
    sign = output / "checkpoints" / "w4a4" / f"step-{step:06d}"
    until = time.monotonic() + 120
    while not sign.exists():
        assert time.monotonic() < until and all(p.poll() is None for p in started), "no checkpoint"
        time.sleep(0.02)


# --- starting -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(nodes: tuple[Node, Node], config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by a rendezvous of both machines, and of what they said."""
    folder = tmp_path_factory.mktemp("whole")
    codes = finish(start_both(nodes, "rendezvous", train(config, folder / "run"), folder))
    assert codes == [0, 0], said(folder, nodes[0])[-3000:] + said(folder, nodes[1])[-3000:]
    return folder


def test_a_rendezvous_gives_the_run_of_one_process(
    nodes: tuple[Node, Node], straight: Path, whole: Path
) -> None:
    same_run(whole / "run", straight)
    printed = said(whole, nodes[0]) + said(whole, nodes[1])
    assert printed.count(f"w4a4 {STEPS}/{STEPS}") == 1, "one rank speaks"


SSH = """#!/bin/sh
# ssh [options] HOST COMMAND: a clean environment on that machine, as ssh gives.
while [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
host=$1; shift
exec env -i PATH="$PATH" HOME="$HOME" ip netns exec "$(cat NAMES/"$host")" \\
  unshare --uts sh -c 'hostname "$0"; eval "$1"' "$host" "$*"
"""
PDSH = """#!/bin/sh
# pdsh -S -f FANOUT -w HOSTS COMMAND: by ssh on each host, %n is its number.
while [ "${1#-}" != "$1" ]; do
  case $1 in -w) hosts=$2; shift ;; -f) shift ;; esac
  shift
done
number=0; started=
for host in $(echo "$hosts" | tr , ' '); do
  ssh "$host" "$(echo "$*" | sed "s/%n/$number/g")" &
  started="$started $!"; number=$((number + 1))
done
code=0
for one in $started; do wait "$one" || code=$?; done
exit $code
"""


def test_a_hostfile_on_one_machine_starts_both(
    nodes: tuple[Node, Node], config: Path, straight: Path, tmp_path: Path
) -> None:
    """pdsh and ssh are stand-ins that enter the other namespace with a clean environment."""
    (tmp_path / "names").mkdir()
    (tmp_path / "bin").mkdir()
    for node in nodes:
        (tmp_path / "names" / node.host).write_text(node.namespace)
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (tmp_path / "bin" / name).write_text(text.replace("NAMES", str(tmp_path / "names")))
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "hostfile").write_text("".join(f"{node.host} slots=1\n" for node in nodes))
    words = [str(SCRIPT), "--hostfile", str(tmp_path / "hostfile")]
    words += ["--master", f"{nodes[0].host}:{PORT}", "--env", "MY_OWN", "--"]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    env = variables(PATH=path, MY_OWN="a value; with 'signs'", TMPDIR=str(tmp_path))
    job = train(config, tmp_path / "run")
    started = nodes[0].start([*words, *job], tmp_path / "node-a.log", env)
    assert finish([started]) == [0], said(tmp_path, nodes[0])[-4000:]
    same_run(tmp_path / "run", straight)
    assert not list(tmp_path.glob("tmp.*")), "the file of variables is gone"


def same_run(found: Path, wanted: Path) -> None:
    for name in (path.name for path in (wanted / "evaluations").iterdir()):
        mine, theirs = ((f / "evaluations" / name).read_text() for f in (found, wanted))
        assert mine == theirs, name
    assert_close(metrics(found), metrics(wanted))
    summary = json.loads((found / "summary.json").read_text())
    assert summary["audit"] == "pass" and len(summary["arms"]) == 3


def assert_close(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(mine) == len(theirs) == 2 * STEPS
    for line, other in zip(mine, theirs, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[key], rel=2e-3, abs=2e-5), key
            else:
                assert value == other[key], key


# --- pre-checks -----------------------------------------------------------------------------


def test_doctor_finds_two_machines_that_agree(
    nodes: tuple[Node, Node], config: Path, tmp_path: Path
) -> None:
    job = ["doctor", "--cluster", str(config), "--device", "cpu", "--output", str(tmp_path)]
    assert finish(start_both(nodes, "pods", job, tmp_path)) == [0, 0], said(tmp_path, nodes[0])
    printed = said(tmp_path, nodes[0])
    assert "2 processes on 2 hosts. node-a: ranks 0; node-b: ranks 1" in printed
    for node in nodes:
        assert f"{node.host}: {node.card} {node.address}" in printed
    assert re.search(r"bus bandwidth \d", printed) and "all-reduce bf16" in printed
    assert "every rank sees what rank 0 writes" in printed
    assert "nothing that training needs is missing" in printed
    assert "processes  hosts" not in said(tmp_path, nodes[1]), "one rank speaks"


def test_doctor_names_the_machine_that_differs(
    nodes: tuple[Node, Node], config: Path, tmp_path: Path
) -> None:
    """Another configuration, another variable, and a folder that is not shared, on node-b."""
    own = tmp_path / "runs"
    own.mkdir()
    job = ["doctor", "--cluster", str(config), "--device", "cpu", "--output", str(own / "run")]
    started = [
        nodes[0].start([*by_script(nodes, "pods", 0), *job], tmp_path / "node-a.log", variables()),
        nodes[1].start(
            [*by_script(nodes, "pods", 1), *job, "--set", "train.lr=0.5"],
            tmp_path / "node-b.log",
            variables(HCCL_CONNECT_TIMEOUT="7"),
            own=own,
        ),
    ]
    assert finish(started) == [1, 1]
    printed = " ".join(said(tmp_path, nodes[0]).split())
    assert re.search(r"configuration missing differs: \w+ on node-a; \w+ on node-b", printed)
    assert re.search(r"HCCL_CONNECT_TIMEOUT warning differs: not set on node-a; 7 on n", printed)
    assert "of node-a is not seen by node-b" in printed
    assert "missing: configuration" in printed


def test_a_machine_that_does_not_reach_the_rendezvous_says_why(
    nodes: tuple[Node, Node], config: Path, tmp_path: Path
) -> None:
    for rank, address, words in [
        (1, f"{nodes[0].address}:{PORT}", "nothing listens there"),
        (1, "10.99.0.1:29500", "no route to 10.99.0.1"),
    ]:
        options = ["--master", address, "--wait", "2"]
        command = [*by_script(nodes, "pods", rank, *options), *train(config, tmp_path / "run")]
        started = nodes[1].start(command, tmp_path / "node-b.log", variables())
        assert finish([started], 30) == [2]
        printed = " ".join(said(tmp_path, nodes[1]).split())
        assert words in printed and "nothing was started" in printed
    assert not (tmp_path / "run").exists()


# --- losing a machine -----------------------------------------------------------------------


def test_a_killed_machine_ends_the_other_and_the_run_goes_on_digit_for_digit(
    nodes: tuple[Node, Node], config: Path, whole: Path, tmp_path: Path
) -> None:
    """Under the launcher for pods; the whole run was under a rendezvous. The machines share no
    run directory here: node-b sees an empty folder of its own."""
    parts = tmp_path / "parts"
    parts.mkdir()
    job = train(config, parts / "run")
    started = start_both(nodes, "pods", job, tmp_path, own=parts)
    await_step(parts / "run", 2, started)
    nodes[1].kill()
    killed = time.monotonic()
    assert started[0].wait(SOON) == 75, said(tmp_path, nodes[0])[-3000:]
    print(f"node-a stopped {time.monotonic() - killed:.1f} s after node-b was killed")
    started[1].wait(10)
    message = next(x for x in said(tmp_path, nodes[0]).splitlines() if x.startswith("error:"))
    assert "node-b (rank 1): no sign of life" in message
    again = f"scripts/launch_multinode.sh --via pods --master {nodes[0].address}:{PORT}"
    assert again in message and message.endswith("--resume auto")
    assert len(metrics(parts / "run")) < 2 * STEPS, "it was killed in the middle"
    assert not nodes[0].processes(), "nothing is left on the machine that stopped"

    job += ["--resume", "auto"]
    swapped = (nodes[1], nodes[0])
    master = ["--master", f"{nodes[1].address}:{PORT}"]
    started = [
        node.start(
            [*by_script(nodes, "pods", rank, *master), *job],
            tmp_path / f"swapped-{rank}.log",
            variables(),
            own=parts if node is nodes[1] else None,
        )
        for rank, node in enumerate(swapped)
    ]
    assert finish(started) == [2, 2]
    told = (tmp_path / "swapped-0.log").read_text()
    assert "rank 0 is on node-b now" in told and "give node-a node rank 0" in told

    codes = finish(start_both(nodes, "pods", job, tmp_path, own=parts))
    assert codes == [0, 0], said(tmp_path, nodes[0])[-3000:]
    assert "going on after step" in said(tmp_path, nodes[0])
    assert metrics(parts / "run") == metrics(whole / "run")
    for name in (path.name for path in (whole / "run" / "evaluations").iterdir()):
        files = [folder / "run" / "evaluations" / name for folder in (whole, parts)]
        assert files[0].read_text() == files[1].read_text(), name


def test_a_machine_whose_cable_is_pulled_ends_both_with_a_message(
    nodes: tuple[Node, Node], config: Path, tmp_path: Path
) -> None:
    """No connection is closed: without a watch both would wait for 10 minutes."""
    job = train(config, tmp_path / "run", "--set", "train.steps=500")
    started = start_both(nodes, "pods", job, tmp_path)
    try:
        await_step(tmp_path / "run", 2, started)
        nodes[1].unplug()
        pulled = time.monotonic()
        codes = finish(started, 15 + SOON)
        print(f"both stopped {time.monotonic() - pulled:.1f} s after the cable was pulled")
    finally:
        for node in nodes:
            node.kill()
        nodes[1].plug()
    assert codes == [75, 75]
    assert "node-b (rank 1): no sign of life" in said(tmp_path, nodes[0])
    assert f"node-a (rank 0), with the rendezvous at {nodes[0].address}" in said(tmp_path, nodes[1])
