"""npu-qat: train a language model in 4 bits the way an Ascend NPU will serve it.

The public names below are imported when they are first used, so that ``import npu_qat`` (and with
it ``npu-qat --help`` and every configuration error) answers without loading torch.

============================  ====================================================================
``fake_quant(x, profile)``    round a tensor to a 4-bit format and back; same shape and dtype
``quantize(x, profile)``      the codes, packed bytes and scale bytes
``dequantize(q, dtype)``      the values that those bytes stand for
``profiles()``                the names of the profiles ("ascend950", ...)
``Recipe``                    which layers of a model are quantized, and how
``prepare_model(model, r)``   quantize a Hugging Face model by a recipe; gives back the audit handle
``add_lora(model, s, seed)``   adapters on a prepared model (PEFT), in the numbers of serving
``AQN``                       adaptive quantization noise on the RMSNorm weights
``QATCallback``               phases, noise and audit under transformers' and TRL's trainers
============================  ====================================================================
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from npu_qat.__about__ import __version__

if TYPE_CHECKING:
    from npu_qat.config import Recipe
    from npu_qat.integrations import QATCallback
    from npu_qat.layers import add_lora, prepare_model
    from npu_qat.noise import AQN
    from npu_qat.numerics import dequantize, fake_quant, quantize
    from npu_qat.numerics.profiles import profile_names as profiles

__all__ = [
    "AQN",
    "QATCallback",
    "Recipe",
    "__version__",
    "add_lora",
    "dequantize",
    "fake_quant",
    "prepare_model",
    "profiles",
    "quantize",
]

# Public name -> the module that defines it, and its name there.
_HOME = {
    "AQN": ("npu_qat.noise", "AQN"),
    "QATCallback": ("npu_qat.integrations", "QATCallback"),
    "Recipe": ("npu_qat.config", "Recipe"),
    "add_lora": ("npu_qat.layers", "add_lora"),
    "dequantize": ("npu_qat.numerics", "dequantize"),
    "fake_quant": ("npu_qat.numerics", "fake_quant"),
    "prepare_model": ("npu_qat.layers", "prepare_model"),
    "profiles": ("npu_qat.numerics.profiles", "profile_names"),
    "quantize": ("npu_qat.numerics", "quantize"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562) and keep it."""
    if name not in _HOME:
        raise AttributeError(f"module 'npu_qat' has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
