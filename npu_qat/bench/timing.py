"""Times of several functions, taken in turns.

**CPU.** A clock around enough calls to fill a few milliseconds: of the time that passes, or with
one thread of the processor time that the calls use, which does not count the turns of other
programs on a busy machine.

**CUDA and NPU.** Events around work that is queued, after a kernel that overwrites the L2 cache, so
that each sample reads its inputs from memory. On CUDA a call that is short against its launch is
captured in a graph first, several calls on different inputs; a replay then shows what the kernels
cost, as they run in a model whose launches are captured or hidden. What launching costs is a row of
its own (``eager``). A function that cannot be captured is measured without a graph, and so is its
baseline.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]
SAMPLE_SECONDS = 3e-3  # a CPU sample is at least this long
WARM_SECONDS = 20e-3
LONG_SECONDS = 10e-3
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU


@dataclass(frozen=True)
class Times:
    """Milliseconds a call, one number a sample."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def least(self) -> float:
        return min(self.samples)


@dataclass
class Clock:
    """Measures on one device.

    Attributes:
        device: where the functions run.
        repeats: samples of each function.
        warm_up: calls of each before the first sample.
    """

    device: torch.device
    repeats: int = 15
    warm_up: int = 2
    _flush: torch.Tensor | None = field(default=None, repr=False)

    def measure(self, calls: Mapping[str, Call], *, repeats: int | None = None) -> dict[str, Times]:
        """Times of each function, sampled in turns: first of each, second of each, and so on."""
        warm = {name: self._warm(call) for name, call in calls.items()}
        sample = self._wall_sample if self.device.type == "cpu" else self._event_sample
        if self.device.type == "cpu":
            inner = {name: self._inner(call) for name, call in calls.items()}
        else:  # what is long needs no call before each sample
            inner = {name: int(seconds < LONG_SECONDS) for name, seconds in warm.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats or self.repeats):
            for name, call in calls.items():
                samples[name].append(sample(call, inner[name]))
        return {name: Times(tuple(values)) for name, values in samples.items()}

    def measure_graphs(self, calls: Mapping[str, Sequence[Call]]) -> dict[str, Times]:
        """Times of one call of each, replayed from a CUDA graph that holds all of a sequence.

        Raises RuntimeError where a function cannot be captured.
        """
        graphs = {name: capture(sequence) for name, sequence in calls.items()}
        found = self.measure({name: graph.replay for name, graph in graphs.items()})
        return {
            name: Times(tuple(s / len(calls[name]) for s in times.samples))
            for name, times in found.items()
        }

    def _warm(self, call: Call) -> float:
        """At least ``warm_up`` calls; of a short one so many that clocks and caches settle.

        Returns the seconds of a call.
        """
        start = time.perf_counter()
        done = 0
        while done < 20 * self.warm_up:
            call()
            done += 1
            if done >= self.warm_up and time.perf_counter() - start > WARM_SECONDS:
                break
        if self.device.type != "cpu":
            accelerator(self.device).synchronize()
        return (time.perf_counter() - start) / max(done, 1)

    def _inner(self, call: Call) -> int:
        """Calls in a sample on a CPU."""
        start = time.perf_counter()
        call()
        return max(1, int(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-7)))

    def _wall_sample(self, call: Call, inner: int) -> float:
        now = time.process_time if self.counts_processor_time else time.perf_counter
        start = now()
        for _ in range(inner):
            call()
        return (now() - start) * 1e3 / inner

    @property
    def counts_processor_time(self) -> bool:
        """Whether samples are processor time, not time that passed."""
        return self.device.type == "cpu" and torch.get_num_threads() == 1

    def _event_sample(self, call: Call, inner: int) -> float:
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        if inner:
            # After other functions the host is slow the first time, which would count as theirs.
            call()
        self._flush.zero_()
        event = accelerator(self.device).Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def accelerator(device: torch.device) -> Any:
    """``torch.cuda`` or ``torch.npu``, which answer the same calls."""
    return getattr(torch, device.type)


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call after another. Raises RuntimeError where that is impossible."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
