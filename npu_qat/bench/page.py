"""The tables of ``docs/performance.md``, written from result files.

    python -m npu_qat.bench.page docs/performance.md

Between ``<!-- rows FILE BENCHMARK... -->`` and ``<!-- end -->`` stand the rows of those benchmarks
from ``docs/results/performance/FILE`` (made by ``npu-qat bench ... --json``), and a line about the
machine. Everything else on the page is written by people.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from npu_qat.bench.bars import verdict

RESULTS = Path("results") / "performance"
_TABLE = re.compile(r"(<!-- rows (\S+) ([\w ,-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Path) -> str:
    """``text`` with its tables made anew from the files in ``results``."""

    def table(found: re.Match[str]) -> str:
        result = json.loads((results / found[2]).read_text(encoding="utf-8"))
        wanted = found[3].replace(",", " ").split()
        return f"{found[1]}{_rendered(result, wanted)}{found[4]}"

    return _TABLE.sub(table, text)


def _rendered(result: dict[str, Any], benchmarks: list[str]) -> str:
    chosen = [row for row in result["rows"] if row["name"].split("/")[0] in benchmarks]
    if not chosen:
        raise ValueError(f"no rows of {', '.join(benchmarks)} in the result file")
    lines = [_machine(result["environment"]), "", "| row | measured | baseline | ratio | bar |"]
    lines.append("|---|---|---|---|---|")
    for row in chosen:
        unit = "bytes" if "bytes" in row else "ms"
        shown = [_number(row[unit], unit), _number(row[f"baseline_{unit}"], unit)]
        if "tokens_per_second" in row:
            shown[0] += f" ({row['tokens_per_second']:.0f} tokens/s)"
        bar = verdict(row["name"], row["ratio"])
        cells = (f"`{row['name']}`", *shown, f"{row['ratio']:.2f}", bar)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _machine(environment: dict[str, Any]) -> str:
    versions = environment["versions"]
    device = environment.get("accelerator") or environment["processor"]
    computed = ", ".join(environment["computed_by"].values())
    return (
        f"`{environment['command']}`: {device}, {environment['cores']} cores, "
        f"{environment['torch_threads']} torch threads, load {environment['load_average'][0]}, "
        f"{environment.get('clock', 'time passed')}; "
        f"Python {versions['python']}, torch {versions['torch']}, transformers "
        f"{versions.get('transformers', 'absent')}; 4-bit numbers by {computed}."
    )


def _number(value: float, unit: str) -> str:
    return f"{value / 2**20:.2f} MiB" if unit == "bytes" else f"{value:.4g} ms"


def main(page: str) -> None:
    """Write the tables of ``page``."""
    path = Path(page)
    text = path.read_text(encoding="utf-8")
    path.write_text(filled(text, path.parent / RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
