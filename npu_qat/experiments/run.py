"""One run from configuration to report: evaluate the start, train the arms, evaluate, judge.

The arms answer the user's question in one table. The quantised model before training says what
post-training quantisation costs; the trained one, what training wins back. The third comparison is
the honest one: an adapter trained in 16 bits by the same algorithm on the same prompts, served on
the 4-bit base, says whether training *in 4 bits* was needed.

Every stage writes its result before the next begins, and a resumed run skips what is whole.
"""

from __future__ import annotations

import gc
import json
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from npu_qat.backends import Selection, select
from npu_qat.config import RunConfig
from npu_qat.config.dump import dump_yaml
from npu_qat.config.load import load_config
from npu_qat.deploy.adapter import write_binding
from npu_qat.deploy.engine_base import FOLDER, check_engine_base, write_engine_base
from npu_qat.deploy.run_source import describe_base
from npu_qat.evaluation.accuracy import Outcome, answer_problems
from npu_qat.evaluation.intervals import paired_difference, proportion
from npu_qat.evaluation.perplexity import (
    RATIO_METHOD,
    AnswerLikelihood,
    answer_likelihoods,
    perplexity,
    perplexity_ratio,
)
from npu_qat.experiments.console import RunConsole
from npu_qat.experiments.environment import describe_environment
from npu_qat.experiments.evidence import run_checks
from npu_qat.experiments.heartbeat import with_heartbeat
from npu_qat.experiments.stopping import stop_requests
from npu_qat.integrations.trackers import TrackedRun, Trackers, open_trackers
from npu_qat.layers import QuantizedModel, add_lora, load_lora, prepare_model
from npu_qat.layers.audit import Check, raise_failed
from npu_qat.layers.base_model import DTYPES, answer_ids, load_base, prompt_ids, stop_ids
from npu_qat.layers.calibration import CALIBRATION_PROMPTS, calibrate_on_prompts
from npu_qat.layers.compensation import Compensation, compensate, compensation_check
from npu_qat.noise import AQN
from npu_qat.reporting import write_report
from npu_qat.tasks import Problem, Task, load_task
from npu_qat.training.distill import Teacher
from npu_qat.training.engine import Engine, launch_environment, shut_down, world
from npu_qat.training.loop import Interrupted, Learner, total_steps
from npu_qat.training.peers import failures_told
from npu_qat.training.rundir import BASE, RunDirectory
from npu_qat.training.samplers import Sampler
from npu_qat.training.sharing import first_says, folder_for_all

if TYPE_CHECKING:
    from rich.console import Console

# What may differ when a run is resumed: where and how it runs, not what it computes.
MAY_CHANGE = {
    "run": {
        *("output_dir", "resume", "threads", "device", "backend"),
        *("trackers", "tracker_project"),
    },
    "train": {"checkpoint_every", "keep_checkpoints", "micro_batch_size"},
    "deepspeed": {"zero_stage", "overrides"},
}
# Training problems whose texts show the linears their inputs (lora.init: quantisation_error); about
# ten times as many tokens as a small model's widest input has channels.
COMPENSATION_PROBLEMS = 64
# The identity under which trackers go on with a resumed run.
TRACKED = "trackers.json"
# Room for logs, samples, plots and report beside the checkpoints.
BYTES_BESIDE_CHECKPOINTS = 64 * 2**20


def execute(
    config: RunConfig, run_dir: Path, console: Console, *, report: bool = True
) -> dict[str, Any]:
    """Carry out a run.

    Args:
        config: the resolved configuration.
        run_dir: its folder.
        console: where progress goes; a rich console.
        report: write ``report.html``.

    Returns:
        The content of ``summary.json``.

    Raises:
        ValueError: configuration, model, data or folder are not usable; nothing was trained. What
            recipe and device say of ``rollout.engine`` is refused before anything is loaded.
        TrainingError: NaN, Inf, or rollout and training compute different models.
        AuditError: a measurement contradicts the configuration.
        Interrupted: the user stopped the run; ``--resume auto`` goes on.
        PeerLost: another process of the run is gone; ``--resume auto`` goes on.
    """
    selection = _start(config)
    check_engine_base(config, selection.device.type)
    rank, _ = world()
    rundir = RunDirectory(run_dir, writer=rank == 0)
    shown = RunConsole(console)
    resume = config.run.resume == "auto"
    try:
        with failures_told(Interrupted):
            if resume:
                _check_same_run(config, rundir)
            rundir.prepare(resume=resume, bytes_needed=BYTES_BESIDE_CHECKPOINTS)
            with rundir.locked(), stop_requests(shown.say) as should_stop:
                asked = with_heartbeat(should_stop)
                run = _Run(config, rundir, selection, shown, asked)
                with run.tracked():
                    summary = run.execute(resume)
                if report and rundir.writer:
                    shown.say(f"report: {write_report(rundir.path)}")
                return summary
    finally:
        shown.close()
        shut_down()


def evaluate(
    config: RunConfig,
    *,
    run_dir: Path | None = None,
    adapter: Path | None = None,
    console: Console,
) -> dict[str, Any]:
    """Measure accuracy without training, in 16 bits and in the configured numbers.

    Args:
        config: model, task, quantisation and evaluation settings.
        run_dir: evaluate the adapters found in this run directory; nothing in it is changed.
        adapter: evaluate this adapter (PEFT format) instead.
        console: where progress goes; a rich console.

    Returns:
        ``{"confidence", "arms", "comparisons"}`` as in ``summary.json``.

    Raises:
        ValueError: there is nothing to evaluate, or model, data or adapter are not usable.
    """
    selection = _start(config)
    shown = RunConsole(console)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            rundir = RunDirectory(Path(scratch), writer=world()[0] == 0)
            with failures_told():
                run = _Run(config, rundir, selection, shown, lambda: False)
                shown.say(f"device: {selection.reason}")
                run.evaluate_only(run_dir, adapter)
                return run.evaluations()
        finally:
            shut_down()


def evaluate_as(
    config: RunConfig, name: str, run_dir: Path, console: Console, *, adapter: Path | None = None
) -> dict[str, Any]:
    """Evaluate one model in the numbers of ``config`` and keep it as an evaluation of a run.

    Args:
        config: model, task, quantisation and evaluation settings.
        name: of the evaluation; one of that name that is there already is taken.
        run_dir: the outcomes go to ``evaluations/<name>.jsonl`` there.
        console: where progress goes; a rich console.
        adapter: on top of the model (PEFT format); None: the model as it comes, or with the adapter
            that ``lora.init: quantisation_error`` starts from.

    Returns:
        The evaluation, as ``summary.json`` has it.
    """
    selection = _start(config)
    rundir = RunDirectory(run_dir, writer=world()[0] == 0)
    try:
        run = _Run(config, rundir, selection, RunConsole(console), lambda: False)
        run.rundir.write_json("environment.json", describe_environment(selection))
        quantized = run.mode != "w16a16"
        if adapter is None:
            run.evaluate_start(name, quantized=quantized, adapted=config.lora.init != "default")
        else:
            run.evaluate_adapter(adapter, name, quantized=quantized)
        found: dict[str, Any] = run.evaluations()["arms"][name]
        return found
    finally:
        shut_down()


def _start(config: RunConfig) -> Selection:
    selection = select(config.run.device, config.run.backend)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    launch_environment(selection.device)
    return selection


def _check_same_run(config: RunConfig, rundir: RunDirectory) -> None:
    """A resumed run is the same run: refuse keys that changed what it computes."""
    if not rundir.holds_run():
        return
    old = load_config(rundir.path / "config.yaml").model_dump(exclude=MAY_CHANGE)
    new = config.model_dump(exclude=MAY_CHANGE)
    changed = [
        f"{section}.{key} (was {old[section][key]!r}, is {value!r})"
        for section, keys in new.items()
        for key, value in keys.items()
        if old[section][key] != value
    ]
    if changed:
        raise ValueError(
            f"{rundir.path} was started with another configuration: {'; '.join(changed)}. "
            "Resume with the same one, or start a new run in another --output"
        )


@dataclass
class _Arm:
    """A trained arm: what it is called and whether its base is quantised."""

    name: str
    quantized: bool
    noise: bool
    distilled: bool = False


class _Run:
    """The stages of one run."""

    def __init__(
        self,
        config: RunConfig,
        rundir: RunDirectory,
        selection: Selection,
        console: RunConsole,
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.rundir, self.selection = config, rundir, selection
        self.console, self.should_stop = console, should_stop
        self.task: Task = load_task(config.task)
        self.steps = total_steps(config, len(self.task.train))
        wanted = config.evaluation.problems or len(self.task.test)
        if wanted > len(self.task.test):
            raise ValueError(
                f"evaluation.problems is {wanted}, but the test split has {len(self.task.test)}; "
                "lower it, or leave it out to use all"
            )
        self.problems: Sequence[Problem] = self.task.test[:wanted]
        self.mode = _mode(config)
        self.seconds: dict[str, float] = {}
        self.trackers = Trackers({})
        # Arms whose first step in this process passed the audit.
        self.audited: set[str] = set()
        # Arms that are trained and evaluated.
        self.trained: set[str] = set()
        # What adapters that start from the quantisation error took away of it.
        self.compensations: list[Compensation] = []
        # Evaluations of this run, in the order in which they were made.
        self.names: list[str] = []

    def tracked(self) -> Trackers:
        """Start the trackers, before the run has cost anything; they are finished on exit."""
        asked = self.config.run
        if self.rundir.writer:
            known = self.rundir.read_json(TRACKED) or {"id": secrets.token_hex(8)}
            name, config = self.rundir.path.name, self.config.model_dump(mode="json")
            about = TrackedRun(name, self.rundir.path, known["id"], asked.tracker_project, config)
            self.trackers = open_trackers(asked.trackers, about, self.console.say)
            self.rundir.write_json(TRACKED, known)
        return self.trackers

    def execute(self, resume: bool) -> dict[str, Any]:
        started = time.time()
        config = self.config
        self.rundir.write_text("config.yaml", dump_yaml(config))
        self.rundir.write_json("environment.json", describe_environment(self.selection))
        self.console.say(f"device: {self.selection.reason}")
        if "bf16" in config.evaluation.baselines:
            self.evaluate_start("bf16_start", quantized=False)
        if "ptq" in config.evaluation.baselines and self.mode != "w16a16":
            self.evaluate_start(f"{self.mode}_ptq", quantized=True)
        quantized = _Arm(self.mode, quantized=True, noise=True, distilled=True)
        if config.distill.teacher == "base" or config.distill.weight == 0:
            self._train(quantized, f"{self.mode}_trained")
        if "bf16_lora" in config.evaluation.baselines and self.mode != "w16a16":
            self._train(_Arm("bf16_lora", quantized=False, noise=False), "bf16_lora")
            self._serve_adapter("bf16_lora", f"bf16_lora_served_{self.mode}")
        if quantized.name not in self.trained:  # its teacher had to be trained first
            self._train(quantized, f"{self.mode}_trained")
        return self._summarize(time.time() - started)

    # --- models -----------------------------------------------------------------------------

    def _load(self, *, quantized: bool) -> tuple[Any, Any, QuantizedModel | None]:
        """A fresh base, its tokenizer and, if quantised, its handle."""
        recipe, device = self.config.quant, self.selection.device
        quantized = quantized and self.mode != "w16a16"
        # A packed base takes a quarter of the room: its 16-bit weights visit the device in turns.
        in_turns = quantized and recipe.base_storage == "packed"
        where = torch.device("cpu") if in_turns else device
        model, tokenizer = load_base(self.config.model, where)
        if not quantized:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            return model, tokenizer, None
        handle = prepare_model(model, recipe, self.selection.backend, device)
        prompts = [self.task.messages(p) for p in self.task.train[:CALIBRATION_PROMPTS]]
        calibrate_on_prompts(handle, tokenizer, prompts)
        return model, tokenizer, handle

    # --- evaluation -------------------------------------------------------------------------

    def evaluate_start(self, name: str, *, quantized: bool, adapted: bool = False) -> None:
        """Evaluate the model as it comes, unless that was done already.

        ``adapted``: with the adapter that training would start from.
        """
        if self._outcomes(name) is not None:
            self.names.append(name)
            return
        model, tokenizer, handle = self._load(quantized=quantized)
        if adapted:
            model = add_lora(model, self.config.lora, self.config.run.seed)
            self._compensate(model, tokenizer)
        self._evaluate(name, model.eval(), tokenizer, handle)
        _forget(model)

    def _serve_adapter(self, arm: str, name: str) -> None:
        """Evaluate the adapter of a 16-bit arm on the quantised base."""
        self.evaluate_adapter(self._adapter(arm), name, quantized=True)

    def _evaluate(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        handle: QuantizedModel | None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Evaluate and write the outcomes; ``check`` runs before anything is written, since a
        resumed run takes what is written as done."""
        started = time.time()
        outcomes = self._measure(model, tokenizer, handle, self.problems, self._check_stop)
        check()
        self.seconds[f"evaluate {name}"] = time.time() - started
        lines = "".join(json.dumps(o.as_dict()) + "\n" for o in outcomes)
        self.rundir.write_text(f"evaluations/{name}.jsonl", lines)
        self.names.append(name)
        self.console.say(
            f"{name}: {self._words([o.as_dict() for o in outcomes])} on {len(outcomes)} problems, "
            f"{self.seconds[f'evaluate {name}']:.0f} s"
        )

    def _words(self, rows: list[dict[str, Any]]) -> str:
        """What an evaluation measured, in a few words."""
        found = _measured(rows, self.config.evaluation.confidence)
        if "strict" in found:
            e = found["strict"]
            return f"accuracy {e['mean']:.1%} [{e['low']:.1%}, {e['high']:.1%}]"
        e = found["answer_perplexity"]
        return f"answer perplexity {e['mean']:.4g} [{e['low']:.4g}, {e['high']:.4g}]"

    def _measure(
        self,
        model: Any,
        tokenizer: Any,
        handle: QuantizedModel | None,
        problems: Sequence[Problem],
        stop: Callable[[], None] = lambda: None,
    ) -> list[Outcome] | list[AnswerLikelihood]:
        """Evaluate by ``evaluation.metric``, each rank its share; every rank gets all, in order."""
        if self.config.evaluation.metric == "accuracy":
            return self._answer(model, tokenizer, handle, problems, stop)
        return self._score(model, tokenizer, handle, problems, stop)

    def _score(
        self,
        model: Any,
        tokenizer: Any,
        handle: QuantizedModel | None,
        problems: Sequence[Problem],
        stop: Callable[[], None],
    ) -> list[AnswerLikelihood]:
        rank, world_size = world()
        eos = stop_ids(model, tokenizer)
        mine = answer_likelihoods(
            model,
            handle,
            problems[rank::world_size],
            encode=lambda problem: prompt_ids(tokenizer, self.task.messages(problem)),
            encode_answer=lambda text: answer_ids(tokenizer, text),
            pad_id=eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            batch_size=self.config.evaluation.batch_size,
            device=self.selection.device,
            stop=stop,
        )
        return _joined(mine, len(problems))

    def _answer(
        self,
        model: Any,
        tokenizer: Any,
        handle: QuantizedModel | None,
        problems: Sequence[Problem],
        stop: Callable[[], None] = lambda: None,
    ) -> list[Outcome]:
        """Answer ``problems``, each rank its share; every rank gets all outcomes, in order."""
        evaluation = self.config.evaluation
        rank, world_size = world()
        eos = stop_ids(model, tokenizer)
        mine = answer_problems(
            model,
            handle,
            problems[rank::world_size],
            encode=lambda problem: prompt_ids(tokenizer, self.task.messages(problem)),
            decode=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
            eos_ids=eos,
            pad_id=eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            max_new_tokens=evaluation.max_new_tokens or self.config.rollout.max_new_tokens,
            batch_size=evaluation.batch_size,
            stop=stop,
        )
        return _joined(mine, len(problems))

    def _check_stop(self) -> None:
        """Abandon an evaluation if the user asked to stop; several processes finish it, because all
        of them must stop at the same place."""
        if self.should_stop() and world()[1] == 1:
            raise Interrupted("stopped in an evaluation, of which nothing is kept")

    def _outcomes(self, name: str) -> list[dict[str, Any]] | None:
        """The outcomes of an evaluation that is already there, as the first rank sees it: the ranks
        must agree on what is left to do."""
        path = self.rundir.path / "evaluations" / f"{name}.jsonl"
        found: list[Any] | None = None
        if self.rundir.writer and path.exists():
            found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        rows: list[dict[str, Any]] | None = first_says(found)
        return rows

    def evaluate_only(self, run_dir: Path | None, adapter: Path | None) -> None:
        """Evaluate the start in 16 bits and quantised, then what was trained."""
        adapters = first_says([] if run_dir is None else sorted((run_dir / "adapters").glob("*")))
        if run_dir is not None and not adapters:
            raise ValueError(f"{run_dir} holds no trained adapter yet")
        self.evaluate_start("bf16_start", quantized=False)
        if self.mode != "w16a16":
            self.evaluate_start(f"{self.mode}_ptq", quantized=True)
        for folder in adapters:
            if folder.name == "bf16_lora":
                self.evaluate_adapter(folder, "bf16_lora", quantized=False)
                served = f"bf16_lora_served_{self.mode}"
                self.evaluate_adapter(folder, served, quantized=True)
            else:
                self.evaluate_adapter(folder, f"{self.mode}_trained", quantized=True)
        if adapter is not None:
            self.evaluate_adapter(adapter, f"{self.mode}_trained", quantized=True)

    def evaluate_adapter(self, folder: Path, name: str, *, quantized: bool) -> None:
        """Evaluate the adapter in ``folder``, unless that was done already."""
        if self._outcomes(name) is not None:
            self.names.append(name)
            return
        model, tokenizer, handle = self._load(quantized=quantized)
        with folder_for_all(folder) as here:
            adapted = load_lora(model, str(here)).eval()
        self._evaluate(name, adapted, tokenizer, handle)
        _forget(model)

    # --- training ---------------------------------------------------------------------------

    @property
    def _is_dapo(self) -> bool:
        return self.config.train.method == "dapo"

    def _adapter(self, arm: str) -> Path:
        return self.rundir.path / "adapters" / arm

    def _train(self, arm: _Arm, evaluation: str) -> None:
        """Train an arm and evaluate it; what is there already was audited before it was written."""
        self.trained.add(arm.name)
        if self._outcomes(evaluation) is not None:
            self.names.append(evaluation)
            return
        started = time.time()
        teacher = self._teacher() if arm.distilled and self.config.distill.weight > 0 else None
        model, tokenizer, handle = self._load(quantized=arm.quantized)
        if handle is not None:
            self._write_base(handle)
        adapted = add_lora(model, self.config.lora, self.config.run.seed)
        if arm.quantized and self.config.lora.init == "quantisation_error":
            self._compensate(adapted, tokenizer)
        if self.config.model.gradient_checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        aqn = None
        if arm.noise and self.config.noise.enabled:
            aqn = self._noise(adapted)
        adapted.train()
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        # Master weights and two moments in fp32; one checkpoint more than kept while writing.
        self.rundir.check_space(12 * trained * (self.config.train.keep_checkpoints + 1))
        engine = Engine(
            adapted,
            self.config.train,
            self.config.deepspeed,
            fp16=self.config.model.dtype == "fp16",
        )
        learner = Learner(
            arm.name,
            self.config,
            engine,
            handle,
            aqn,
            tokenizer,
            stop_ids(model, tokenizer),
            self.task,
            self.steps,
            self.rundir,
            self.console.say,
            self.should_stop,
            teacher,
            self._sampler(arm, engine, stop_ids(model, tokenizer)),
        )
        self.console.say(f"{arm.name}: {self.steps} steps, {trained:,} trained parameters")
        learner.run(
            resume=self.config.run.resume == "auto",
            after_step=lambda done, metrics: self._after_step(learner, done, metrics),
        )
        self.seconds[f"train {arm.name}"] = time.time() - started
        with engine.for_generation() as whole:
            self._save_adapter(arm.name, whole)
            self._evaluate(
                evaluation, whole, tokenizer, handle, lambda: self._audit(learner, whole)
            )
        _forget(model)

    def _sampler(self, arm: _Arm, engine: Engine, stops: list[int]) -> Sampler | None:
        """The engine that samples for a quantised arm, if the run asks for one."""
        rollout = self.config.rollout
        if rollout.engine == "hf" or not arm.quantized:
            return None
        from npu_qat.training.rollout_vllm import VllmSampler

        base, device = self.rundir.path / FOLDER, self.selection.device
        if self.rundir.writer:
            write_engine_base(self.config, base, device.type)
        engine.barrier()
        return VllmSampler(base, rollout, self.config.lora.r, stops, device)

    def _teacher(self) -> Teacher:
        """The 16-bit model that ``distill`` names."""
        model, _, _ = self._load(quantized=False)
        if self.config.distill.teacher == "bf16_lora":
            with folder_for_all(self._adapter("bf16_lora")) as here:
                model = load_lora(model, str(here))
        return Teacher(model, self.config.distill)

    def _compensate(self, adapted: Any, tokenizer: Any) -> None:
        """Start the adapters from the quantisation error on training problems (no label counts: the
        target is what the 16-bit linears compute)."""
        reference, _, _ = self._load(quantized=False)
        rows = [
            prompt_ids(tokenizer, self.task.messages(p)) + answer_ids(tokenizer, p.solution)
            for p in self.task.train[:COMPENSATION_PROBLEMS]
        ]

        def run(model: Any) -> None:
            for row in rows:  # one by one: padding would be data
                ids = torch.tensor([row], device=self.selection.device)
                model(input_ids=ids, use_cache=False, logits_to_keep=1)

        self.compensations = compensate(adapted, reference, run)
        self.console.say(f"adapters: {compensation_check(self.compensations).measured}")
        _forget(reference)

    def _noise(self, model: Any) -> AQN:
        per_epoch = max(self.steps // self.config.train.epochs, 1)
        aqn = AQN(
            model,
            self.config.noise,
            total_steps=self.steps,
            seed=self.config.run.seed,
            steps_per_epoch=per_epoch,
        )
        for stage in aqn.check():
            if stage.sigma > 0 and stage.inert:
                self.console.say(
                    f"noise: steps {stage.first_step + 1}-{stage.last_step + 1} are inert: sigma "
                    f"{stage.sigma:g} changes {stage.elements_changed_fraction:.1%} of the norm "
                    "weights (noise.norm_dtype: fp32 cures it)"
                )
        return aqn

    def _after_step(self, learner: Learner, done: int, metrics: dict[str, Any]) -> None:
        self.console.step(learner.arm, done, self.steps, metrics)
        self.trackers.log({f"{learner.arm}/{k}": v for k, v in metrics.items()}, done)
        if learner.quantized is not None and learner.arm not in self.audited:
            with learner.engine.gathered():
                learner.quantized.audit.verify(learner.engine.model)
            self.audited.add(learner.arm)
        every = self.config.evaluation.every
        if every and done % every == 0 and done < self.steps:
            problems = self.problems[: self.config.evaluation.every_problems]
            with learner.engine.for_generation() as whole:
                outcomes = self._measure(whole, learner.tokenizer, learner.quantized, problems)
            rows = [o.as_dict() for o in outcomes]
            self.rundir.append(
                "metrics.jsonl",
                {"arm": learner.arm, "step": done, "evaluation": _in_training(rows)},
            )
            found = _in_training(rows).items()
            self.trackers.log({f"{learner.arm}/evaluation_{k}": v for k, v in found}, done)
            self.console.say(f"{learner.arm} step {done}: held-out {self._words(rows)}")

    def _write_base(self, handle: QuantizedModel) -> None:
        """Write what export and parity compare with; a resumed run must find the same base."""
        if not self.rundir.writer:
            return
        found, before = describe_base(self.config, handle), self.rundir.read_json(BASE)
        if before is None:
            self.rundir.write_json(BASE, found)
        elif before["fingerprint"] != found["fingerprint"]:
            raise ValueError(
                f"{self.config.model.path} is not the model that {self.rundir.path} was started "
                "with: quantised, it has another fingerprint. Restore it, or start a new run"
            )

    def _save_adapter(self, arm: str, model: Any) -> None:
        """The adapter's 16-bit image, in PEFT's format: the numbers that were trained with."""
        if not self.rundir.writer:
            return
        dtype = DTYPES[self.config.model.dtype]
        state = {
            name: parameter.detach().to(dtype).cpu()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        model.save_pretrained(self._adapter(arm), state_dict=state)
        base = self.rundir.read_json(BASE)
        if arm == self.mode and base is not None and base["fingerprint"] is not None:
            write_binding(self._adapter(arm), base["fingerprint"])

    def _audit(self, learner: Learner, model: Any) -> None:
        """Write the arm's part of ``audit.json``; raises ``AuditError`` if a check failed."""
        checks = run_checks(learner)
        if learner.quantized is not None and self.config.lora.init == "quantisation_error":
            checks.append(compensation_check(self.compensations))
        if learner.quantized is not None:
            audit = learner.quantized.audit
            audit.add_checks(checks)
            phases = {"evaluation"} | ({"training"} if learner.steps_made else set())
            if learner.steps_made and learner.sampler.in_modules and self._is_dapo:
                phases.add("rollout")
            report = audit.report(model, phases)
        else:
            verdict = "pass" if all(check.ok for check in checks) else "fail"
            report = {"verdict": verdict, "checks": [asdict(c) for c in checks], "modules": []}
        report["noise"] = {
            **(learner.aqn.describe() if learner.aqn else {"enabled": False}),
            "steps": learner.noise_records,
        }
        report["first_update_gradients"] = learner.engine.first_gradients
        if learner.arm == self.mode:
            self.rundir.write_json("audit.json", report)
        raise_failed([Check(**check) for check in report["checks"]])

    # --- the result -------------------------------------------------------------------------

    def evaluations(self) -> dict[str, Any]:
        """The result of every evaluation, and the trained one against each other, by problem."""
        confidence = self.config.evaluation.confidence
        outcomes = {name: self._outcomes(name) or [] for name in self.names}
        arms = {name: _measured(rows, confidence) for name, rows in outcomes.items()}
        trained = f"{self.mode}_trained"
        comparisons = [
            _compare(outcomes, trained, other, confidence)
            for other in self.names
            if trained in outcomes and other != trained
        ]
        return {"confidence": confidence, "arms": arms, "comparisons": comparisons}

    def _summarize(self, seconds: float) -> dict[str, Any]:
        evaluations = self.evaluations()
        self.rundir.write_json("evaluations.json", evaluations)
        audit = self.rundir.read_json("audit.json")
        self.trackers.finish()
        summary = {
            **evaluations,
            "mode": self.mode,
            "steps": self.steps,
            "seconds": seconds,
            "stages": self.seconds,
            "audit": audit["verdict"] if audit else None,
            "trackers": self.trackers.state,
        }
        self.rundir.write_json("summary.json", summary)
        return summary


def _mode(config: RunConfig) -> str:
    """w4a4, w4a16, w16a4, w16a16."""
    recipe = config.quant
    weight = 4 if recipe.quantizes_weight else 16
    activation = 4 if recipe.quantizes_input or recipe.quantizes_output else 16
    return f"w{weight}a{activation}"


def _joined(mine: list[Any], count: int) -> list[Any]:
    """The records of all ranks, each of which did every W-th of ``count`` problems, in order."""
    _, world_size = world()
    if world_size == 1:
        return mine
    parts: list[list[Any]] = [[] for _ in range(world_size)]
    torch.distributed.all_gather_object(parts, mine)
    return [parts[i % world_size][i // world_size] for i in range(count)]


def _measured(rows: list[dict[str, Any]], confidence: float) -> dict[str, Any]:
    """What the records of one evaluation say, as ``summary.json`` has it."""
    if "nll" in rows[0]:
        nll, tokens = [r["nll"] for r in rows], [r["tokens"] for r in rows]
        e = perplexity(nll, tokens, confidence)
        found = {"mean": e.mean, "low": e.low, "high": e.high}
        return {"n": len(rows), "tokens": sum(tokens), "answer_perplexity": found}
    return {
        "n": len(rows),
        "strict": _estimate([r["strict"] for r in rows], confidence),
        "flexible": _estimate([r["flexible"] for r in rows], confidence),
        "length_mean": sum(r["length"] for r in rows) / len(rows),
        "truncated_fraction": sum(r["truncated"] for r in rows) / len(rows),
    }


def _in_training(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The evaluation of a step, as ``metrics.jsonl`` has it."""
    if "nll" in rows[0]:
        e = perplexity([r["nll"] for r in rows], [r["tokens"] for r in rows])
        return {"answer_perplexity": e.mean, "low": e.low, "high": e.high}
    score = proportion([r["strict"] for r in rows])
    return {"strict": score.mean, "low": score.low, "high": score.high}


def _estimate(outcomes: list[bool], confidence: float) -> dict[str, float]:
    estimate = proportion(outcomes, confidence)
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}


def _compare(
    outcomes: dict[str, list[dict[str, Any]]], a: str, b: str, confidence: float
) -> dict[str, Any]:
    """``a`` against ``b``, paired by problem: strict accuracy a - b, or perplexity a / b."""
    if "nll" in outcomes[a][0]:
        nll = [[row["nll"] for row in outcomes[name]] for name in (a, b)]
        tokens = [row["tokens"] for row in outcomes[a]]
        e = perplexity_ratio(nll[0], nll[1], tokens, confidence)
        return {
            **{"a": a, "b": b, "ratio": e.mean},
            **{"low": e.low, "high": e.high, "method": RATIO_METHOD},
        }
    strict = [[row["strict"] for row in outcomes[name]] for name in (a, b)]
    difference = paired_difference(strict[0], strict[1], confidence)
    return {
        "a": a,
        "b": b,
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "method": difference.method,
    }


def _forget(model: Any) -> None:
    """Free a model before the next is loaded."""
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
