"""GSM8K (Cobbe et al. 2021): grade-school word problems, from a local copy or from the hub.

Each record has a `question` and an `answer`; the answer ends in `#### N` and carries calculator
marks (`<<48/2=24>>`) that no model should learn to write, so they are removed. Every record is
checked on loading: one malformed line is an error that names it, since a silent skip would change
the benchmark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from npu_qat.tasks.answers import canonical_number
from npu_qat.tasks.problem import Problem, is_held_out

HUB_NAME = "openai/gsm8k"

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_FINAL = re.compile(r"^#### *(-?[\d,]+(?:\.\d+)?) *$", re.MULTILINE)
_HUB_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_gsm8k(path: str | None) -> tuple[list[Problem], list[Problem]]:
    """Train and test problems of GSM8K.

    Args:
        path: a folder with one or more `train*` and one or more `test*` files (`.jsonl` or
            `.parquet`, directly in it or in its `main` folder as on the hub); or one such file,
            which is then split by a hash of the question, one in ten held out; or a hub name;
            None means `openai/gsm8k`. What exists on disk comes first.

    Raises:
        ValueError: if nothing is found, a split is missing, or a record is malformed.
        ImportError: if `datasets` or `pyarrow` is needed and not installed.
    """
    name = path or HUB_NAME
    local = Path(name).expanduser()
    if local.is_dir():
        return _folder_split(local, "train"), _folder_split(local, "test")
    if local.is_file():
        problems = list(_checked(_read(local), str(local)))
        held_out = [is_held_out(problem.question) for problem in problems]
        train = [p for p, out in zip(problems, held_out, strict=True) if not out]
        test = [p for p, out in zip(problems, held_out, strict=True) if out]
        return train, test
    if _HUB_PATTERN.fullmatch(name):
        return _from_hub(name)
    raise ValueError(
        f"task.path {name!r} is neither a file nor a folder here, nor a hub name like "
        f"{HUB_NAME!r}: give a folder with train.jsonl and test.jsonl"
    )


def strip_calculator_marks(text: str) -> str:
    """`"48/2 = <<48/2=24>>24"` becomes `"48/2 = 24"`."""
    return _CALCULATOR_MARK.sub("", text)


def _folder_split(folder: Path, split: str) -> list[Problem]:
    places = (folder, folder / "main")
    files = [
        file
        for place in places
        for file in sorted(place.glob(f"{split}*"))
        if file.suffix in {".jsonl", ".parquet"}
    ]
    if not files:
        raise ValueError(
            f"no {split}*.jsonl or {split}*.parquet in {folder} (nor in its folder main): "
            "GSM8K needs both a train and a test file"
        )
    return [problem for file in files for problem in _checked(_read(file), str(file))]


def _read(file: Path) -> Iterator[Any]:
    if file.suffix == ".parquet":
        yield from _read_parquet(file)
        return
    if file.suffix != ".jsonl":
        raise ValueError(f"{file}: GSM8K is read from .jsonl or .parquet, not {file.suffix!r}")
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error.msg})") from None


def _read_parquet(file: Path) -> list[Any]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError(
            f"reading {file} needs pyarrow: pip install pyarrow, or convert it to .jsonl"
        ) from None
    records: list[Any] = parquet.read_table(file).to_pylist()
    return records


def _from_hub(name: str) -> tuple[list[Problem], list[Problem]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"task.path {name!r} is no local path, and the hub needs the datasets package: "
            "pip install datasets, or give a folder with train.jsonl and test.jsonl"
        ) from None
    splits = load_dataset(name, "main")
    return (
        list(_checked(splits["train"], f"{name} train")),
        list(_checked(splits["test"], f"{name} test")),
    )


def _checked(records: Iterable[Any], source: str) -> Iterator[Problem]:
    for number, record in enumerate(records, start=1):
        yield _problem(record, number, source)


def _problem(record: Any, number: int, source: str) -> Problem:
    where = f"{source}, record {number}"
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with 'question' and 'answer'")
    for key in ("question", "answer"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise ValueError(f"{where}: {key!r} is missing or not a text")
    solution = strip_calculator_marks(record["answer"]).strip()
    finals = _FINAL.findall(solution)
    if len(finals) != 1 or not solution.splitlines()[-1].startswith("####"):
        raise ValueError(f"{where}: the answer must end in exactly one '#### N' line")
    answer = canonical_number(finals[0])
    if answer is None:
        raise ValueError(f"{where}: {finals[0]!r} after '####' is no number")
    level = max(1, len([line for line in solution.splitlines() if line.strip()]) - 1)
    stem = Path(source).stem.replace(" ", "-")
    return Problem(f"{stem}-{number}", record["question"].strip(), solution, answer, level)
