"""Matrix files: cells, their digests, and the store that never writes over a result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from npu_qat.config import ConfigError, Override, parse_overrides
from npu_qat.experiments import matrix_store
from npu_qat.experiments.matrix import (
    cells,
    load_matrix,
    matrix_path,
    settings_of,
    shipped_matrices,
)
from npu_qat.experiments.matrix_store import Store, pack_outcomes, unpack_outcomes
from tests.experiments.matrices import TEXT, failure, record, write_matrix


def test_cells_run_by_priority_and_whole_seeds(tmp_path: Path) -> None:
    ids = [cell.id for cell in cells(write_matrix(tmp_path))]
    assert ids == [
        *("start--s0", "bf16--s0", "plain--s0", "noisy--s0", "never--s0"),
        *("bf16--s1", "plain--s1", "noisy--s1", "bf16--s2", "plain--s2", "noisy--s2"),
        "late--s0",
    ]


def test_an_arm_is_the_preset_with_its_variants_and_keys(tmp_path: Path) -> None:
    by_id = {cell.id: cell for cell in cells(write_matrix(tmp_path))}
    noisy, late = by_id["noisy--s2"].config, by_id["late--s0"].config
    assert noisy is not None and late is not None
    assert noisy.noise.enabled and noisy.train.steps == 3 and noisy.run.seed == 2
    assert noisy.lora.alpha == 32  # of the preset
    assert late.train.lr == 1e-4 and not late.noise.enabled
    served = by_id["bf16--s0"].served["w4a4"]
    assert served.quant.injection_point == "both"


def test_a_digest_knows_what_decides_and_nothing_else(tmp_path: Path) -> None:
    matrix = write_matrix(tmp_path)

    def digest(text: str = TEXT, *overrides: tuple[str, object]) -> str:
        given = [Override(tuple(k.split(".")), v, k) for k, v in overrides]
        found = cells(write_matrix(tmp_path, text), overrides=given)
        return next(cell.digest for cell in found if cell.id == "noisy--s1")

    plain = next(cell.digest for cell in cells(matrix) if cell.id == "noisy--s1")
    assert plain == digest()
    nested = TEXT.replace("noisy: {noise.enabled: true}", "noisy: {noise: {enabled: true}}")
    assert plain == digest(nested)
    for key, value in (("run.device", "cpu"), ("run.threads", 2), ("task.path", "x")):
        assert digest(TEXT, (key, value)) == plain, key
    assert digest(TEXT, ("model.path", "y"), ("model.revision", "z")) == plain
    for what in (("train.lr", 1e-3), ("noise.sigma_start", 0.02), ("quant.rotation", "hadamard32")):
        assert digest(TEXT, what) != plain, what
    how = {"communication_data_type": "fp16"}
    assert digest(TEXT, ("deepspeed.overrides", how)) != plain
    assert len({cell.digest for cell in cells(matrix)}) == len(cells(matrix))


def test_a_digest_outlives_a_new_key_with_its_default(tmp_path: Path) -> None:
    """Only keys that differ from the defaults are in it."""
    cell = next(c for c in cells(write_matrix(tmp_path)) if c.id == "plain--s0")
    assert "quant.rotation" not in settings_of(cell.config)
    assert settings_of(cell.config)["train.steps"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: late", "name: plain"), "is there twice"),
        (("use: [w4a4, noisy]", "use: [w4a4, loud]"), "no variant 'loud'"),
        (("arms: {noisy: 1, plain: -1}", "arms: {noisy: 1, quiet: -1}"), "no row 'quiet'"),
        (("arms: {noisy: 1, plain: -1}", "arms: {noisy: 1, plain: 1}"), "sum to zero"),
        (("train.lr: 1e-4", "train.learning_rate: 1e-4"), "learning_rate"),
        (("title: Start,", "title: Start, titel: x,"), "titel"),
        (("seeds: [0, 1, 2]", "seeds: [0, 1, 2]\ncurve_arms: [plain, lost]"), "no arm 'lost'"),
        (("seeds: [0, 1, 2]", "seeds: [0, 1, 0]"), "one or more different numbers"),
        (("seeds: [0], priority", "seeds: [], priority"), "arm 'late': seeds"),
        (("{train.lr: 1e-4}", "{run.seed: 4}"), "use 'seeds:'"),
    ],
)
def test_a_mistake_in_the_file_is_named(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    text = TEXT.replace(*change)
    assert text != TEXT
    with pytest.raises(ConfigError, match=message):
        cells(write_matrix(tmp_path, text))


def test_no_override_makes_all_seeds_one(tmp_path: Path) -> None:
    overrides = parse_overrides(["run.seed=5"])
    with pytest.raises(ConfigError, match=r"--set run\.seed=5: each cell has a seed of its own"):
        cells(write_matrix(tmp_path), overrides=overrides)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"bad\.yaml: cannot be read"):
        load_matrix(tmp_path / "bad.yaml")


def test_models_are_found_by_name_and_placed_from_outside(tmp_path: Path) -> None:
    text = TEXT + "models:\n  small: {path: here}\n  large: {path: there, set: {lora.r: 8}}\n"
    found = cells(write_matrix(tmp_path, text), models={"small": "elsewhere"})
    assert len(found) == 2 * len(cells(write_matrix(tmp_path)))
    paths = {(c.model, c.config.model.path, c.config.lora.r) for c in found if c.config}
    assert paths == {("small", "elsewhere", 32), ("large", "there", 8)}
    with pytest.raises(ConfigError, match="no model 'medium'"):
        cells(write_matrix(tmp_path, text), models={"medium": "x"})


def test_a_configuration_that_is_refused_is_a_cell_if_that_is_expected(tmp_path: Path) -> None:
    text = TEXT.replace("noise.target_modules: [nope]", "noise.num_stages: 1, noise.enabled: true")
    cell = next(c for c in cells(write_matrix(tmp_path, text)) if c.arm.name == "never")
    assert cell.config is None and "leaves no stage" in cell.refusal
    with pytest.raises(ConfigError, match="leaves no stage"):
        cells(write_matrix(tmp_path, text.replace("expect: refused", "expect: result")))


def test_shipped_matrices_are_valid() -> None:
    assert {"smoke", "rl-demo", "sft-smollm2"} <= set(shipped_matrices())
    for name in shipped_matrices():
        matrix = load_matrix(matrix_path(name))
        assert matrix.name == name
        ids = [cell.id for cell in cells(matrix)]
        assert len(set(ids)) == len(ids)
    with pytest.raises(ConfigError, match="smoke"):
        matrix_path("smoek")


def test_planning_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "from npu_qat.experiments.matrix import *\n"
        "import npu_qat.experiments.matrix_pages, npu_qat.experiments.matrix_run\n"
        "cells(load_matrix(matrix_path('rl-demo')))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# --- the store --------------------------------------------------------------------------------


def test_a_result_is_found_again_and_never_overwritten(tmp_path: Path) -> None:
    cell = cells(write_matrix(tmp_path))[2]
    store = Store(tmp_path / "results")
    assert store.result(cell) is None
    path = store.add(cell, record(cell, {"plain": 40}))
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        store.add(cell, record(cell, {"plain": 99}))
    assert path.read_bytes() == before
    assert store.result(cell) == record(cell, {"plain": 40})
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_other_code_makes_another_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = cells(write_matrix(tmp_path))[2]
    Store(tmp_path).add(cell, record(cell, {"plain": 40}))
    monkeypatch.setattr(matrix_store, "code_digest", lambda: "0ther")
    assert Store(tmp_path).result(cell) is None
    assert Store(tmp_path, any_code=True).result(cell) is not None
    newer = record(cell, {"plain": 41}, finished="2026-02-01T00:00:00+00:00")
    Store(tmp_path).add(cell, newer)
    assert Store(tmp_path, any_code=True).result(cell) == newer


def test_every_failure_is_kept(tmp_path: Path) -> None:
    cell = cells(write_matrix(tmp_path))[2]
    store = Store(tmp_path / "results")
    for kind in ("A", "B"):
        store.add(cell, failure(cell, kind))
    assert [f["error"]["type"] for f in store.failures(cell)] == ["A", "B"]
    assert store.result(cell) is None


def test_results_of_another_matrix_are_told_apart(tmp_path: Path) -> None:
    matrix = write_matrix(tmp_path)
    store = Store(tmp_path / "results")
    for cell in cells(matrix)[:3]:
        store.add(cell, record(cell, {}))
    assert store.unknown(cells(matrix)) == []
    changed = write_matrix(tmp_path, TEXT.replace("train.steps: 3", "train.steps: 4"))
    assert len(store.unknown(cells(changed))) == 3


def test_a_damaged_result_is_an_error_that_names_it(tmp_path: Path) -> None:
    cell = cells(write_matrix(tmp_path))[2]
    path = Store(tmp_path / "results").add(cell, record(cell, {}))
    for damage in (b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff\xfe"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{path.name}.*delete it"):
            Store(tmp_path / "results").result(cell)


def test_outcomes_survive_packing() -> None:
    for outcomes in ([], [False], [False, False, True], [True] * 65 + [False] * 3):
        assert unpack_outcomes(pack_outcomes(outcomes)) == outcomes
