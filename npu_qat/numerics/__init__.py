"""What the numbers are: 4-bit formats, named profiles, encode, decode, pack.

    from npu_qat.numerics import quantize, dequantize, fake_quant
    fake_quant(x, "ascend950") == dequantize(quantize(x, "ascend950"), x.dtype)   # bit for bit

`profiles` is data without torch; everything else is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_qat.numerics.codec import QuantizedTensor as QuantizedTensor
    from npu_qat.numerics.codec import dequantize as dequantize
    from npu_qat.numerics.codec import fake_quant as fake_quant
    from npu_qat.numerics.codec import quantize as quantize
    from npu_qat.numerics.npu_layout import from_npu_layout as from_npu_layout
    from npu_qat.numerics.npu_layout import to_npu_layout as to_npu_layout
    from npu_qat.numerics.packing import pack as pack
    from npu_qat.numerics.packing import unpack as unpack
    from npu_qat.numerics.profiles import PROFILES as PROFILES
    from npu_qat.numerics.profiles import Profile as Profile
    from npu_qat.numerics.profiles import get_profile as get_profile
    from npu_qat.numerics.profiles import profile_names as profile_names
    from npu_qat.numerics.scales import nvfp4_tensor_scale as nvfp4_tensor_scale

_HOME = {
    "PROFILES": "profiles",
    "Profile": "profiles",
    "get_profile": "profiles",
    "profile_names": "profiles",
    "QuantizedTensor": "codec",
    "dequantize": "codec",
    "fake_quant": "codec",
    "quantize": "codec",
    "nvfp4_tensor_scale": "scales",
    "pack": "packing",
    "unpack": "packing",
    "from_npu_layout": "npu_layout",
    "to_npu_layout": "npu_layout",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
