"""The model of a plan: shapes without data, from a folder, a config.json or a well-known name.

A model is built on the meta device from its configuration alone, so that a plan of 72 billion
parameters takes a second on a machine that could not hold them. The configuration comes from a
local folder, the local hub cache, or an architecture file that comes with this package, in this
order, and only then from the network.

The architecture files hold the ``config.json`` of the published models (Qwen2.5, Qwen3, Llama 3)
as far as shapes depend on it; a test counts their parameters against the published counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from npu_qat.config import ModelConfig

ARCHITECTURES = Path(__file__).parents[1] / "assets" / "architectures"


def known_models() -> dict[str, str]:
    """Short name -> hub name of the architectures that come with this package."""
    hub_names = sorted(file.stem.replace("--", "/") for file in ARCHITECTURES.glob("*.json"))
    return {
        name.partition("/")[2].lower().removesuffix("-instruct").removeprefix("meta-"): name
        for name in hub_names
    }


def architecture(name: str, **changes: Any) -> Any:
    """The transformers configuration of a known model, with some keys changed.

    Raises ``ValueError`` for an unknown name.
    """
    from transformers import AutoConfig

    known = known_models()
    if name not in known:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(known)}")
    file = ARCHITECTURES / f"{known[name].replace('/', '--')}.json"
    return AutoConfig.for_model(**{**json.loads(file.read_text(encoding="utf-8")), **changes})


def read_architecture(config: ModelConfig) -> tuple[Any, str]:
    """The model's configuration (transformers) and a sentence on where it came from.

    Raises ``ValueError`` if it can be found nowhere.
    """
    from transformers import AutoConfig

    from npu_qat.layers.base_model import model_source

    source = model_source(config)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if Path(source).exists():
        return AutoConfig.from_pretrained(source, **options), f"from {source}"
    try:
        found = AutoConfig.from_pretrained(source, local_files_only=True, **options)
        return found, "from the local hub cache"
    except OSError:
        pass
    shipped = ARCHITECTURES / f"{source.replace('/', '--')}.json"
    if shipped.is_file():
        found = AutoConfig.from_pretrained(shipped)
        return found, "from this package's architecture file (not in the local hub cache)"
    try:
        return AutoConfig.from_pretrained(source, **options), "from the hub"
    except OSError as error:
        raise ValueError(
            f"model.path {config.path!r} is no local folder, not in the hub cache, and cannot be "
            f"fetched: {str(error).splitlines()[0]}"
        ) from error


def build_on_meta(architecture: Any, config: ModelConfig) -> Any:
    """The model without data."""
    import torch
    from transformers import AutoModelForCausalLM

    from npu_qat.layers.base_model import DTYPES

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            architecture,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
        )
