"""Whether the ranks compute the right sum together, and how fast.

Bus bandwidth is what the slowest link carries in a ring all-reduce of n bytes in t seconds over W
ranks: ``2 (W - 1) / W * n / t`` (the definition of nccl-tests). It is to be compared with the link:
25 Gbit/s are about 3 GB/s.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from npu_qat.cluster.check import Check

# Bytes of the all-reduce that is timed: large enough to hide latency, small enough for one second.
BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20, "npu": 256 * 2**20}
REPEATS = 5
# A clock that is further off than this puts the records of two machines into the wrong order.
SKEW_LIMIT = 2.0


def correctness(device: Any) -> list[Check]:
    """The collectives that training uses, with values whose results are exact.

    Every rank must call this; a wrong result on any of them is found on all.
    """
    import torch
    from torch import distributed

    rank, count = distributed.get_rank(), distributed.get_world_size()
    pattern = torch.arange(2**16, device=device) % 2
    cases = [("fp32", torch.float32, rank + 1, count * (count + 1) // 2)]
    cases += [("int64", torch.int64, rank + 1, count * (count + 1) // 2)]
    if count <= 256:  # bf16 counts no further
        cases.append(("bf16", torch.bfloat16, 1, count))
    results = []
    for name, dtype, factor, total in cases:
        value = (pattern * factor).to(dtype)
        distributed.all_reduce(value)
        right = torch.equal(value, (pattern * total).to(dtype))
        results.append((f"all-reduce {name}", right))
    mine = torch.full((3,), rank, dtype=torch.int64, device=device)
    everyone = mine.new_empty(3 * count)
    distributed.all_gather_into_tensor(everyone, mine)
    wanted = torch.arange(count, device=device).repeat_interleave(3)
    results.append(("all-gather int64", torch.equal(everyone, wanted)))
    shared = torch.full((5,), float(rank), device=device)
    distributed.broadcast(shared, src=0)
    results.append(("broadcast", bool((shared == 0).all())))
    found = _everyones([name for name, right in results if not right])
    wrong = [f"{name} on rank {r}" for r, names in enumerate(found) for name in names]
    backend = distributed.get_backend()
    if wrong:
        advice = "the interconnect or its library returns wrong numbers: do not train on it"
        return [Check("network", "collectives", "missing", f"wrong: {'; '.join(wrong)}", advice)]
    names = ", ".join(name for name, _ in results)
    return [Check("network", "collectives", "ok", f"{backend}, exact: {names}")]


def speed(device: Any) -> Check:
    """Bandwidth of a large all-reduce and the time of a small one."""
    import torch
    from torch import distributed

    count = distributed.get_world_size()
    data = torch.zeros(BYTES[device.type] // 4, device=device)
    tiny = torch.zeros(1, device=device)
    large = _seconds(lambda: distributed.all_reduce(data), device)
    small = _seconds(lambda: distributed.all_reduce(tiny), device)
    bus = 2 * (count - 1) / count * data.numel() * 4 / large
    return Check(
        "network",
        "speed",
        "ok",
        f"all-reduce of {BYTES[device.type] // 2**20} MiB: {large * 1e3:.1f} ms, bus bandwidth "
        f"{bus / 1e9:.2f} GB/s; of 4 bytes: {small * 1e6:.0f} us (medians of {REPEATS})",
    )


def clocks(facts: Sequence[dict[str, Any]], device: Any) -> Check:
    """How far the clocks of the hosts are apart, as far as a barrier can tell (milliseconds)."""
    import torch
    from torch import distributed

    offsets: list[list[float]] = []
    for _ in range(REPEATS):
        distributed.barrier()
        _synchronize(device)
        now = torch.tensor([time.time()], dtype=torch.float64).view(torch.int64).to(device)
        everyone = now.new_empty(distributed.get_world_size())
        distributed.all_gather_into_tensor(everyone, now)
        times = everyone.cpu().view(torch.float64).tolist()
        offsets.append([t - times[0] for t in times])
    skew = [statistics.median(column) for column in zip(*offsets, strict=True)]
    return judge_clocks({f["host"]: s for f, s in zip(facts, skew, strict=True)})


def judge_clocks(skew: dict[str, float]) -> Check:
    """``skew``: seconds by which each host's clock is ahead of rank 0's."""
    host, largest = max(skew.items(), key=lambda item: abs(item[1]))
    if abs(largest) <= SKEW_LIMIT:
        return Check("network", "clocks", "ok", f"within {max(abs(largest), 0.001):.3f} s")
    side = "ahead of" if largest > 0 else "behind"
    return Check(
        "network",
        "clocks",
        "warning",
        f"{host} is {abs(largest):.1f} s {side} the host of rank 0",
        "set the clocks by NTP or chrony: times in metrics and logs contradict each other",
    )


def _everyones(mine: Any) -> list[Any]:
    from torch import distributed

    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, mine)
    return found


def _seconds(work: Callable[[], Any], device: Any) -> float:
    """Median seconds of ``work``, after two rounds that nobody counts."""
    taken = []
    for turn in range(REPEATS + 2):
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        if turn >= 2:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _synchronize(device: Any) -> None:
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
