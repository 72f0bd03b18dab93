"""Supervised fine-tuning: imitate the worked solutions, through the same quantised modules.

The loss is the mean over the answer's tokens of the update, on all ranks. A step is one update.
With a teacher (``distill``) each token's loss is mixed with the divergence from it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from npu_qat.training.batches import (
    Sample,
    collate,
    completion_terms,
    data_digest,
    micro_batches,
)

if TYPE_CHECKING:
    from npu_qat.tasks import Problem
    from npu_qat.training.loop import Learner


class Sft:
    """The SFT step.

    Args:
        learner: model, engine, noise, task and configuration of the arm.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner, self.config = learner, learner.config
        self.cursor = 0

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the weights."""
        return {"cursor": self.cursor}

    def load_state(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]

    def check(self, done: int, metrics: dict[str, Any]) -> None:
        """Nothing to gate: there is no rollout to differ from."""

    def step(self, step: int) -> dict[str, Any]:
        """One update; returns its metrics. ``step`` counts from 0."""
        started = time.perf_counter()
        learner, engine = self.learner, self.learner.engine
        problems = learner.training_problems(self.cursor, self.config.sft.batch_size)
        self.cursor += len(problems)
        samples = [self._sample(problem) for problem in problems]
        tokens = sum(s.tokens for s in samples)
        batches = micro_batches(
            samples, self.config.train.micro_batch_size, engine.rank, engine.world_size
        )
        total = divergences = 0.0
        teacher = learner.teacher
        with learner.phase("training"), learner.noise(step, "training") as noise:
            for i, micro in enumerate(batches):
                batch = collate(micro, learner.pad_id, engine.device)
                compare = None if teacher is None else teacher.divergence(batch)
                logp, divergence = completion_terms(engine.ds, batch, compare=compare)
                losses = -logp
                if teacher is not None and divergence is not None:
                    divergences += float((divergence.detach() * batch.mask).sum()) / tokens
                    losses = teacher.mixed(losses, divergence)
                loss = (losses * batch.mask).sum() / tokens
                learner.check_loss(loss, batch, step)
                total += float(loss.detach())
                engine.backward(loss * engine.world_size, last=i == len(batches) - 1)
                if i < len(batches) - 1:
                    engine.between_micro_batches()
            norm = learner.optimizer_step(step)
        seconds = time.perf_counter() - started
        distilled = {} if teacher is None else {"distill_kl": engine.sum(divergences)}
        return {
            "loss": engine.sum(total),
            **distilled,
            "updates": 1,
            "data": data_digest(problems),
            "grad_norm": norm,
            "tokens_per_second": tokens / seconds,
            "update_seconds": seconds,
            **noise,
        }

    def _sample(self, problem: Problem) -> Sample:
        learner, limit = self.learner, self.config.sft.max_tokens
        prompt, answer = learner.encode(problem), learner.encode_answer(problem.solution)
        if len(prompt) + len(answer) > limit:
            raise ValueError(
                f"problem {problem.id} has {len(prompt) + len(answer)} tokens with its solution, "
                f"above sft.max_tokens {limit}"
            )
        return Sample(prompt, answer)
