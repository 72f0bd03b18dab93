"""What an experiment matrix is: arms x models x seeds, each cell one complete configuration.

A single run answers "how good was this training?". Whether a setting *helps* takes several seeds of
two arms that differ in that setting alone. A matrix file says which arms there are, what they
share, and which questions are asked of them before any result is seen::

    name: noise
    preset: demo                      # what all arms share: a preset,
    set: {train.steps: 40}            # and keys over it
    seeds: [0, 1, 2]
    variants:                         # named sets of keys, to build arms from
      w4a4: {quant.injection_point: both}
      noisy: {noise.enabled: true}
    arms:
      - {name: plain, use: [w4a4], set: {noise.enabled: false}}
      - {name: noisy, use: [w4a4, noisy]}
    contrasts:
      - {question: Does noise help?, arms: {noisy: 1, plain: -1}}

A cell is identified by the **digest** of its resolved configuration: every key that differs from
the schema's default, but for those that only say where and on what a run happens. Two files that
mean the same cell therefore share its result, and a changed key can never be mistaken for it.

No torch here: a plan, a mistake in the file and a report answer at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from npu_qat.config import ConfigError, Override, RunConfig, load_run
from npu_qat.config.schema import Section
from npu_qat.config.yaml_text import parse_yaml

SHIPPED = Path(__file__).parent / "matrices"
# Keys that say where and on what a cell runs, not what it computes. The content of the model and of
# the data is recorded by checksum in each result.
NOT_IN_DIGEST = {
    "run": {"output_dir", "resume", "threads", "device", "backend", "seed"},
    "model": {"path", "revision"},
    "task": {"path"},
    "train": {"checkpoint_every", "keep_checkpoints"},
    "deepspeed": {"zero_stage"},
}
DIGITS = 12

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")]
Settings = dict[str, Any]


# The design documents' five questions, and what goes beyond them.
Topic = Literal["viable", "aqn", "guided", "gap", "difference", "levers", "other"]


class Published(Section):
    """A number that a document gives for an arm, and why ours may differ."""

    value: float = Field(description="The number, in the document's own unit.")
    what: str = Field(description="What was measured, and where it is written.")
    note: str = Field(description="Why ours may differ.")


class ModelChoice(Section):
    """A model that every arm is run on."""

    path: str = Field(description="As model.path; --model NAME=PATH overrides it.")
    set: Settings = Field(default_factory=dict, description="Keys for this model only.")


class Arm(Section):
    """One row: a configuration that is run for every seed and model."""

    name: Name = Field(description="Short name; results and contrasts use it.")
    title: str = Field(description="What the row is, for people.")
    preset: str | None = Field(None, description="Instead of the matrix's preset.")
    use: tuple[str, ...] = Field((), description="Variants, in order.")
    set: Settings = Field(default_factory=dict, description="Keys over the variants.")
    train: bool = Field(
        True, description="False: only evaluate the model as it comes (an anchor; one seed)."
    )
    serve: dict[Name, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Name -> variants: evaluate the trained adapter on a base in these numbers.",
    )
    seeds: tuple[int, ...] | None = Field(None, description="Instead of the matrix's seeds.")
    priority: int = Field(1, description="Lower runs earlier.")
    expect: Literal["result", "refused", "no-learning"] = Field(
        "result",
        description="refused: an arm that cannot work and must be stopped by the program. "
        "no-learning: one that trains without gaining anything, by construction.",
    )
    why: str = Field("", description="What the arm is for, or why it cannot work.")
    published: tuple[Published, ...] = Field((), description="Numbers of the documents.")


class Contrast(Section):
    """A question asked of the arms: a weighted sum of their results, zero if nothing differs."""

    question: str = Field(description="In words; what a positive answer would mean.")
    arms: dict[str, float] = Field(
        description="Row -> weight. Weights sum to zero; 'arm@served' names a served row."
    )
    answers: Topic = Field(
        "other", description="Topic on the page of answers; Holm's correction is made within it."
    )
    headline: bool = Field(False, description="Told at the top of the page of answers, too.")


class Matrix(Section):
    """A matrix file."""

    name: Name = Field(description="Names the folder of its results.")
    title: str = Field(description="One line.")
    about: str = Field(
        "", description="What is measured on what, with its limits. A line is a paragraph."
    )
    preset: str | None = Field(None, description="What all arms start from.")
    set: Settings = Field(default_factory=dict, description="Keys over it, for all arms.")
    seeds: tuple[int, ...] = Field((0,), description="Values of run.seed.")
    models: dict[Name, ModelChoice] = Field(
        default_factory=dict, description="Default: the one that the arms' configuration names."
    )
    variants: dict[Name, Settings] = Field(default_factory=dict, description="Named sets of keys.")
    arms: tuple[Arm, ...] = Field(min_length=1, description="The rows.")
    contrasts: tuple[Contrast, ...] = Field((), description="The questions.")
    curve: str = Field("accuracy_train", description="Metric of the learning curves.")
    curve_arms: tuple[str, ...] = Field((), description="Arms that are drawn. Default: all.")

    @model_validator(mode="after")
    def _names_fit(self) -> Matrix:
        names = [arm.name for arm in self.arms]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"arm {twice[0]!r} is there twice")
        used = {
            v for arm in self.arms for v in (*arm.use, *(x for s in arm.serve.values() for x in s))
        }
        if unknown := sorted(set(self.curve_arms) - set(names)):
            raise ValueError(f"curve_arms: there is no arm {unknown[0]!r}")
        if unknown := sorted(used - set(self.variants)):
            raise ValueError(f"there is no variant {unknown[0]!r}; variants: {list(self.variants)}")
        rows = set(self.rows)
        for contrast in self.contrasts:
            if missing := sorted(set(contrast.arms) - rows):
                raise ValueError(f"contrast {contrast.question!r}: there is no row {missing[0]!r}")
            if abs(sum(contrast.arms.values())) > 1e-9:
                raise ValueError(f"contrast {contrast.question!r}: the weights must sum to zero")
        for arm in self.arms:
            if arm.serve and not arm.train:
                raise ValueError(f"arm {arm.name!r} trains nothing, so it has nothing to serve")
        for where, seeds in (
            ("", self.seeds),
            *((f"arm {a.name!r}: ", a.seeds) for a in self.arms),
        ):
            if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
                raise ValueError(f"{where}seeds: expected one or more different numbers")
        settings = [self.set, *self.variants.values(), *(a.set for a in self.arms)]
        settings += [model.set for model in self.models.values()]
        if any("run.seed" in keys for keys in settings):
            raise ValueError("run.seed is what differs between cells; use 'seeds:'")
        return self

    @property
    def rows(self) -> tuple[str, ...]:
        """Every row of the report: arms, and ``arm@served`` for each way of serving one."""
        return tuple(
            row for arm in self.arms for row in (arm.name, *(f"{arm.name}@{s}" for s in arm.serve))
        )


@dataclass(frozen=True)
class Cell:
    """One configuration of one arm: what is run, skipped or reported.

    Attributes:
        matrix: name of the matrix.
        arm: its row.
        model: name of the model, "" if the matrix names none.
        seed: ``run.seed``.
        config: resolved; None if it is refused.
        served: name -> resolved configuration in whose numbers the adapter is evaluated.
        refusal: why the configuration itself is refused, or "".
    """

    matrix: str
    arm: Arm
    model: str
    seed: int
    config: RunConfig | None
    served: Mapping[str, RunConfig]
    refusal: str = ""

    @property
    def id(self) -> str:
        """Unique in the matrix: ``arm--model--s0``."""
        return "--".join(filter(None, [self.arm.name, self.model, f"s{self.seed}"]))

    @cached_property
    def digest(self) -> str:
        """Digest of everything that decides the result but code, model and data."""
        content = {
            "seed": self.seed,
            "model": self.model,
            "train": self.arm.train,
            "config": settings_of(self.config),
            "served": {name: settings_of(config) for name, config in self.served.items()},
            # A refused configuration has no resolved keys; what was written identifies it.
            "refused": [self.arm.use, self.arm.set] if self.refusal else None,
        }
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def settings_of(config: RunConfig | None) -> dict[str, Any]:
    """The keys of ``config`` that differ from the defaults and decide a result, dotted."""
    if config is None:
        return {}
    plain = config.model_dump(mode="json", exclude=NOT_IN_DIGEST, exclude_defaults=True)
    return dict(sorted(_dotted(plain).items()))


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):  # an empty section says nothing
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def matrix_path(name: str) -> Path:
    """The file of a matrix: a path, or the name of a shipped one.

    Raises ``ConfigError`` if it is neither.
    """
    given = Path(name)
    if given.suffix in (".yaml", ".yml") or given.exists():
        if not given.is_file():
            raise ConfigError([f"{name}: no such file"])
        return given
    shipped = SHIPPED / f"{name}.yaml"
    if not shipped.is_file():
        known = ", ".join(shipped_matrices())
        raise ConfigError([f"there is no matrix {name!r}; give a file, or one of: {known}"])
    return shipped


def shipped_matrices() -> list[str]:
    """Names of the matrices that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_matrix(path: Path) -> Matrix:
    """Read a matrix file. Raises ``ConfigError`` with every problem in it."""
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    if not isinstance(document.data, Mapping):
        raise ConfigError([f"{path.name}: expected keys such as 'name:' and 'arms:'"])
    try:
        return Matrix.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        problems = []
        for found in error.errors(include_url=False):
            where = ".".join(str(part) for part in found["loc"])
            problems.append(f"{path.name}: {where + ': ' if where else ''}{found['msg']}")
        raise ConfigError(problems) from None


def cells(
    matrix: Matrix,
    *,
    models: Mapping[str, str] | None = None,
    overrides: Sequence[Override] = (),
) -> list[Cell]:
    """All cells, in the order in which they run: by priority, then seed, then as written.

    So an interrupted matrix has whole seeds, which is what paired comparisons need.

    Args:
        matrix: the file.
        models: model name -> path, over the file's.
        overrides: keys for all cells, over everything else.

    Raises:
        ConfigError: an arm's configuration is not valid, unless the arm expects to be refused; or
            an override of ``run.seed``, which would make all seeds one.
    """
    models = models or {}
    if said := [o.origin for o in overrides if o.path == ("run", "seed")]:
        raise ConfigError([f"{said[0]}: each cell has a seed of its own; use --seeds"])
    if unknown := sorted(set(models) - set(matrix.models)):
        raise ConfigError(
            [f"--model: the matrix has no model {unknown[0]!r}; it has {sorted(matrix.models)}"]
        )
    found = []
    for arm in matrix.arms:
        for model in matrix.models or [""]:
            seeds = arm.seeds if arm.seeds is not None else matrix.seeds
            # Without training nothing depends on the seed.
            for seed in seeds if arm.train else seeds[:1]:
                found.append(_cell(matrix, arm, model, seed, models, overrides))
    position = {arm.name: i for i, arm in enumerate(matrix.arms)}
    return sorted(found, key=lambda c: (c.arm.priority, c.seed, position[c.arm.name]))


def _cell(
    matrix: Matrix,
    arm: Arm,
    model: str,
    seed: int,
    models: Mapping[str, str],
    overrides: Sequence[Override],
) -> Cell:
    chosen = matrix.models[model] if model else None
    path = models.get(model, chosen.path) if chosen else None
    where = f"{matrix.name}: arm {arm.name}"

    def resolve(use: Sequence[str], settings: Settings) -> RunConfig:
        layers = [matrix.set, chosen.set if chosen else {}]
        layers += [matrix.variants[name] for name in use]
        keys = {**({"model.path": path} if path else {}), **settings, "run.seed": seed}
        sets = [
            Override(tuple(key.split(".")), value, f"{where}: {key}")
            for layer in (*layers, keys)
            for key, value in layer.items()
        ]
        return load_run(preset=arm.preset or matrix.preset, overrides=[*sets, *overrides]).config

    try:
        config: RunConfig | None = resolve(arm.use, arm.set)
        served = {n: resolve((*arm.use, *use), arm.set) for n, use in arm.serve.items()}
    except ConfigError as error:
        if arm.expect != "refused":
            raise
        return Cell(matrix.name, arm, model, seed, None, {}, str(error))
    return Cell(matrix.name, arm, model, seed, config, served)
