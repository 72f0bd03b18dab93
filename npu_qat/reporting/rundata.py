"""What a run directory holds, read leniently and with an account of what is not there.

A report is wanted most when something went wrong: half-way through a run, after a crash, from a
directory that someone copied without its checkpoints. So no file is required. But a page that
silently leaves out the audit would read like a page without complaints; every piece that is absent
or unreadable is therefore listed with what the reader does not see because of it, and numbers in
two files that should agree are compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]

# File -> what the reader misses without it.
FILES = {
    "config.yaml": "the resolved configuration",
    "environment.json": "versions, machine and device",
    "metrics.jsonl": "all plots by step",
    "audit.json": "the audit: nothing shows that the configured quantisation and noise happened",
    "samples.jsonl": "sample completions",
    "evaluations.json": "accuracies and comparisons",
    "evaluations": "accuracy by difficulty, and the check of the accuracies by problem",
    "summary.json": "the run's duration and number of steps",
}


@dataclass(frozen=True)
class Missing:
    """A piece of the run directory that could not be read."""

    name: str
    effect: str
    reason: str = "not there"


@dataclass
class RunData:
    """The contents of a run directory.

    Attributes:
        path: the directory.
        config, config_text: ``config.yaml`` parsed and as written.
        environment, audit, evaluations, summary: the JSON files; empty if missing.
        metrics: arm -> one record a step, by step. Of several lines with the same arm and step
            (a resumed run, an evaluation after the step) later ones add to and overwrite earlier.
        samples: completions, in order; of a step written twice, the later lines.
        outcomes: arm of the evaluations -> one record a problem.
        missing: what is absent or unreadable.
        contradictions: sentences about numbers that should agree and do not.
    """

    path: Path
    config: Record = field(default_factory=dict)
    config_text: str = ""
    environment: Record = field(default_factory=dict)
    metrics: dict[str, list[Record]] = field(default_factory=dict)
    audit: Record = field(default_factory=dict)
    samples: list[Record] = field(default_factory=list)
    evaluations: Record = field(default_factory=dict)
    outcomes: dict[str, list[Record]] = field(default_factory=dict)
    summary: Record = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)

    def setting(self, key: str, default: Any = None) -> Any:
        """``config`` value at a dotted ``key``, or ``default``."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return default if value is None else value


def read_run(run_dir: Path) -> RunData:
    """Read everything that is there. Raises ``ValueError`` if ``run_dir`` is not a directory."""
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a directory; give the directory of a run")
    run = RunData(run_dir)
    _read_config(run)
    for name, effect in FILES.items():
        wanted = name != "samples.jsonl" or run.setting("train.method") != "sft"
        if wanted and not (run_dir / name).exists():
            run.missing.append(Missing(name, effect))
    run.environment = _read_object(run, "environment.json")
    run.audit = _read_object(run, "audit.json")
    run.evaluations = _read_object(run, "evaluations.json")
    run.summary = _read_object(run, "summary.json")
    run.metrics = _by_arm_and_step(_read_lines(run, "metrics.jsonl"))
    run.samples = _latest_samples(_read_lines(run, "samples.jsonl"))
    for file in sorted((run_dir / "evaluations").glob("*.jsonl")):
        run.outcomes[file.stem] = _read_lines(run, f"evaluations/{file.name}")
    run.contradictions = [*_accuracy_contradictions(run), *_difference_contradictions(run)]
    return run


def number(record: Mapping[str, Any], key: str) -> float | None:
    """``record[key]`` as a finite float, or None."""
    try:
        value = float(record[key])
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _read_config(run: RunData) -> None:
    path = run.path / "config.yaml"
    if not path.exists():
        return
    run.config_text = path.read_text(encoding="utf-8", errors="replace")
    try:
        parsed = yaml.safe_load(run.config_text)
    except yaml.YAMLError as error:
        run.missing.append(Missing("config.yaml", FILES["config.yaml"], f"not valid YAML: {error}"))
        return
    run.config = parsed if isinstance(parsed, dict) else {}


def _read_object(run: RunData, name: str) -> Record:
    path = run.path / name
    if not path.exists():
        return {}
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        run.missing.append(Missing(name, FILES[name], f"not valid JSON: {error}"))
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _read_lines(run: RunData, name: str) -> list[Record]:
    """Objects of a JSON-lines file; lines that a kill cut short are counted, not fatal."""
    path = run.path / name
    if not path.exists():
        return []
    records, unreadable = [], 0
    # Not splitlines(): completions may hold U+2028, which JSON leaves as it is.
    for line in filter(None, path.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            record = json.loads(line)
        except ValueError:
            unreadable += 1
            continue
        if isinstance(record, dict):
            records.append(record)
    if unreadable:
        plural = "s" if unreadable > 1 else ""
        reason = f"{unreadable} line{plural} cut short or damaged"
        run.missing.append(Missing(name, f"the content of {unreadable} line{plural}", reason))
    return records


def _by_arm_and_step(lines: list[Record]) -> dict[str, list[Record]]:
    merged: dict[str, dict[int, Record]] = {}
    for line in lines:
        if "arm" in line and isinstance(line.get("step"), int):
            steps = merged.setdefault(str(line["arm"]), {})
            steps[line["step"]] = {**steps.get(line["step"], {}), **line}
    return {arm: [steps[step] for step in sorted(steps)] for arm, steps in merged.items()}


def _latest_samples(lines: list[Record]) -> list[Record]:
    """Lines without those that a resumed run wrote again.

    Samples of one step are neighbours. When an arm comes back to a step that it has already left,
    the run was resumed, and what the file held for that step and later ones is superseded.
    """
    kept: list[Record] = []
    last: dict[Any, Any] = {}
    for line in lines:
        arm, step = line.get("arm"), line.get("step", 0)
        if arm in last and step < last[arm]:
            kept = [old for old in kept if old.get("arm") != arm or old.get("step", 0) < step]
        last[arm] = step
        kept.append(line)
    return kept


def _accuracy_contradictions(run: RunData) -> list[str]:
    found = []
    for name, arm in run.evaluations.get("arms", {}).items():
        outcomes = run.outcomes.get(name)
        if not outcomes:
            continue
        for score in ("strict", "flexible"):
            stated = number(arm.get(score, {}), "mean")
            counted = sum(bool(row.get(score)) for row in outcomes) / len(outcomes)
            if stated is not None and abs(stated - counted) > 1e-6:
                found.append(
                    f"evaluations.json gives {name} a {score} accuracy of {stated:.4f}, but its "
                    f"{len(outcomes)} outcomes by problem give {counted:.4f}"
                )
    return found


def _difference_contradictions(run: RunData) -> list[str]:
    arms = run.evaluations.get("arms", {})
    found = []
    for row in run.evaluations.get("comparisons", []):
        means = [number(arms.get(row.get(side), {}).get("strict", {}), "mean") for side in "ab"]
        stated = number(row, "difference")
        if stated is None or means[0] is None or means[1] is None:
            continue
        if abs(stated - (means[0] - means[1])) > 1e-6:
            found.append(
                f"evaluations.json states {row['a']} minus {row['b']} as {stated:+.4f}, but the "
                f"two accuracies differ by {means[0] - means[1]:+.4f}"
            )
    return found
