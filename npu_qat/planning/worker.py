"""One process measures: a model is built, and its updates and rollouts are timed and weighed.

Models have the architecture of a real one and random weights. An update is the product's own: the
``Engine`` (DeepSpeed) around quantised linears and LoRA, the loss of supervised fine-tuning on
sequences that are a quarter prompt and three quarters completion. A rollout is the product's own
sampler.

Peaks are those of the device's allocator. On a CPU they are the largest sum of live tensors that
the profiler saw, which leaves out what the process holds besides tensors, and seconds are those of
the processor.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from npu_qat.planning.cases import RANK, TARGETS, Decode, Job, Update
from npu_qat.planning.model import architecture

if TYPE_CHECKING:
    import torch

    from npu_qat.backends import Selection
    from npu_qat.training.batches import Sample
    from npu_qat.training.engine import Engine

MICRO_BATCHES = 2
# Decoding is measured by the difference of two lengths, which leaves prefill and recording out.
SHORT, LONG = 17, 81


class Meter:
    """Clock and peak memory of one device.

    Args:
        device: where tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self.accelerator = None if device.type == "cpu" else getattr(torch, device.type)

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.accelerator is not None:
            self.accelerator.synchronize()

    def seconds(self) -> float:
        """A clock that has waited for the device. On a CPU it counts processor time, which leaves
        out the turns of other programs (and waiting for other processes)."""
        if self.accelerator is None:
            return time.process_time()
        self.synchronize()
        return time.perf_counter()

    def allocated(self) -> int:
        """Bytes of live tensors; 0 on a CPU, where nobody counts them."""
        return 0 if self.accelerator is None else int(self.accelerator.memory_allocated())

    def free(self) -> None:
        """Give back what nothing refers to."""
        gc.collect()
        if self.accelerator is not None:
            self.accelerator.empty_cache()

    def peak(self, call: Callable[[], Any]) -> dict[str, int]:
        """Bytes: ``before`` the call, and the ``peak`` in it; with an accelerator its ``reserved``
        pool as well. On a CPU ``before`` is 0 and the peak counts from the start of the call."""
        if self.accelerator is None:
            return {"before": 0, "peak": profiled_peak(call)}
        self.synchronize()
        self.accelerator.reset_peak_memory_stats()
        before = self.allocated()
        call()
        self.synchronize()
        return {
            "before": before,
            "peak": int(self.accelerator.max_memory_allocated()),
            "reserved": int(self.accelerator.max_memory_reserved()),
        }


def profiled_peak(call: Callable[[], Any]) -> int:
    """Most bytes of tensors made in ``call`` that were alive at one time, on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return int(most)


def update_batches(update: Update, vocabulary: int) -> list[list[Sample]]:
    """``MICRO_BATCHES`` micro-batches; a quarter of the tokens are prompt."""
    from npu_qat.training.batches import Sample

    prompt = update.tokens // 4

    def sample(i: int, length: int) -> Sample:
        ids = [(7 * j + 13 * i) % vocabulary for j in range(length)]
        return Sample(ids[:prompt], ids[prompt:])

    rows = [
        sample(i, update.tokens - int(update.ragged and i == 1)) for i in range(update.sequences)
    ]
    return [rows] * MICRO_BATCHES


def one_update(
    engine: Engine, batches: list[list[Sample]], meter: Meter
) -> tuple[list[float], float]:
    """An update as ``training/sft.py`` makes it: (seconds of each micro-batch, of the step)."""
    from npu_qat.training.batches import collate, completion_logp

    tokens = sum(s.tokens for micro in batches for s in micro)
    seconds = []
    for i, micro in enumerate(batches):
        started = meter.seconds()
        batch = collate(micro, 0, engine.device)
        losses = -completion_logp(engine.ds, batch)
        loss = (losses * batch.mask).sum() / tokens
        float(loss.detach())  # the product looks at the loss, which waits for the forward pass
        engine.backward(loss * engine.world_size, last=i == len(batches) - 1)
        if i < len(batches) - 1:
            engine.between_micro_batches()
        seconds.append(meter.seconds() - started)
    started = meter.seconds()
    engine.step()
    return seconds, meter.seconds() - started


class Worker:
    """One process of a group.

    Args:
        selection: device and backend.
        deadline: ``time.time()`` after which no case begins.
        write: gets each row, on rank 0.
    """

    def __init__(
        self, selection: Selection, deadline: float, write: Callable[[dict[str, Any]], None]
    ) -> None:
        from npu_qat.training.engine import world

        self.selection, self.deadline = selection, deadline
        self.rank, self.world = world()
        self.meter = Meter(selection.device)
        self.quick = selection.device.type == "cpu"
        self._write = write

    def row(self, kind: str, **found: Any) -> None:
        """Write a row, from rank 0."""
        if self.rank == 0:
            self._write({"kind": kind, "processes": self.world, **found})

    def over(self) -> bool:
        """Whether time is up, by the clock of rank 0."""
        import torch

        flag = torch.tensor([float(time.time() > self.deadline)], device=self.selection.device)
        if self.world > 1:
            torch.distributed.broadcast(flag, 0)
        return bool(flag.item())

    # --- the device ------------------------------------------------------------------------

    def probe(self) -> None:
        """What the device makes of one matmul and one copy."""
        import torch

        n, device = (256 if self.quick else 8192), self.selection.device
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        big = torch.empty((1 << 22) if self.quick else (1 << 30), dtype=torch.uint8, device=device)
        other = torch.empty_like(big)
        matmul = self._best(lambda: a @ b)
        copy = self._best(lambda: other.copy_(big))
        self.row("probe", flops=2 * n**3 / matmul, bandwidth=2 * big.numel() / copy)

    def collectives(self) -> None:
        """Seconds of an all-gather and an all-reduce, large and small."""
        import torch
        from torch import distributed

        if self.world == 1:
            return
        for size in (1 << 12, 1 << (20 if self.quick else 28)):
            whole = torch.zeros(size, dtype=torch.uint8, device=self.selection.device)
            mine = whole[: size // self.world].clone()
            numbers = torch.zeros(size // 4, device=self.selection.device)
            gather = self._best(partial(distributed.all_gather_into_tensor, whole, mine))
            reduce = self._best(partial(distributed.all_reduce, numbers))
            self.row("collective", bytes=size, all_gather=gather, all_reduce=reduce)

    def _best(self, call: Callable[[], Any]) -> float:
        call()
        samples = []
        for _ in range(5):
            started = self.meter.seconds()
            call()
            samples.append(self.meter.seconds() - started)
        return min(samples)

    # --- jobs ------------------------------------------------------------------------------

    def run(self, job: Job) -> None:
        """Build the model and measure its cases; what fails is a row."""
        if self.over():
            return
        self.meter.free()
        outside = self.meter.allocated()
        common = {
            "model": job.model,
            "changes": job.changes,
            "storage": job.storage,
            "zero": job.zero,
            "bucket": job.bucket,
            "outside": outside,
        }
        try:
            self._job(job, common)
        except Exception as error:
            self.row("error", **common, error=_first_line(error))
        self.meter.free()

    def _job(self, job: Job, common: dict[str, Any]) -> None:
        from npu_qat.bench.models import random_model
        from npu_qat.config import DeepSpeedSection, LoraSection, Recipe, TrainConfig
        from npu_qat.layers import add_lora, prepare_model
        from npu_qat.training.engine import Engine

        device = self.selection.device
        config = architecture(job.model, **job.changes)
        started = self.meter.seconds()
        model = random_model(config, device)
        loaded = self.meter.allocated()
        held: dict[str, Any] = {}

        def prepare() -> None:
            held["handle"] = prepare_model(
                model, Recipe(base_storage=job.storage), self.selection.backend
            )

        preparing = self.meter.peak(prepare)
        stored = self.meter.allocated()
        adapted = add_lora(model, LoraSection(r=RANK, alpha=RANK, targets=TARGETS), 0)
        adapted.train()
        overrides: dict[str, Any] = {}
        if job.bucket is not None:
            overrides = {"zero_optimization": {"reduce_bucket_size": job.bucket}}
        section = DeepSpeedSection(zero_stage=job.zero, overrides=overrides)
        engine = Engine(adapted, TrainConfig(), section)
        self.meter.free()
        self.row(
            "build",
            **common,
            loaded_bytes=loaded,
            preparing_peak=preparing["peak"],
            stored_bytes=stored,
            engine_bytes=self.meter.allocated(),
            seconds=self.meter.seconds() - started,
        )
        try:
            with held["handle"].phase("training"):
                for update in job.updates:
                    if self.over():
                        break
                    self._update(adapted, engine, update, config.vocab_size, common)
            with engine.for_generation() as whole, held["handle"].phase("rollout"):
                self._decode(job.decodes, whole, common)
        finally:
            engine.ds.destroy()

    def _update(
        self, adapted: Any, engine: Engine, update: Update, vocabulary: int, common: dict[str, Any]
    ) -> None:
        found: dict[str, Any] = {**common, **asdict(update)}
        try:
            if update.checkpointing:
                adapted.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                adapted.gradient_checkpointing_disable()
            batches = update_batches(update, vocabulary)
            self.meter.free()
            one_update(engine, batches[:1], self.meter)  # compiles, makes the gradients
            peak = self.meter.peak(lambda: one_update(engine, batches, self.meter))
            timed = [one_update(engine, batches, self.meter) for _ in range(2)]
            micro = [s for seconds, _ in timed for s in seconds]
            forward = min(self._forward_seconds(engine, batches[0]) for _ in range(2))
            self.row(
                "update",
                **found,
                **peak,
                micro_seconds=statistics.median(micro),
                micro_seconds_least=min(micro),
                step_seconds=min(step for _, step in timed),
                forward_seconds=forward,
            )
        except Exception as error:
            self.row("error", **found, error=_first_line(error))
            if self.world > 1:
                raise  # the other processes wait in a collective: this job cannot go on
            engine.ds.zero_grad()
            self.meter.free()

    def _forward_seconds(self, engine: Engine, samples: list[Sample]) -> float:
        """Of the pass that gives the policy before the first update its log-probabilities."""
        import torch

        from npu_qat.training.batches import collate, completion_logp

        started = self.meter.seconds()
        with torch.no_grad(), engine.evaluation_mode():
            completion_logp(engine.ds, collate(samples, 0, engine.device)).tolist()
        return self.meter.seconds() - started

    def _decode(self, decodes: Sequence[Decode], model: Any, common: dict[str, Any]) -> None:
        from npu_qat.training.decode import can_record, roomy_cache
        from npu_qat.training.rollout import SamplingParams, sample

        short, long = (5, 13) if self.quick else (SHORT, LONG)
        recorded = can_record(model, roomy_cache(model.config, long))
        for decode in decodes:
            if self.over():
                return
            found = {**common, **asdict(decode), "new_tokens": long, "recorded": recorded}
            prompts = [
                [1 + (i + j) % 500 for j in range(decode.prompt)] for i in range(decode.sequences)
            ]

            def rollout(tokens: int, prompts: Sequence[list[int]] = prompts) -> float:
                started = self.meter.seconds()
                sample(
                    model,
                    prompts,
                    [(i,) for i in range(len(prompts))],
                    SamplingParams(tokens),
                    eos_ids=[-1],
                    pad_id=0,
                    batch_size=len(prompts),
                )
                return self.meter.seconds() - started

            try:
                self.meter.free()
                rollout(1)
                peak = self.meter.peak(lambda: rollout(long))
                prefill = min(rollout(1) for _ in range(2))
                few, many = rollout(short), rollout(long)
                step = (many - few) / (long - short)
                self.row("decode", **found, **peak, prefill_seconds=prefill, token_seconds=step)
            except Exception as error:
                self.row("error", **found, error=_first_line(error))
                self.meter.free()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
