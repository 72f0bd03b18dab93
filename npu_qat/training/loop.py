"""The loop around both methods: steps, learning rate, metrics, checkpoints, stopping.

A step is a rollout with all its updates (dapo) or one update (sft). Learning rate, noise stages and
checkpoints count steps. Every random number is a function of (seed, step), so a resumed run needs
no generator state and repeats the uninterrupted one digit for digit on the same machine.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from npu_qat.config import RunConfig, TrainConfig
from npu_qat.layers import QuantizedModel
from npu_qat.layers.base_model import answer_ids, prompt_ids
from npu_qat.noise import AQN
from npu_qat.noise.evidence import as_row
from npu_qat.tasks import Problem, Task
from npu_qat.training.bad_module import first_bad_module
from npu_qat.training.batches import Batch
from npu_qat.training.checkpoint import Checkpoint, save_checkpoint
from npu_qat.training.dapo import Dapo, Group
from npu_qat.training.distill import Teacher
from npu_qat.training.engine import Engine, TrainingError
from npu_qat.training.rundir import METRICS, SAMPLES, RunDirectory
from npu_qat.training.samplers import ModuleSampler, Sampler
from npu_qat.training.sft import Sft
from npu_qat.training.sharing import load_newest_for_all

# Completions a step that are kept for reading.
SAMPLES_A_STEP = 2


class Interrupted(RuntimeError):
    """The user stopped the run; a checkpoint was written."""


def total_steps(config: RunConfig, problems: int) -> int:
    """Steps of a run: ``train.steps``, or as many as whole passes over the problems allow."""
    if config.train.steps is not None:
        return config.train.steps
    dapo = config.dapo
    per_step = config.sft.batch_size
    if config.train.method == "dapo":
        per_step = dapo.generation_prompts if dapo.dynamic_sampling else dapo.prompts_per_rollout
    steps = config.train.epochs * problems // per_step
    if steps == 0:
        raise ValueError(
            f"{problems} training problems are fewer than one step's {per_step}; set train.steps "
            "or lower the batch"
        )
    return steps


def learning_rate(train: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up over ``warmup_steps``, then the schedule. ``step`` counts from 0."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(steps - train.warmup_steps, 1)
    if train.lr_schedule == "linear":
        return train.lr * (1 - done)
    return train.lr * 0.5 * (1 + math.cos(math.pi * done))


class Learner:
    """One arm of a run: a model that learns, and everything its steps need.

    Args:
        arm: name of the arm in metrics and checkpoints.
        config: the run.
        engine: the model under DeepSpeed.
        quantized: its handle, or None for a 16-bit arm.
        aqn: its noise, or None.
        tokenizer: with a chat template.
        eos_ids: tokens that end a completion.
        task: problems and prompts.
        steps: length of the run.
        rundir: where records go.
        say: prints a line to the user.
        should_stop: asked often; True when the user wants the run to end.
        teacher: what the arm is distilled from, or None.
        sampler: who samples rollouts; default the modules themselves.
    """

    def __init__(
        self,
        arm: str,
        config: RunConfig,
        engine: Engine,
        quantized: QuantizedModel | None,
        aqn: AQN | None,
        tokenizer: Any,
        eos_ids: Sequence[int],
        task: Task,
        steps: int,
        rundir: RunDirectory,
        say: Callable[[str], None],
        should_stop: Callable[[], bool] = lambda: False,
        teacher: Teacher | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self.arm, self.config, self.engine = arm, config, engine
        self.quantized, self.aqn, self.tokenizer = quantized, aqn, tokenizer
        self.eos_ids, self.task, self.steps = list(eos_ids), task, steps
        self.rundir, self.say, self.should_stop = rundir, say, should_stop
        self.teacher = teacher
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = self.eos_ids[0]
        self.sampler: Sampler = sampler or ModuleSampler(
            self.eos_ids, self.pad_id, config.rollout.batch_size
        )
        # What the sampler's comparison with the modules measured, once it was made.
        self.sampler_proof: dict[str, float] = {}
        self.method = Dapo(self) if config.train.method == "dapo" else Sft(self)
        self.updates = 0
        # Steps whose loss held a finite divergence from the teacher.
        self.distilled_steps = 0
        # Steps made by this process; a resumed run that was finished makes none.
        self.steps_made = 0
        self.noise_records: list[dict[str, Any]] = []
        self._order: dict[int, list[int]] = {}

    # --- the run ----------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.rundir.path / "checkpoints" / self.arm

    def run(
        self,
        *,
        resume: bool,
        after_step: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None,
    ) -> None:
        """Train from the newest intact checkpoint (or the start) to the last step.

        Args:
            resume: look for checkpoints; otherwise start at step 0.
            after_step: called with the number of finished steps and the step's metrics.

        Raises:
            Interrupted: the user asked to stop; the state is checkpointed.
            TrainingError: NaN, Inf, or a gap between rollout and training.
        """
        done = self._resume() if resume else 0
        while done < self.steps:
            started = time.time()
            lr = learning_rate(self.config.train, done, self.steps)
            self.engine.set_lr(lr)
            torch.manual_seed(_seed(self.config.run.seed, done, self.engine.rank))
            before = self._counters()
            try:
                metrics = self.method.step(done)
            except _StopNow:
                # Nothing was updated since the last whole step, so this is its state.
                self._load_counters(before)
                self._stop(done)
            done += 1
            self.steps_made += 1
            self.distilled_steps += metrics.get("distill_kl") is not None
            metrics = {"lr": lr, "seconds": time.time() - started, **metrics}
            self.rundir.append(METRICS, {"arm": self.arm, "step": done, "time": started, **metrics})
            # After the record, which shows what stopped the run; before the checkpoint.
            self.method.check(done, metrics)
            # Before the checkpoint: a resumed run does not come back to what follows a saved step.
            after_step(done, metrics)
            due = done % self.config.train.checkpoint_every == 0 or done == self.steps
            if due:
                self.save(done)
            if self._agreed_stop() and done < self.steps:
                if not due:
                    self.save(done)
                raise Interrupted(f"stopped after step {done} of {self.steps}")

    def save(self, step: int) -> None:
        """Write a checkpoint of the state after ``step`` steps."""
        state = self.engine.state()
        if self.rundir.writer:
            save_checkpoint(
                self.checkpoints,
                Checkpoint(step, state, self._counters()),
                self.config.train.keep_checkpoints,
            )
        self.engine.barrier()

    def _counters(self) -> dict[str, Any]:
        """Positions, and the evidence for the audit of the whole run."""
        return {
            "updates": self.updates,
            "distilled_steps": self.distilled_steps,
            "method": self.method.state(),
            "noise": list(self.noise_records),
            "first_gradients": self.engine.first_gradients,
        }

    def _load_counters(self, counters: dict[str, Any]) -> None:
        self.updates = counters["updates"]
        self.distilled_steps = counters["distilled_steps"]
        self.method.load_state(counters["method"])
        self.noise_records = counters["noise"]
        self.engine.keep_first_gradients(counters["first_gradients"])

    def _resume(self) -> int:
        checkpoint = load_newest_for_all(self.checkpoints, self.say, self.engine.device)
        step = 0 if checkpoint is None else checkpoint.step
        if checkpoint is not None:
            self._load_counters(checkpoint.counters)
            self.engine.load_state(checkpoint.state, self.updates)
            self.say(f"{self.arm}: going on after step {step} of {self.steps}")
        self.rundir.forget_after(self.arm, step)
        self.engine.barrier()
        return step

    def _stop(self, done: int) -> None:
        self.save(done)
        raise Interrupted(f"stopped after step {done} of {self.steps}")

    def _agreed_stop(self) -> bool:
        return self.engine.max(float(self.should_stop())) > 0

    def check_stop(self) -> None:
        """Abandon a rollout if the user asked to stop. With several processes the rollout goes on,
        because all of them must stop at the same place: after the step."""
        if self.should_stop() and self.engine.world_size == 1:
            raise _StopNow

    # --- what steps need --------------------------------------------------------------------

    def training_problems(self, start: int, count: int) -> list[Problem]:
        """``count`` problems from position ``start`` of an endless series of shuffled epochs."""
        size = len(self.task.train)
        return [
            self.task.train[self._epoch(i // size)[i % size]] for i in range(start, start + count)
        ]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._order:
            order = list(range(len(self.task.train)))
            random.Random(_seed(self.config.run.seed, epoch)).shuffle(order)
            # The one before may still be asked for: a rollout can run over the end of an epoch.
            self._order = {e: o for e, o in self._order.items() if e == epoch - 1} | {epoch: order}
        return self._order[epoch]

    def encode(self, problem: Problem) -> list[int]:
        """Token ids of the chat prompt that asks ``problem``."""
        ids = prompt_ids(self.tokenizer, self.task.messages(problem))
        if len(ids) > self.config.rollout.max_prompt_tokens:
            raise ValueError(
                f"problem {problem.id} has a prompt of {len(ids)} tokens, above "
                f"rollout.max_prompt_tokens {self.config.rollout.max_prompt_tokens}; raise that"
            )
        return ids

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an assistant's answer, with the token that ends it."""
        return answer_ids(self.tokenizer, text)

    def decode(self, tokens: list[int]) -> str:
        """Text of a completion, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def phase(self, name: str) -> AbstractContextManager[None]:
        """The quantisers' phase."""
        return nullcontext() if self.quantized is None else self.quantized.phase(name)

    def noisy(self, step: int) -> bool:
        """Whether the step has noise in some phase."""
        return self.aqn is not None and self.aqn.due(step)

    @contextmanager
    def noise(self, step: int, phase: str) -> Iterator[dict[str, Any]]:
        """The step's noise on the norms; yields what to put into the metrics."""
        if self.aqn is None:
            yield {"sigma": 0.0, "norms_changed": 0, "sigma_realized": 0.0}
            return
        with self.aqn.applied(step, phase) as record:
            row = as_row(record)
            self.noise_records.append(row)
            yield {key: row[key] for key in ("sigma", "norms_changed", "sigma_realized")}

    def optimizer_step(self, step: int) -> float:
        """Finish an update; returns the gradient norm."""
        try:
            norm = self.engine.step()
        except TrainingError as error:
            raise TrainingError(f"step {step + 1}: {error}") from error
        self.updates += 1
        return norm

    def check_loss(self, loss: torch.Tensor, batch: Batch, step: int) -> None:
        """Raise ``TrainingError`` naming the first bad module if ``loss`` is NaN or Inf, on any
        rank: the others would wait for its gradient."""
        finite = bool(torch.isfinite(loss))
        if self.engine.max(float(not finite)) == 0.0:
            return
        # On all ranks, because a partitioned model's forward pass takes all of them.
        module = first_bad_module(self.engine.ds.module, batch)
        what = (
            "the loss of another process is NaN or Inf; its message names the module"
            if finite
            else f"the loss is {float(loss.detach())}; the first module with NaN or Inf in its "
            f"output is {module}"
        )
        raise TrainingError(
            f"step {step + 1}: {what}. No update was made; the last checkpoint is intact"
        )

    def keep_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Keep a few completions of the step for reading."""
        for group in groups[:SAMPLES_A_STEP]:
            self.rundir.append(
                SAMPLES,
                {
                    "arm": self.arm,
                    "step": step + 1,
                    "question": group.problem.question,
                    "completion": group.texts[0],
                    "reward": group.reward[0],
                    "strict": bool(group.accuracy[0]),
                    "target": group.problem.answer,
                },
            )


class _StopNow(Exception):
    """Raised inside a rollout; nothing has been updated in this step."""


def _seed(*parts: int) -> int:
    """A seed that differs in every part."""
    return random.Random(repr(parts)).getrandbits(63)
