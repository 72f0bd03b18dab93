"""DAPO (Yu et al., arXiv 2503.14476): reinforcement learning from verifiable rewards.

For each prompt a group of G completions is sampled and rewarded. A completion's advantage is its
reward relative to its group, ``A = (r - mean) / (std + eps)``. Each token then contributes

    L = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),    rho = pi_theta / pi_old

and the loss is the mean over **all tokens of the update, on all ranks** (not a mean of means). What
DAPO adds to GRPO, each switchable: a higher upper clip; dropping groups that are all right or all
wrong, since they carry no gradient, and sampling more; no loss from truncated completions and a
soft penalty before the limit; no KL term.

A teacher (``distill``) adds the divergence from its distribution on the sampled tokens.

What 4 bits add: the sampler and the trainer are the same modules, but noise (AQN), batching and the
KV cache make their distributions differ. ``w = stopgrad(min(pi_old / pi_rollout, cap))`` per token
(truncated importance sampling) corrects for it, and the gap is measured each step. With noise off
it must be small: a large one means that rollout and training compute different models, and the
run stops.

Truncated completions under ``overlong_filter`` count in their group's mean and deviation (their
reward is real) but not in the loss and not in its normaliser (their tokens teach nothing).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, pstdev, stdev
from typing import TYPE_CHECKING, Any

import torch

from npu_qat.tasks import accuracy_reward, soft_overlong_penalty
from npu_qat.training.bad_module import first_bad_module
from npu_qat.training.batches import (
    Sample,
    collate,
    completion_logp,
    completion_terms,
    data_digest,
    micro_batches,
)
from npu_qat.training.engine import TrainingError
from npu_qat.training.rollout import Completion, SamplingParams
from npu_qat.training.samplers import Gate

if TYPE_CHECKING:
    from npu_qat.config import DapoConfig
    from npu_qat.tasks import Problem
    from npu_qat.training.batches import Batch
    from npu_qat.training.engine import Engine
    from npu_qat.training.loop import Learner

# Added to a group's standard deviation; TRL's value, so that both agree to the last digit.
ADVANTAGE_EPS = 1e-4
# Generation index of the completions that measure the noise-off gap; no group is that large.
GAP_STREAM = 1 << 20


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """``(r - mean) / (std + eps)`` with the unbiased standard deviation."""
    mean = fmean(rewards)
    deviation = stdev(rewards) if len(rewards) > 1 else 0.0
    return [(r - mean) / (deviation + ADVANTAGE_EPS) for r in rewards]


def dapo_token_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_ratio_c: float | None = None,
    tis_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of each token, before masking and normalising.

    Args:
        logp: fp32 [B, T], with gradient.
        old_logp: fp32 [B, T], of the policy before the rollout's first update.
        advantage: [B, 1].
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_ratio_c: dual clip (arXiv 1912.09729): for negative advantages the loss is at most
            ``-c A``.
        tis_weight: [B, T], multiplies the loss; no gradient.

    Returns:
        [B, T].
    """
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if clip_ratio_c is not None:
        bounded = torch.minimum(loss, -clip_ratio_c * advantage)
        loss = torch.where(advantage < 0, bounded, loss)
    return loss if tis_weight is None else loss * tis_weight.detach()


def tis_weight(old_logp: torch.Tensor, rollout_logp: torch.Tensor, cap: float) -> torch.Tensor:
    """``min(pi_old / pi_rollout, cap)`` per token, without gradient."""
    return torch.exp(old_logp - rollout_logp).clamp(max=cap).detach()


@dataclass(frozen=True)
class Group:
    """The completions of one prompt. ``accuracy`` is the raw reward, ``reward`` the shaped one."""

    index: int
    problem: Problem
    prompt: list[int]
    completions: list[Completion]
    texts: list[str]
    accuracy: list[float]
    reward: list[float]

    @property
    def informative(self) -> bool:
        """Whether the raw accuracies differ, i.e. the group has something to teach."""
        return pstdev(self.accuracy) > 0


class Dapo:
    """The DAPO step: a rollout and its updates.

    Args:
        learner: model, engine, noise, task and configuration of the arm.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner, self.config = learner, learner.config
        rollout = self.config.rollout
        self.params = SamplingParams(rollout.max_new_tokens, rollout.temperature, rollout.top_p)
        self.cursor = 0

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the weights."""
        return {"cursor": self.cursor}

    def load_state(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]

    def step(self, step: int) -> dict[str, Any]:
        """Roll out, update; returns the step's metrics. ``step`` counts from 0."""
        proof = {} if self.learner.sampler.proven else self._prove(step)
        started = time.perf_counter()
        groups, metrics = self._collect(step)
        metrics |= proof
        rolled_out = time.perf_counter()
        metrics["rollout_seconds"] = rolled_out - started
        metrics["tokens_per_second"] = metrics.pop("tokens") / metrics["rollout_seconds"]
        noisy = self.learner.noisy(step)
        if noisy or not groups:
            # A clean step with updates measures the gap on all its tokens instead.
            metrics |= self._noise_off_gap(step)
        if groups:
            metrics |= self._learn(step, groups, noisy=noisy)
        else:
            self.learner.say(
                f"step {step + 1}: no update, since all of {metrics['groups_seen']} groups were "
                "all right or all wrong"
            )
        metrics["update_seconds"] = time.perf_counter() - rolled_out
        return metrics

    # --- rollout ----------------------------------------------------------------------------

    def _collect(self, step: int) -> tuple[list[Group], dict[str, Any]]:
        """Sample groups until the rollout is full or the tries are used up."""
        dapo, learner = self.config.dapo, self.learner
        wanted = dapo.prompts_per_rollout
        asked = dapo.generation_prompts if dapo.dynamic_sampling else wanted
        seen: list[Group] = []
        kept: list[Group] = []
        tries = 0
        with (
            learner.engine.for_generation() as model,
            learner.phase("rollout"),
            learner.noise(step, "rollout") as noise,
        ):
            learner.sampler.follow(model)
            while tries < (dapo.max_generation_tries if dapo.dynamic_sampling else 1):
                tries += 1
                groups = self._generate(model, step, asked)
                seen += groups
                kept += [g for g in groups if g.informative or not dapo.dynamic_sampling]
                if len(kept) >= wanted:
                    break
        completions = [c for g in seen for c in g.completions]
        learner.keep_samples(step, seen)
        return kept[:wanted], {
            "reward_mean": fmean(r for g in seen for r in g.reward),
            "accuracy_train": fmean(a for g in seen for a in g.accuracy),
            "groups_kept": min(len(kept), wanted),
            "groups_informative": sum(g.informative for g in seen),
            "groups_seen": len(seen),
            "generation_tries": tries,
            "completion_length_mean": fmean(len(c.tokens) for c in completions),
            "truncated_fraction": fmean(c.truncated for c in completions),
            "tokens": sum(len(c.tokens) for c in completions),
            "data": data_digest([g.problem for g in seen]),
            **noise,
        }

    def _generate(self, model: Any, step: int, prompts: int) -> list[Group]:
        """Sample ``prompts`` groups over all ranks; every rank gets all of them, in order."""
        learner, g = self.learner, self.config.rollout.num_generations
        problems = learner.training_problems(self.cursor, prompts)
        numbered = list(enumerate(problems, start=self.cursor))
        self.cursor += prompts
        mine = numbered[learner.engine.rank :: learner.engine.world_size]
        prompt_ids = {index: learner.encode(problem) for index, problem in mine}
        completions = self._sample(
            model,
            step,
            [prompt_ids[index] for index, _ in mine for _ in range(g)],
            [(self.config.run.seed, step, index, i) for index, _ in mine for i in range(g)],
        )
        groups = [
            self._reward(index, problem, prompt_ids[index], completions[k * g : (k + 1) * g])
            for k, (index, problem) in enumerate(mine)
        ]
        return sorted(learner.engine.gather_objects(groups), key=lambda group: group.index)

    def _sample(
        self,
        model: Any,
        step: int,
        prompts: list[list[int]],
        keys: Sequence[tuple[int, ...]],
    ) -> list[Completion]:
        """Sample this rank's prompts; all ranks stop together if one of them meets NaN."""
        learner = self.learner
        completions: list[Completion] = []
        failed = ""
        try:
            if prompts:
                completions = learner.sampler.sample(
                    prompts, keys, self.params, stop=learner.check_stop
                )
        except TrainingError as error:
            probe = [Sample(prompt, [learner.pad_id]) for prompt in prompts[:8]]
            module = first_bad_module(model, collate(probe, learner.pad_id, learner.engine.device))
            failed = f"{error}; the first module with NaN or Inf in its output is {module}"
        if learner.engine.max(float(bool(failed))) > 0:
            raise TrainingError(f"step {step + 1}: {failed or 'another rank sampled NaN or Inf'}")
        return completions

    def _reward(
        self, index: int, problem: Problem, prompt: list[int], completions: list[Completion]
    ) -> Group:
        dapo, limit = self.config.dapo, self.config.rollout.max_new_tokens
        texts = [self.learner.decode(c.tokens) for c in completions]
        accuracy = [accuracy_reward(text, problem) for text in texts]
        penalty = [0.0] * len(texts)
        if dapo.overlong_penalty:
            penalty = [
                soft_overlong_penalty(
                    len(c.tokens), limit, dapo.overlong_buffer, dapo.overlong_factor
                )
                for c in completions
            ]
        reward = [a + p for a, p in zip(accuracy, penalty, strict=True)]
        return Group(index, problem, prompt, completions, texts, accuracy, reward)

    # --- updates ----------------------------------------------------------------------------

    def _learn(self, step: int, groups: list[Group], *, noisy: bool) -> dict[str, Any]:
        learner, dapo = self.learner, self.config.dapo
        updates = [self._samples(chunk) for chunk in _split(groups, dapo.updates_per_rollout)]
        totals = _Totals()
        with learner.phase("training"), learner.noise(step, "training") as noise:
            # With one update pi_old is the policy itself, unless dropout makes it another one.
            if len(updates) > 1 or self.config.lora.dropout > 0:
                updates = [self._with_old_logp(samples) for samples in updates]
            norms = [self._update(step, samples, totals) for samples in updates]
        made = [norm for norm in norms if norm is not None]
        metrics = totals.metrics(learner.engine, "on" if noisy else "off")
        if noise["norms_changed"]:
            metrics |= noise
        return metrics | {"updates": len(made), "grad_norm": fmean(made) if made else 0.0}

    def _samples(self, groups: list[Group]) -> list[Sample]:
        keep_truncated = not self.config.dapo.overlong_filter
        return [
            Sample(
                group.prompt,
                c.tokens,
                weight=1.0 if keep_truncated or not c.truncated else 0.0,
                advantage=advantage,
                rollout_logp=c.logp,
            )
            for group in groups
            for c, advantage in zip(group.completions, group_advantages(group.reward), strict=True)
        ]

    def _with_old_logp(self, samples: list[Sample]) -> list[Sample]:
        """Fill in pi_old for this rank's share of ``samples``; no other rank's is needed."""
        logps = {
            id(s): logp
            for batch in self._batches(samples)
            for s, logp in zip(batch, self._logp(batch), strict=True)
        }
        return [replace(s, old_logp=logps[id(s)]) if id(s) in logps else s for s in samples]

    def _update(self, step: int, samples: list[Sample], totals: _Totals) -> float | None:
        """One optimiser update on ``samples``; None if all of them are filtered out."""
        learner, dapo, engine = self.learner, self.config.dapo, self.learner.engine
        tokens = sum(s.tokens for s in samples)
        if tokens == 0:
            return None
        batches = self._batches(samples)
        for i, micro in enumerate(batches):
            batch = collate(micro, learner.pad_id, engine.device)
            teacher, temperature = learner.teacher, self.params.temperature
            compare = None if teacher is None else teacher.divergence(batch, temperature)
            logp, divergence = completion_terms(engine.ds, batch, temperature, compare)
            old = logp.detach() if batch.old_logp is None else batch.old_logp
            assert batch.rollout_logp is not None
            weight = tis_weight(old, batch.rollout_logp, dapo.tis_cap) if dapo.tis else None
            losses = dapo_token_loss(
                logp,
                old,
                batch.advantage,
                clip_low=dapo.clip_low,
                clip_high=dapo.clip_high,
                clip_ratio_c=dapo.clip_ratio_c,
                tis_weight=weight,
            )
            if teacher is not None and divergence is not None:
                totals.add_divergence(divergence.detach(), batch)
                losses = teacher.mixed(losses, divergence)
            loss = (losses * batch.mask).sum() / tokens
            learner.check_loss(loss, batch, step)
            totals.add(batch, losses.detach(), logp.detach(), old, weight, dapo)
            engine.backward(loss * engine.world_size, last=i == len(batches) - 1)
            if i < len(batches) - 1:
                engine.between_micro_batches()
        return learner.optimizer_step(step)

    def _batches(self, samples: list[Sample]) -> list[list[Sample]]:
        engine = self.learner.engine
        return micro_batches(
            samples, self.config.train.micro_batch_size, engine.rank, engine.world_size
        )

    @torch.no_grad()
    def _logp(self, samples: list[Sample]) -> list[list[float]]:
        """The trainer's log-probabilities of each completion's tokens."""
        learner, engine = self.learner, self.learner.engine
        batch = collate(samples, learner.pad_id, engine.device)
        with engine.evaluation_mode():
            logp = completion_logp(engine.ds, batch, self.params.temperature).tolist()
        return [row[: len(s.completion)] for row, s in zip(logp, samples, strict=True)]

    # --- the gap between rollout and training -----------------------------------------------

    def _noise_off_gap(self, step: int) -> dict[str, float]:
        """Sample a few completions without noise and compare them with the trainer."""
        engine = self.learner.engine
        gaps = self._gaps(self._clean_samples(step))
        count = engine.sum(float(len(gaps)))
        return {
            "logp_gap_off_mean": engine.sum(sum(gaps)) / count,
            "logp_gap_off_max": engine.max(max(gaps, default=0.0)),
        }

    def _prove(self, step: int) -> dict[str, float]:
        """Before an engine samples anything that is trained on: does it compute the model?"""
        learner, recipe = self.learner, self.config.quant
        samples = self._clean_samples(step)
        gaps = learner.engine.gather_objects(self._gaps(samples))
        dropped: list[float] = []
        if learner.quantized is not None and recipe.quantizes_input:
            with learner.quantized.inputs_in_16_bits():
                dropped = learner.engine.gather_objects(self._gaps(samples))
        gate = Gate(gaps, dropped)
        gate.check(learner.sampler.name, self.config.dapo.logp_gap_limit)
        learner.sampler.proven = True
        metrics = learner.sampler_proof = gate.metrics()
        learner.say(
            f"rollout.engine {learner.sampler.name} computes the trained model: "
            + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        )
        return metrics

    def _clean_samples(self, step: int) -> list[Sample]:
        """Completions of a few prompts, sampled without noise; all of them on every rank."""
        learner, engine = self.learner, self.learner.engine
        problems = learner.training_problems(self.cursor, self.config.dapo.gap_prompts)
        prompts = [learner.encode(p) for p in problems]
        keys = [(self.config.run.seed, step, i, GAP_STREAM) for i in range(len(prompts))]
        mine = slice(engine.rank, None, engine.world_size)
        with engine.for_generation() as model, learner.phase("rollout"):
            learner.sampler.follow(model)
            completions = self._sample(model, step, prompts[mine], keys[mine])
        local = [
            Sample(p, c.tokens, rollout_logp=c.logp)
            for p, c in zip(prompts[mine], completions, strict=True)
        ]
        return engine.gather_objects(local)

    def _gaps(self, samples: list[Sample]) -> list[float]:
        """|log pi_old - log pi_rollout| of each token of this rank's share of ``samples``."""
        gaps: list[float] = []
        with self.learner.phase("training"):
            for batch in self._batches(samples):
                for s, logp in zip(batch, self._logp(batch), strict=True):
                    if s.weight:
                        assert s.rollout_logp is not None
                        gaps += [abs(a - b) for a, b in zip(logp, s.rollout_logp, strict=True)]
        return gaps

    def check(self, done: int, metrics: dict[str, Any]) -> None:
        """Raise ``TrainingError`` if rollout and training differ with noise off after step
        ``done``."""
        gap, limit = metrics.get("logp_gap_off_mean"), self.config.dapo.logp_gap_limit
        if gap is not None and gap > limit:
            raise TrainingError(
                f"step {done}: with noise off, rollout and training differ by {gap:.4f} in "
                f"mean |log-probability| a token, above dapo.logp_gap_limit {limit:g}: they "
                "compute different models. Look at quant.apply_during, or at the device's kernels"
            )


class _Totals:
    """Sums over the tokens of a step that count in the loss."""

    NAMES = ("tokens", "loss", "gap", "low", "high", "tis")

    def __init__(self) -> None:
        self.sums = dict.fromkeys(self.NAMES, 0.0)
        self.gap_max = 0.0
        self.divergence: float | None = None  # without a teacher

    def add_divergence(self, divergence: torch.Tensor, batch: Batch) -> None:
        self.divergence = (self.divergence or 0.0) + float((divergence * batch.mask).sum())

    def add(
        self,
        batch: Batch,
        losses: torch.Tensor,
        logp: torch.Tensor,
        old: torch.Tensor,
        weight: torch.Tensor | None,
        dapo: DapoConfig,
    ) -> None:
        mask = batch.mask
        assert batch.rollout_logp is not None
        ratio = torch.exp(logp - old)
        gap = (old - batch.rollout_logp).abs() * mask
        low = (ratio < 1 - dapo.clip_low) & (batch.advantage < 0)
        high = (ratio > 1 + dapo.clip_high) & (batch.advantage > 0)
        tis = mask if weight is None else weight * mask
        parts = (mask, losses * mask, gap, low * mask, high * mask, tis)
        for name, part in zip(self.NAMES, parts, strict=True):
            self.sums[name] += float(part.sum())
        self.gap_max = max(self.gap_max, float(gap.max()))

    def metrics(self, engine: Engine, noise: str) -> dict[str, float]:
        total = {name: engine.sum(value) for name, value in self.sums.items()}
        count = total["tokens"]
        if count == 0:
            return {}  # nothing was measured; a gap of zero would pass the gate
        distilled = {}
        if self.divergence is not None:
            distilled["distill_kl"] = engine.sum(self.divergence) / count
        return {
            "loss": total["loss"] / count,
            **distilled,
            f"logp_gap_{noise}_mean": total["gap"] / count,
            f"logp_gap_{noise}_max": engine.max(self.gap_max),
            "clip_fraction_low": total["low"] / count,
            "clip_fraction_high": total["high"] / count,
            "tis_weight_mean": total["tis"] / count,
        }


def _split(groups: list[Group], parts: int) -> list[list[Group]]:
    """``groups`` in at most ``parts`` runs of nearly equal length, none empty."""
    parts = min(parts, len(groups))
    cuts = [round(i * len(groups) / parts) for i in range(parts + 1)]
    return [groups[a:b] for a, b in pairwise(cuts)]
