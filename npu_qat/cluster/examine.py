"""All checks of a cluster, on every rank at once: ``npu-qat doctor --cluster``.

Started by the same launcher as training, so that it tests what training will meet: the same names,
ports, interfaces and libraries. Every rank gets the same report; the first prints it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.cluster.check import Check

if TYPE_CHECKING:
    from npu_qat.config import RunConfig


def examine_cluster(
    config: RunConfig | None,
    *,
    device: str = "auto",
    output: Path | None = None,
    rank_table: Path | None = None,
) -> list[Check]:
    """The report, the same on every rank.

    Args:
        config: the run that is meant; without one, configuration, model and data are not compared.
        device: as ``run.device``.
        output: the run directory that is meant; it need not exist.
        rank_table: HCCL's rank table, if the job has one.

    Raises:
        ValueError: this process cannot join the others; the message says why.
        PeerLost: another process went away during the checks.
    """
    from npu_qat.backends import select
    from npu_qat.training.engine import launch_environment, shut_down
    from npu_qat.training.peers import failures_told

    chosen = select(device).device
    launch_environment(chosen)
    try:
        with failures_told():
            return _examine(config, chosen, output, rank_table)
    finally:
        shut_down()


def _examine(
    config: RunConfig | None, device: Any, output: Path | None, rank_table: Path | None
) -> list[Check]:
    import torch

    from npu_qat.cluster import agreement, collectives, hccn, shared_folder
    from npu_qat.cluster import rank_table as tables
    from npu_qat.cluster.facts import collect

    facts = everyones(collect(device, config))
    checks = agreement.compare(facts)
    if len(facts) == 1:
        advice = "start it by the launcher: scripts/launch_multinode.sh ... -- doctor --cluster"
        checks.append(Check("processes", "launch", "warning", "one process alone", advice))
    checks += collectives.correctness(device)
    checks.append(collectives.clocks(facts, device))
    if len(facts) > 1:
        checks.append(collectives.speed(device))
    if output is not None:
        checks.append(shared_folder.look(output, facts, everyones))
    if device.type == "npu":
        checks += hccn.examine(facts, facts[torch.distributed.get_rank()], everyones)
    if rank_table is not None:
        addresses = [a for f in facts for mine in f["addresses"].values() for a in mine]
        found = tables.examine(rank_table, len(facts), addresses)
        checks += _union(facts, everyones(found))
    # What one rank measured, the clock for one, differs in digits: all report what rank 0 saw.
    return list(everyones(checks)[0])


def everyones(mine: Any) -> list[Any]:
    """``mine`` of every rank, in their order."""
    from torch import distributed

    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, mine)
    return found


def rank_table_of_job() -> Path | None:
    """The table that the environment names, or None."""
    named = os.environ.get("RANK_TABLE_FILE") or os.environ.get("GLOBAL_RANK_TABLE_FILE_PATH")
    return Path(named) if named else None


def _union(facts: list[dict[str, Any]], found: list[list[Check]]) -> list[Check]:
    """Checks that a machine makes for itself: those that failed, by host; else the first's."""
    bad = {
        Check(c.area, c.name, c.status, f"{f['host']}: {c.value}", c.advice)
        for f, checks in zip(facts, found, strict=True)
        for c in checks
        if c.status != "ok" and f["local_rank"] == 0
    }
    return sorted(bad, key=lambda c: c.value) or found[0]
