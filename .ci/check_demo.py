"""Fail unless the newest run proves what README says of the demo; print its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ARMS = ["bf16_start", "w4a4_ptq", "bf16_lora", "bf16_lora_served_w4a4", "w4a4_trained"]
FILES = ["config.yaml", "environment.json", "metrics.jsonl", "audit.json", "summary.json"]
MIN_PROBLEMS = 1000
MAX_SECONDS = 480


def problems_of(run: Path) -> list[str]:
    """What is wrong with a finished run; empty if nothing is."""
    found = [f"{name} is missing" for name in [*FILES, "report.html"] if not (run / name).exists()]
    if found:
        return found
    if json.loads((run / "audit.json").read_text())["verdict"] != "pass":
        found.append("the audit did not pass")
    seconds = json.loads((run / "summary.json").read_text())["seconds"]
    print(f"{seconds:.0f} s")
    if seconds > MAX_SECONDS:
        found.append(f"the run took {seconds:.0f} s, above {MAX_SECONDS} s")
    results = json.loads((run / "evaluations.json").read_text())
    for arm in ARMS:
        result = results["arms"].get(arm)
        if result is None:
            found.append(f"no evaluation of {arm}")
        elif result["n"] < MIN_PROBLEMS:
            found.append(f"{arm} was evaluated on {result['n']} problems")
        else:
            show(arm, result)
    gain = comparison(results["comparisons"], "w4a4_trained", "w4a4_ptq")
    if gain is None:
        found.append("w4a4_trained and w4a4_ptq are not compared")
    else:
        difference, low, high = gain
        print(f"gain of W4A4 training {difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
        if low <= 0:
            found.append("the interval of the gain of W4A4 training reaches zero")
    return found


def show(arm: str, result: dict[str, Any]) -> None:
    strict = result["strict"]
    accuracy = f"{strict['mean']:.3f} ({strict['low']:.3f} to {strict['high']:.3f})"
    print(f"{arm:24} {accuracy}, n = {result['n']}")


def comparison(
    comparisons: list[dict[str, Any]], arm: str, baseline: str
) -> tuple[float, float, float] | None:
    """(difference, low, high) of ``arm - baseline``, whichever way round it was written."""
    for entry in comparisons:
        if (entry["a"], entry["b"]) == (arm, baseline):
            return entry["difference"], entry["low"], entry["high"]
        if (entry["a"], entry["b"]) == (baseline, arm):
            return -entry["difference"], -entry["high"], -entry["low"]
    return None


def main(runs: str) -> int:
    folders = [path for path in Path(runs).iterdir() if (path / "config.yaml").exists()]
    newest = max(folders, key=lambda path: path.stat().st_mtime)
    found = problems_of(newest)
    for problem in found:
        print(f"{newest}: {problem}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
