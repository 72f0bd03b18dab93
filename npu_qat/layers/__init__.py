"""How a model carries the numbers: quantised linears, preparation, LoRA, audit."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_qat.layers.audit import Audit, AuditError
    from npu_qat.layers.lora import add_lora, load_lora
    from npu_qat.layers.plan import PlannedLinear, plan_linears
    from npu_qat.layers.prepare import QuantizedModel, prepare_model
    from npu_qat.layers.quant_linear import QuantLinear

_HOME = {
    "Audit": "audit",
    "AuditError": "audit",
    "add_lora": "lora",
    "load_lora": "lora",
    "PlannedLinear": "plan",
    "plan_linears": "plan",
    "QuantizedModel": "prepare",
    "prepare_model": "prepare",
    "QuantLinear": "quant_linear",
}
__all__ = [
    "Audit",
    "AuditError",
    "PlannedLinear",
    "QuantLinear",
    "QuantizedModel",
    "add_lora",
    "load_lora",
    "plan_linears",
    "prepare_model",
]


def __getattr__(name: str) -> Any:
    # PEFT takes seconds to import and only training needs it.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"npu_qat.layers.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
