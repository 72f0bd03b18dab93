"""Quantization-aware training under transformers' ``Trainer`` and TRL's trainers.

``prepare_model`` puts the 4-bit numbers into the model, where any loop finds them. What a loop of
someone else does not know is *when*: which forward passes are training, rollout or evaluation, when
noise is on the norms, and whether what was configured happened. ``QATCallback`` knows it from two
places:

* **The trainer's events.** A step lasts from ``on_step_begin`` to ``on_step_end``, backward pass
  and the recomputation of gradient checkpointing included. Evaluation and saving lie between
  steps, where the phase is evaluation and the norms are exact.
* **The model's own ``generate``.** A call inside a step is a rollout; outside of one it is an
  evaluation. ``generate`` is public and every trainer that samples from the trained modules calls
  it, while the methods around it are private and change from release to release.

Noise is drawn for the step that ``state.global_step`` counts, out of ``state.max_steps``, from the
seed ``args.seed``; nothing of it is stored, so a resumed run draws the same.

What was given up: trainers that sample elsewhere (vLLM, continuous batching) or that shard the
frozen weights (ZeRO-3, FSDP) are refused. TRL syncs a *merged 16-bit* model to vLLM, which is
another model than the one that is trained; ``npu-qat train`` has engines for both cases.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from npu_qat.config import NoiseConfig
from npu_qat.integrations.refusals import refuse_model, refuse_settings
from npu_qat.layers import QuantizedModel
from npu_qat.layers.audit import Check, raise_failed
from npu_qat.layers.gradients import gradient_check
from npu_qat.noise import AQN, NoiseError
from npu_qat.noise.evidence import as_row, multiplier_checks, noise_check
from npu_qat.noise.norms import take_norms
from npu_qat.training.rundir import write_atomically

AUDIT = "audit.json"
# What a log line says about the noise, and under which name.
_LOGGED = ("sigma", "sigma_realized", "norms_changed")

logger = logging.getLogger(__name__)


@dataclass
class _Evidence:
    """What happened from ``first_step`` on; steps count finished ones."""

    first_step: int = 0
    updates: int = 0
    noise: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    rollouts: set[int] = field(default_factory=set)
    gradients: dict[str, float] = field(default_factory=dict)

    def as_json(self, last_step: int) -> dict[str, Any]:
        return {
            "first_step": self.first_step,
            "last_step": last_step,
            "updates": self.updates,
            "rollout_steps": sorted(self.rollouts),
            "first_update_gradients": self.gradients,
        }


class QATCallback(TrainerCallback):
    """Phases, AQN noise and the audit of a prepared model under a Hugging Face trainer.

    After the first step, at each save and at the end the audit compares what was measured with the
    recipe and writes ``audit.json`` into ``args.output_dir``. If a check fails, training fails.

    With noise, ``sigma``, ``sigma_realized`` and ``norms_changed`` join the trainer's log lines as
    ``noise/...``.

    Args:
        model: what ``prepare_model`` gave back.
        noise: noise on the norms; default none. ``apply_during`` rollout: while a trainer such as
            TRL's GRPOTrainer generates; training: in forward and backward passes; both.

    Raises:
        NoiseError: the model has no norm that can carry the noise.
        ValueError: from the trainer's events, when its settings bypass the quantised modules; the
            message says which and what to do.
        AuditError: a measurement contradicts recipe or noise schedule.

    Example::

        handle = npu_qat.prepare_model(model, npu_qat.Recipe())
        trainer = SFTTrainer(model, train_dataset=data, peft_config=LoraConfig(r=16),
                             callbacks=[npu_qat.QATCallback(handle)])
    """

    def __init__(self, model: QuantizedModel, noise: NoiseConfig | None = None) -> None:
        self.quantized = model
        self.noise = noise or NoiseConfig(enabled=False)
        if self.noise.enabled:
            # Now, because DeepSpeed would partition and cast weights that are not buffers yet.
            take_norms(model.model, self.noise)
        self._aqn: AQN | None = None
        self._step: int | None = None
        self._open = ExitStack()
        self._generate = ExitStack()
        self._gradients = _GradientWatch()
        self._evidence = _Evidence()
        self._audited = False

    # --- events of the trainer ----------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse settings before an engine is started for them."""
        refuse_settings(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the model, make the noise, watch ``generate`` and the first gradients."""
        model = kwargs["model"]
        refuse_settings(args)
        refuse_model(self.quantized, model, args)
        self.restore()
        self._aqn = AQN(
            model,
            self.noise,
            total_steps=state.max_steps,
            seed=args.seed,
            steps_per_epoch=max(state.max_steps // max(state.num_train_epochs, 1), 1),
        )
        if state.is_world_process_zero:
            _tell_inert(self._aqn)
        self._evidence = _resumed(Path(args.output_dir) / AUDIT, state.global_step)
        self._audited = False
        self._gradients.start(model, known=bool(self._evidence.gradients))
        self._watch_generate(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter the training phase, with the step's noise if it is due."""
        self.restore()
        self._step = state.global_step
        self._enter("training")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the gradients of the first update that has any."""
        self._evidence.gradients = self._gradients.finish() or self._evidence.gradients
        self._evidence.updates += 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Back to evaluation and exact norms; the first time, audit what ran."""
        self.restore()
        if not self._audited:
            self._audit(args, state, kwargs["model"])
            self._audited = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the noise of the last step to a training line: the callbacks that follow see it, and
        ``trainer_state.json`` keeps it."""
        logs = kwargs.get("logs") or {}
        rows = [row for (step, _), row in self._evidence.noise.items() if step == state.global_step]
        if not self.noise.enabled or "loss" not in logs or not rows:
            return
        row = max(rows, key=lambda row: row["sigma"])
        found = {f"noise/{name}": row[name] for name in _LOGGED}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse an evaluation of a model that an exception left in the middle of a step."""
        if self._step is not None:
            raise NoiseError(
                f"training ended inside step {self._step + 1}, whose phase and noise are still on; "
                "call restore() of the QATCallback before evaluating"
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit what the checkpoint stands for, and keep the evidence for a resumed run."""
        self._audit(args, state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model alone, and judge the run."""
        self.restore()
        self._generate.close()
        self._gradients.stop()
        self._audit(args, state, kwargs["model"], final=True)

    # --- phases and noise ----------------------------------------------------------------------

    def restore(self) -> None:
        """End an open step: the evaluation phase, and the exact weights of the norms.

        The trainer's events do it. Call it yourself after an exception (Ctrl-C, out of memory) in
        the middle of a step, before the model is used on.
        """
        self._open.close()
        self._step = None

    def _enter(self, phase: str) -> None:
        """Enter ``phase`` of the current step, with its noise."""
        assert self._aqn is not None and self._step is not None
        with ExitStack() as entered:
            entered.enter_context(self.quantized.phase(phase))
            record = entered.enter_context(self._aqn.applied(self._step, phase))
            if self.noise.enabled:
                self._evidence.noise.setdefault((record.step + 1, phase), as_row(record))
            self._open = entered.pop_all()

    def _watch_generate(self, model: nn.Module) -> None:
        """Make each call of the model's ``generate`` inside a step a rollout."""
        self._generate.close()
        unwrap: Any = getattr(model, "get_base_model", lambda: model)
        base: Any = unwrap()
        if not hasattr(base, "generate"):
            return
        base.generate = self._as_rollout(base.generate)
        self._generate.callback(base.__dict__.pop, "generate", None)

    def _as_rollout(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generate)
        def rollout(*args: Any, **kwargs: Any) -> Any:
            if self._step is None:
                return generate(*args, **kwargs)
            self._open.close()
            self._enter("rollout")
            self._evidence.rollouts.add(self._step + 1)
            try:
                return generate(*args, **kwargs)
            finally:
                self._open.close()
                self._enter("training")

        return rollout

    # --- evidence ------------------------------------------------------------------------------

    def _audit(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        *,
        final: bool = False,
    ) -> None:
        """Write ``audit.json``; raises ``AuditError`` if a check failed."""
        assert self._aqn is not None
        audit = self.quantized.audit
        audit.add_checks(self._checks(args, state.global_step, final))
        phases = {"training"} | ({"rollout"} if self._evidence.rollouts else set())
        report = audit.report(model, phases if state.global_step else ())
        report["recipe"] = self.quantized.recipe.model_dump(mode="json")
        rows = [self._evidence.noise[key] for key in sorted(self._evidence.noise)]
        report["noise"] = {**self._aqn.describe(), "steps": rows}
        report["evidence"] = self._evidence.as_json(state.global_step)
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            write_atomically(folder / AUDIT, text.encode())
        raise_failed([Check(**check) for check in report["checks"]])

    def _checks(self, args: TrainingArguments, done: int, final: bool) -> list[Check]:
        """Noise, rollouts and gradients of the first ``done`` steps."""
        evidence, aqn = self._evidence, self._aqn
        assert aqn is not None
        checks = []
        if done and self._needs_rollouts(args):
            checks.append(
                Check(
                    "rollouts are sampled from the quantised modules",
                    "model.generate is called in the steps",
                    f"called in {len(evidence.rollouts)} of {done - evidence.first_step} steps"
                    + ("" if evidence.rollouts else "; a trainer that never generates has none"),
                    bool(evidence.rollouts),
                )
            )
        if aqn.schedule is not None:
            steps = {s + 1 for s in range(evidence.first_step, done) if aqn.due(s)}
            asked = self.noise.apply_during
            for phase, ran in (("training", steps), ("rollout", steps & evidence.rollouts)):
                due = ran if asked in ("both", phase) else set()
                checks.append(noise_check(evidence.noise.values(), phase, due))
            if self.noise.layers.enabled:
                checks += multiplier_checks(aqn)
        if final and evidence.updates:
            checks.append(
                gradient_check(self.quantized.recipe, evidence.gradients, evidence.updates)
            )
        return checks

    def _needs_rollouts(self, args: TrainingArguments) -> bool:
        """Whether trainer or noise are about rollouts; TRL's samplers have ``num_generations``."""
        noise_in_rollouts = self.noise.enabled and self.noise.apply_during == "rollout"
        return noise_in_rollouts or hasattr(args, "num_generations")


class _GradientWatch:
    """Largest |gradient| of each trainable parameter in the first update that has any.

    Tensor hooks, since ZeRO leaves no ``.grad`` to look at.
    """

    def __init__(self) -> None:
        self._hooks = ExitStack()
        self._largest: dict[str, torch.Tensor] = {}

    def start(self, model: nn.Module, *, known: bool) -> None:
        """Watch ``model``, unless the gradients are known from before."""
        self.stop()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not known:
                self._largest[name] = torch.zeros((), device=parameter.device)
                self._hooks.callback(parameter.register_hook(self._hook(name)).remove)

    def stop(self) -> None:
        self._hooks.close()
        self._largest = {}

    def finish(self) -> dict[str, float]:
        """What the update's gradients were, once there were any; then nothing more is watched."""
        found = {name: float(value) for name, value in self._largest.items()}
        if max(found.values(), default=0.0) == 0.0:
            return {}
        self.stop()
        return found

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def keep(grad: torch.Tensor) -> None:
            if name in self._largest:
                largest = grad.detach().abs().amax().float()
                self._largest[name] = self._largest[name].to(grad.device).maximum(largest)

        return keep


def _tell_inert(aqn: AQN) -> None:
    for stage in aqn.check():
        if stage.sigma > 0 and stage.inert:
            logger.warning(
                "noise: steps %d-%d are inert: sigma %g changes %.1f %% of the norm weights "
                "(norm_dtype: fp32 cures it)",
                stage.first_step + 1,
                stage.last_step + 1,
                stage.sigma,
                100 * stage.elements_changed_fraction,
            )


def _resumed(path: Path, done: int) -> _Evidence:
    """The evidence of the first ``done`` steps from ``path``, if it covers them all."""
    if done == 0 or not path.exists():
        return _Evidence(first_step=done)
    report = json.loads(path.read_text("utf-8"))
    before = report["evidence"]
    if before["last_step"] < done or before["first_step"] > done:
        return _Evidence(first_step=done)
    rows = [row for row in report["noise"]["steps"] if row["step"] <= done]
    return _Evidence(
        first_step=before["first_step"],
        updates=min(before["updates"], done - before["first_step"]),
        noise={(row["step"], row["phase"]): row for row in rows},
        rollouts={step for step in before["rollout_steps"] if step <= done},
        gradients=before["first_update_gradients"],
    )
