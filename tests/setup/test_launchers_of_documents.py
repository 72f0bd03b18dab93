"""scripts/ has the design documents' launchers by name; each calls the program with its preset."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from npu_qat.config import preset_names

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
LAUNCHERS = sorted(path.name for path in SCRIPTS.glob("test_*.sh"))
# Named in the experiment plan (section 4.3) and in the experiment log.
NAMED = {
    "test_mxfp4_w4a4_lora_baseline.sh", "test_mxfp4_w4a4_lora_global_aqn.sh",
    "test_mxfp4_w4a4_lora_srdd_targeted.sh", "test_mxfp4_w4a4_lora_srdd_variable.sh",
    "test_nvfp4_w4a4_lora_baseline_fixed.sh", "test_nvfp4_w4a4_lora_small_batch.sh",
    "test_nvfp4_w4a4_training_only.sh", "test_nvfp4_w4a4_true_prehook.sh",
    "test_nvfp4_w4a4_exclude_baselayer.sh", "test_nvfp4_w4a4_columnwise_e13f.sh",
    "test_nvfp4_w4a4_ste_fix_e13g.sh", "test_mxfp4_w4a4_ste_fix_e13h.sh",
}  # fmt: skip


def run(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The launcher with a program in place of Python that prints its arguments."""
    environment = {**os.environ, "PYTHON": "echo", **variables}
    return subprocess.run(
        [str(SCRIPTS / script), *words], capture_output=True, text=True, env=environment
    )


def test_the_documents_names_are_all_there() -> None:
    assert set(LAUNCHERS) >= NAMED


@pytest.mark.parametrize("script", LAUNCHERS)
def test_each_launcher_calls_train_with_an_existing_preset(script: str) -> None:
    first = ("log",) if script == "test_mxfp4_w4a4_lora_baseline.sh" else ()
    done = run(script, *first, "--dry-run")
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"-m npu_qat train --preset (\S+) --dry-run\n", done.stdout)
    assert found and found[1] in preset_names()
    text = (SCRIPTS / script).read_text()
    experiment = re.search(r"E\d+[a-z]?", text)
    assert experiment and experiment[0].lower() in found[1]


def test_no_two_launchers_start_the_same_preset() -> None:
    presets = [re.findall(r"launch\.sh\" (\S+)", (SCRIPTS / s).read_text()) for s in LAUNCHERS]
    named = [p for found in presets for p in found]
    assert len(named) == len(set(named))


def test_the_script_of_two_runs_asks_which(tmp_path: Path) -> None:
    done = run("test_mxfp4_w4a4_lora_baseline.sh", "--dry-run")
    assert done.returncode == 2
    assert "plan-e13a" in done.stderr and "log-e13a-mxfp4" in done.stderr
    assert "--preset plan-e13a" in run("test_mxfp4_w4a4_lora_baseline.sh", "plan").stdout


def test_processes_and_the_documents_variables_are_passed_on() -> None:
    done = run("launch.sh", "log-e13h", "8", "--resume", "auto", MODEL_PATH="m", TRAIN_DATA="d")
    assert done.stdout == (
        "-m torch.distributed.run --standalone --nproc_per_node 8 -m npu_qat train --preset "
        "log-e13h --set model.path=m --set model.revision=null --set task.path=d --resume auto\n"
    )


def test_a_launcher_says_what_it_lacks() -> None:
    done = run("launch.sh")
    assert done.returncode == 2 and done.stderr.startswith("usage: launch.sh PRESET")
    done = run("launch.sh", "log-e13h", PYTHON="no-such-python")
    assert done.returncode == 2 and "set PYTHON" in done.stderr


def test_the_scanner_by_its_name_runs_the_published_method(tmp_path: Path) -> None:
    target = tmp_path / "w4a4_srdd_results.json"
    words = ["--model_path", "demo", "--quant_type", "mxfp4", "--injection_point", "both"]
    words += ["--num_prompts", "1", "--device", "cpu", "--output", str(target)]
    script = SCRIPTS / "srdd_quant_scanner.py"
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"strategy": "reconsider_quantization"' in target.read_text()
