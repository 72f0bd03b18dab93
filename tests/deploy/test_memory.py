"""An export of a large checkpoint needs the memory of a layer, not of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
LAYERS, HIDDEN, MIDDLE, VOCABULARY = 12, 1024, 2048, 4096

# Peak resident memory, reset after everything is imported; files mapped into memory count.
PROGRAM = """
import sys
from pathlib import Path
from npu_qat.config import ModelConfig, Recipe
from npu_qat.deploy import AscendWriter, PackedCore, open_checkpoint
from npu_qat.deploy.export import export

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

source, output = sys.argv[1:]
core = PackedCore(open_checkpoint(ModelConfig(path=source)), Recipe())
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
export(core, AscendWriter(), Path(output))
print(resident("VmHWM") - before)
"""


def write_checkpoint(folder: Path) -> tuple[int, int]:
    """A sharded Qwen2 with random weights; bytes of it all, and of one layer."""
    folder.mkdir()
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MIDDLE, HIDDEN),
        "mlp.up_proj": (MIDDLE, HIDDEN),
        "mlp.down_proj": (HIDDEN, MIDDLE),
    }
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    total = layer_bytes = 0
    for layer in range(LAYERS + 1):
        tensors = {}
        if layer == LAYERS:
            tensors["model.embed_tokens.weight"] = torch.randn(VOCABULARY, HIDDEN) * 0.02
            tensors["model.norm.weight"] = torch.ones(HIDDEN)
        else:
            prefix = f"model.layers.{layer}"
            for name, (n, k) in shapes.items():
                tensors[f"{prefix}.{name}.weight"] = torch.randn(n, k) * 0.02
                if name.endswith(("q_proj", "k_proj", "v_proj")):
                    tensors[f"{prefix}.{name}.bias"] = torch.zeros(n)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{name}.weight"] = torch.ones(HIDDEN)
        tensors = {n: t.bfloat16() for n, t in tensors.items()}
        size = sum(t.nbytes for t in tensors.values())
        total, layer_bytes = total + size, size if layer == 0 else layer_bytes
        file = f"model-{layer:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total, layer_bytes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's /proc is needed")
def test_the_memory_of_an_export_is_about_a_layer(tmp_path: Path) -> None:
    total, layer = write_checkpoint(tmp_path / "source")
    assert total > 220 * MIB and layer < 20 * MIB
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "source"), str(tmp_path / "served")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    grown = float(done.stdout.split()[-1]) * MIB
    # A layer, its codes, and work space that does not depend on the model (pieces of a hash).
    assert grown < 2 * layer + 40 * MIB, f"{grown / MIB:.0f} MiB for a layer of {layer / MIB:.0f}"
