"""GSM8K from local files: splits, calculator marks, and errors that name the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npu_qat.tasks import is_held_out
from npu_qat.tasks.gsm8k import load_gsm8k, strip_calculator_marks


def record(number: int, answer: str | None = None) -> dict[str, Any]:
    worked = f"She has {number}*2 = <<{number}*2={2 * number}>>{2 * number} pens.\nAll of them.\n"
    return {
        "question": f"Ann has {number} boxes of 2 pens. How many pens?",
        "answer": answer or f"{worked}#### {2 * number:,}",
    }


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_folder_of_jsonl_keeps_order_and_strips_marks(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [record(n) for n in (1, 2, 700)])
    write(tmp_path / "test.jsonl", [record(9)])
    train, test = load_gsm8k(str(tmp_path))
    assert [p.answer for p in train] == ["2", "4", "1400"]
    assert train[2].solution == "She has 700*2 = 1400 pens.\nAll of them.\n#### 1,400"
    assert train[0].level == 2
    assert [p.answer for p in test] == ["18"]
    assert len({p.id for p in train + test}) == 4


def test_parquet_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    (tmp_path / "main").mkdir()
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        file = tmp_path / "main" / f"{split}-00000-of-00001.parquet"
        parquet.write_table(table.from_pylist([record(n) for n in numbers]), file)
    train, test = load_gsm8k(str(tmp_path))
    assert [p.answer for p in train] == ["2", "4"]
    assert [p.answer for p in test] == ["6"]


def test_single_file_is_split_by_hash(tmp_path: Path) -> None:
    file = write(tmp_path / "all.jsonl", [record(n) for n in range(1, 101)])
    train, test = load_gsm8k(str(file))
    assert len(train) + len(test) == 100
    assert test and all(is_held_out(p.question) for p in test)
    assert not any(is_held_out(p.question) for p in train)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "Why?"}, "record 2: 'answer' is missing"),
        ({"question": " ", "answer": "#### 1"}, "record 2: 'question' is missing"),
        ({"question": "Why?", "answer": "it is 4"}, "record 2.*exactly one '#### N'"),
        ({"question": "Why?", "answer": "#### 4\n#### 5"}, "record 2.*exactly one '#### N'"),
        ({"question": "Why?", "answer": "#### 4\nso there"}, "record 2.*exactly one '#### N'"),
        ({"question": "Why?", "answer": "#### four"}, "record 2.*exactly one '#### N'"),
        (["Why?"], "record 2: expected an object"),
    ],
)
def test_malformed_record_is_named(tmp_path: Path, bad: Any, message: str) -> None:
    write(tmp_path / "train.jsonl", [record(1), bad])
    write(tmp_path / "test.jsonl", [record(2)])
    with pytest.raises(ValueError, match=message):
        load_gsm8k(str(tmp_path))


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(record(1)) + "\n{oops\n")
    write(tmp_path / "test.jsonl", [record(2)])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: not JSON"):
        load_gsm8k(str(tmp_path))


def test_missing_split_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [record(1)])
    with pytest.raises(ValueError, match="needs both a train and a test file"):
        load_gsm8k(str(tmp_path))


def test_wrong_suffix_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("question,answer\n")
    with pytest.raises(ValueError, match=r"\.jsonl or \.parquet"):
        load_gsm8k(str(file))


def test_path_that_is_neither_here_nor_a_hub_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        load_gsm8k(str(tmp_path / "nothing"))


def test_hub_name_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_gsm8k("openai/gsm8k")


def test_marks_are_removed_wherever_they_stand() -> None:
    assert strip_calculator_marks("48/2 = <<48/2=24>>24, <<1+1=2>>2") == "48/2 = 24, 2"
