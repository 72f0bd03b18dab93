"""Whole rollouts of updates against a small independent training loop.

The reference takes one sequence at a time, unpadded, goes through the loss token by token, and
steps torch's AdamW: no DeepSpeed, no micro-batches, no masks.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from npu_qat.training.dapo import Group
from npu_qat.training.loop import Learner
from npu_qat.training.rollout import Completion
from tests.training.learning import adapters, make_learner, run_config

pytestmark = pytest.mark.usefixtures("one_process")

SIZE = 4  # completions a group


def groups(learner: Learner, count: int = 4) -> list[Group]:
    """Groups with both outcomes, different lengths, truncated rows, and a sampler that was a
    little different from the trainer."""
    problems = learner.training_problems(0, count)
    made = []
    for index, problem in enumerate(problems):
        prompt = learner.encode(problem)[: 9 + index]
        completions = []
        for i in range(SIZE):
            generator = torch.Generator().manual_seed(100 * index + i)
            length = 3 + (5 * i + index) % 7
            tokens = torch.randint(5, 40, (length,), generator=generator).tolist()
            logp = learner_logp(learner.engine.model, prompt, tokens).detach()
            off = torch.randn(logp.shape, generator=generator) * 0.5
            truncated = (i + index) % 4 == 0
            completions.append(Completion(tokens, (logp + off).tolist(), truncated))
        accuracy = [float((i * (index + 1)) % 3 == 1) for i in range(SIZE)]
        reward = [a - 0.1 * i for i, a in enumerate(accuracy)]
        made.append(Group(index, problem, prompt, completions, [""] * SIZE, accuracy, reward))
    return made


def learner_logp(
    model: nn.Module, prompt: list[int], tokens: list[int], temperature: float = 1.0
) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0] / temperature
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logp.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


class Reference:
    """The same steps, spelt out."""

    def __init__(self, model: nn.Module, learner: Learner) -> None:
        self.model, self.config = model, learner.config
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        train = self.config.train
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=train.lr,
            weight_decay=train.weight_decay,
            betas=(train.beta1, train.beta2),
        )

    def logp(self, group: Group, completion: Completion) -> torch.Tensor:
        temperature = self.config.rollout.temperature
        return learner_logp(self.model, group.prompt, completion.tokens, temperature)

    def learn(self, found: list[Group]) -> list[float]:
        """All updates of one rollout; returns the gradient norms."""
        old = {id(c): self.logp(g, c).detach() for g in found for c in g.completions}
        per_update = len(found) // self.config.dapo.updates_per_rollout
        norms = []
        for start in range(0, len(found), per_update):
            losses: list[torch.Tensor] = []
            for group in found[start : start + per_update]:
                losses += self.losses(group, old)
            if not losses:
                continue
            self.optimizer.zero_grad()
            (sum(losses) / len(losses)).backward()
            limit = self.config.train.max_grad_norm
            norms.append(float(nn.utils.clip_grad_norm_(self.parameters.values(), limit)))
            self.optimizer.step()
        return norms

    def losses(self, group: Group, old: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """One entry a token that counts."""
        dapo, rewards = self.config.dapo, torch.tensor(group.reward, dtype=torch.float64)
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
        found = []
        for completion, a in zip(group.completions, advantages, strict=True):
            if completion.truncated and dapo.overlong_filter:
                continue
            logp = self.logp(group, completion)
            for t, sampled in enumerate(completion.logp):
                before = old[id(completion)][t]
                ratio = (logp[t] - before).exp()
                clipped = ratio.clamp(1 - dapo.clip_low, 1 + dapo.clip_high)
                loss = -min(ratio * a, clipped * a)
                if dapo.clip_ratio_c is not None and a < 0:
                    loss = min(loss, torch.tensor(-dapo.clip_ratio_c * a))
                if dapo.tis:
                    loss = loss * min(math.exp(float(before) - sampled), dapo.tis_cap)
                found.append(loss)
        return found


SETTINGS: dict[str, dict[str, Any]] = {
    "one update": {"dapo": {"updates_per_rollout": 1}},
    "two updates": {},
    "four updates, large steps": {"dapo": {"updates_per_rollout": 4}, "train": {"lr": 0.05}},
    "no importance weights": {"dapo": {"tis": False}},
    "truncated rows count": {"dapo": {"overlong_filter": False}},
    "dual clip": {"dapo": {"clip_ratio_c": 1.05, "updates_per_rollout": 4}, "train": {"lr": 0.05}},
    "temperature": {"rollout": {"temperature": 0.7}},
    "tight clipping of gradients": {"train": {"max_grad_norm": 0.01}},
    "large micro-batches": {"train": {"micro_batch_size": 64}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_updates_of_a_rollout_equal_the_reference(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = copy.deepcopy(settings)
    settings["train"] = {"lr": 0.01, "micro_batch_size": 3} | settings.get("train", {})
    learner = make_learner(tmp_path, run_config(**settings), live=True)
    if learner.config.model.gradient_checkpointing:
        learner.engine.model.gradient_checkpointing_enable({"use_reentrant": False})
    other = make_learner(tmp_path / "reference", run_config(**settings), live=True)
    reference = Reference(other.engine.model, other)
    learner.engine.set_lr(learner.config.train.lr)
    # Two rollouts, so that Adam's moments and the second old log-probabilities count.
    for step in range(2):
        found = groups(learner)
        assert any(c.truncated for g in found for c in g.completions)
        metrics = learner.method._learn(step, found, noisy=False)
        norms = reference.learn(found)
        assert metrics["updates"] == len(norms)
        assert metrics["grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    moved = 0.0
    fresh = adapters(make_learner(tmp_path / "fresh", run_config(**settings), live=True))
    state = learner.engine.state()
    for name, parameter in reference.parameters.items():
        moments = reference.optimizer.state[parameter]
        for key in ("exp_avg", "exp_avg_sq"):
            size = float(moments[key].abs().max())
            torch.testing.assert_close(
                state[f"{name}/{key}"], moments[key], rtol=2e-3, atol=2e-4 * size
            )
        moved = max(moved, float((state[name] - fresh[name]).abs().max()))
        # Where a gradient is almost zero Adam's direction is decided by rounding.
        off = (state[name] - parameter.detach()).abs() > 0.02 * learner.config.train.lr
        assert off.float().mean() < 0.01, name
    assert moved > learner.config.train.lr
    if settings.get("train", {}).get("lr") == 0.05:
        assert metrics["clip_fraction_low"] > 0 and metrics["clip_fraction_high"] > 0
    if learner.config.dapo.updates_per_rollout == 1:
        assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0.0


def test_the_metrics_of_the_updates(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, run_config(dapo={"updates_per_rollout": 1}), live=True)
    found = groups(learner)
    gaps, weights = [], []
    for group in found:
        for c in group.completions:
            if c.truncated:
                continue
            logp = learner_logp(learner.engine.model, group.prompt, c.tokens).tolist()
            gaps += [abs(a - b) for a, b in zip(logp, c.logp, strict=True)]
            weights += [min(math.exp(a - b), 2.0) for a, b in zip(logp, c.logp, strict=True)]
    for noise in ("off", "on"):
        metrics = learner.method._learn(0, found, noisy=noise == "on")
        if noise == "off":
            assert metrics["logp_gap_off_mean"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)
            assert metrics["logp_gap_off_max"] == pytest.approx(max(gaps), rel=1e-3)
            assert metrics["tis_weight_mean"] == pytest.approx(
                sum(weights) / len(weights), rel=1e-4
            )
        assert ("logp_gap_on_mean" in metrics) == (noise == "on")


def test_a_rollout_that_is_filtered_out_whole_updates_nothing(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, live=True)
    found = [
        Group(
            g.index,
            g.problem,
            g.prompt,
            [Completion(c.tokens, c.logp, True) for c in g.completions],
            g.texts,
            g.accuracy,
            g.reward,
        )
        for g in groups(learner)
    ]
    before = learner.engine.state()
    metrics = learner.method._learn(0, found, noisy=False)
    assert metrics == {"updates": 0, "grad_norm": 0.0}, "a gap of zero would pass the gate"
    after = learner.engine.state()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert learner.updates == 0


def test_truncated_rows_count_in_the_groups_statistics(tmp_path: Path) -> None:
    """Filtered from the loss, but their reward is real."""
    learner = make_learner(tmp_path)
    (group, *_) = groups(learner)
    samples = learner.method._samples([group])
    rewards = torch.tensor(group.reward, dtype=torch.float64)
    wanted = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
    assert [s.advantage for s in samples] == pytest.approx(wanted)
    assert [s.weight for s in samples] == [float(not c.truncated) for c in group.completions]
