"""What the manual and the examples train on an NPU can be computed there, and served.

The presets of the design documents compute in an earlier program's numbers: a 950 refuses them at
the first quantised layer, and the export refuses what was trained elsewhere. A page that leads a
reader into that costs the whole training.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from npu_qat.backends.npu.profiles import mx_call
from npu_qat.cli import build_parser
from npu_qat.config import Recipe, load_config
from npu_qat.deploy.ascend import AscendWriter
from npu_qat.numerics import get_profile
from tests.docs.blocks import ROOT, blocks, pages, program_calls


def on_npus() -> Iterator[tuple[str, list[str]]]:
    """Where a training on an NPU is written down, and its arguments behind ``npu-qat``."""
    for page in pages():
        for block in blocks(page):
            for words in program_calls(block) if block.language == "bash" else ():
                if words[0] == "train" and "--device npu" in " ".join(words):
                    yield page, words
    for name in (".env.example", "docs/containers.md"):
        for line in re.findall(r"(?m)^#?TRAIN_ARGS=(.+)$", (ROOT / name).read_text()):
            yield name, ["train", *shlex.split(line)]
    for job in sorted((ROOT / "examples" / "kubernetes").glob("ascendjob-*.yaml")):
        pod = yaml.safe_load(job.read_text())["spec"]["replicaSpecs"]["Master"]["template"]["spec"]
        arguments = pod["containers"][0]["args"]
        yield job.name, arguments[arguments.index("--") + 1 :]


def recipe_of(place: str, words: list[str], folder: Path) -> Recipe:
    """The recipe of a call; a file that the page does not show has the defaults."""
    args = build_parser().parse_args(words)
    shown = {b.title: b.code for b in blocks(place) if b.title} if place.endswith(".md") else {}
    file = None
    if args.config in shown:
        file = folder / "run.yaml"
        file.write_text(shown[args.config], encoding="utf-8")
    preset = args.preset or (None if args.config else "demo")
    return load_config(file, preset=preset, overrides=args.overrides).quant


def stops(recipe: Recipe) -> str | None:
    """Why an Ascend 950 or the export stops at a recipe, or None."""
    if mx_call(get_profile(recipe.activation_profile)) is None:
        return f"no operator computes {recipe.activation_profile}"
    served = AscendWriter().activations(recipe)
    if not served.same:
        return f"trained with {served.trained}, served with {served.served}"
    if recipe.rotates or recipe.block_axis != "row" or recipe.lora_input != "full":
        return "no engine rotates, cuts blocks along out, or feeds adapters 4-bit inputs"
    return None


CALLS = list(on_npus())


@pytest.mark.parametrize(("place", "words"), CALLS, ids=[f"{p}: {' '.join(w)}" for p, w in CALLS])
def test_a_950_trains_it_and_an_engine_serves_it(
    place: str, words: list[str], tmp_path: Path
) -> None:
    assert stops(recipe_of(place, words, tmp_path)) is None


def test_the_manual_trains_on_npus() -> None:
    places = {place for place, _ in CALLS}
    assert {"docs/get-started/npu.md", "docs/zh/index.md", "docs/containers.md"} <= places


@pytest.mark.parametrize("preset", ["log-e13h", "log-e13g", "plan-e13a"])
def test_the_presets_of_the_documents_are_told_apart(preset: str) -> None:
    assert stops(load_config(preset=preset).quant) is not None
