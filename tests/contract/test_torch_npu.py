"""The real torch-npu package: its promises about shapes, dtypes and errors, and what it lets by.

Its Meta kernels are the vendor's own statement of what an operator returns. The CPU kernels must
return the same shapes, dtypes and strides, so that the product's code, run on them, is run on what
a device would hand it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from npu_qat.backends.npu import ops as contract
from npu_qat.cli import main
from tests.contract.test_op_kernels import ROOT
from tests.experiments.running import configuration
from tests.training.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.contract

E2M1, E8M0 = 296, 293
SHAPES = [(64,), (2, 2), (3, 96), (5, 34), (1, 32), (2, 70, 34), (1536, 64), (2, 3, 66, 4)]


def layout(tensors: Any) -> list[tuple[Any, ...]]:
    tensors = tensors if isinstance(tensors, (tuple, list)) else [tensors]
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def matmul_inputs(m: int, n: int, k: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Arguments of ``npu_quant_matmul`` as serving stacks pass them."""
    api = torch.ops.npu
    x, xs = api.npu_dynamic_mx_quant(numbers(m, k))
    w, ws = api.npu_dynamic_mx_quant(numbers(n, k))
    named = {
        "pertoken_scale": xs,
        "output_dtype": 15,
        "x1_dtype": E2M1,
        "x2_dtype": E2M1,
        "pertoken_scale_dtype": E8M0,
        "scale_dtype": E8M0,
        "group_sizes": [1, 1, 32],
    }
    return [x, w.transpose(0, 1), ws.transpose(0, 1)], named


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


# --- no device, and no way around that ------------------------------------------------------------


def test_the_package_is_there_and_sees_no_device(torch_npu: Any) -> None:
    assert torch.npu.is_available() is False and torch.npu.device_count() == 0
    assert torch_npu.__version__.startswith("2.")


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--device", "npu"],
        ["train", "--device", "cpu", "--backend", "npu"],
        ["parity", "device", "--device", "npu", "--quick"],
    ],
    ids=" ".join,
)
def test_the_product_refuses_the_npu_without_one(
    cpu_operators: Any, command: list[str], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with CPU kernels registered: they are no device."""
    output = ["--output", str(tmp_path / "run")] if command[0] == "train" else []
    assert main([*command, *output]) == 2
    said = capsys.readouterr().err
    assert "npu" in said and ("sees no NPU" in said or "does not run on cpu" in said)


def test_a_run_on_the_cpu_is_not_disturbed_by_the_package(tmp_path: Path) -> None:
    """Imported without a device, it makes torch's AdamW and checkpointing ask a driver, and fail;
    so the program must not import it where no device can be."""
    model = save_tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    config = configuration(
        model,
        run={"device": "auto", "threads": 1},
        model={"dtype": "bf16", "gradient_checkpointing": True},
        train={"steps": 2},
        evaluation={"problems": 2, "baselines": []},
    )
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    command = ["-m", "npu_qat", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # Not the variable with which the other tests keep torch from importing the package.
        env={k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    audit = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert audit["verdict"] == "pass"
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["device"] == "cpu" and "no npu" in environment["reason"]


# --- what the product assumes ---------------------------------------------------------------------


def test_dtype_numbers(torch_npu: Any) -> None:
    assert torch_npu.float4_e2m1fn_x2 == contract.DTYPE_E2M1 == E2M1
    assert torch_npu.float8_e8m0fnu == contract.DTYPE_E8M0 == E8M0


@pytest.mark.parametrize(
    ("dtype", "number"), [(torch.float16, 5), (torch.float32, 6), (torch.bfloat16, 15)]
)
def test_numbers_of_result_dtypes(cpu_operators: Any, dtype: torch.dtype, number: int) -> None:
    assert contract.OUTPUT_CODES[dtype] == number
    inputs, named = matmul_inputs(2, 4, 64)
    named |= {"output_dtype": number}
    meta = torch.ops.npu.npu_quant_matmul(
        *map(on_meta, inputs), **{k: on_meta(v) for k, v in named.items()}
    )
    assert meta.dtype == cpu_operators.npu_quant_matmul(*inputs, **named).dtype == dtype


def test_the_quantiser_has_no_gradient(cpu_operators: Any) -> None:
    """Which is why the product puts a straight-through function around it."""
    x = numbers(2, 64).requires_grad_()
    assert not any(t.requires_grad for t in cpu_operators.npu_dynamic_mx_quant(x))


# --- Meta and CPU kernels agree -------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_tensors_have_the_shapes_of_meta(cpu_operators: Any, shape: tuple) -> None:
    x = numbers(*shape)
    for axis in range(-len(shape), len(shape)):
        found = cpu_operators.npu_dynamic_mx_quant(x, axis=axis, dst_type=E2M1)
        meta = torch.ops.npu.npu_dynamic_mx_quant(x.to("meta"), axis=axis, dst_type=E2M1)
        assert layout(found) == layout(meta)
    found = cpu_operators.npu_dynamic_dual_level_mx_quant(x)
    assert layout(found) == layout(torch.ops.npu.npu_dynamic_dual_level_mx_quant(x.to("meta")))
    if len(shape) > 1:
        found = cpu_operators.npu_dynamic_mx_quant_with_dual_axis(x)
        meta = torch.ops.npu.npu_dynamic_mx_quant_with_dual_axis(x.to("meta"))
        assert layout(found) == layout(meta)


@pytest.mark.parametrize("dst_type", [5, 6, 15])
def test_dequantised_tensors_have_the_shapes_of_meta(cpu_operators: Any, dst_type: int) -> None:
    pair = cpu_operators.npu_dynamic_mx_quant(numbers(3, 96))
    named = {"src_type": E2M1, "dst_type": dst_type}
    found = cpu_operators.npu_anti_mx_quant(*pair, **named)
    meta = torch.ops.npu.npu_anti_mx_quant(*map(on_meta, pair), **named)
    assert layout(found) == layout(meta)


@pytest.mark.parametrize("size", [(1, 1, 64), (4, 16, 128), (5, 7, 96), (3, 64, 128), (2, 8, 34)])
def test_products_have_the_shapes_of_meta(cpu_operators: Any, size: tuple) -> None:
    inputs, named = matmul_inputs(*size)
    for bias in (None, torch.zeros(size[1])):
        named["bias"] = bias
        found = cpu_operators.npu_quant_matmul(*inputs, **named)
        meta = torch.ops.npu.npu_quant_matmul(
            *map(on_meta, inputs), **{k: on_meta(v) for k, v in named.items()}
        )
        assert layout(found) == layout(meta)


def test_fake_tensors_of_an_npu_keep_their_device(torch_npu: Any) -> None:
    with FakeTensorMode():
        x = torch.empty(4, 128, dtype=torch.bfloat16, device="npu")
        codes, scales = torch_npu.npu_dynamic_mx_quant(x)
        y = torch_npu.npu_quant_matmul(
            codes,
            codes.transpose(0, 1),
            scales.transpose(0, 1),
            **contract.quant_matmul_arguments(scales, None, torch.bfloat16),
        )
    assert (codes.device.type, scales.device.type, y.device.type) == ("npu", "npu", "npu")
    assert (y.shape, y.dtype) == ((4, 4), torch.bfloat16)


@pytest.mark.parametrize(
    ("operator", "axis"), [("npu_dynamic_mx_quant", -1), ("npu_dynamic_mx_quant", 0)]
)
def test_opcheck_of_the_quantiser(cpu_operators: Any, operator: str, axis: int) -> None:
    torch.library.opcheck(
        getattr(torch.ops.npu, operator).default, (numbers(4, 96),), {"axis": axis}
    )


def test_opcheck_of_the_others(cpu_operators: Any) -> None:
    api, x = torch.ops.npu, numbers(4, 96)
    torch.library.opcheck(api.npu_dynamic_dual_level_mx_quant.default, (x,))
    torch.library.opcheck(api.npu_dynamic_mx_quant_with_dual_axis.default, (x,))
    pair = api.npu_dynamic_mx_quant(x)
    torch.library.opcheck(api.npu_anti_mx_quant.default, tuple(pair), {"src_type": E2M1})
    inputs, named = matmul_inputs(4, 8, 96)
    torch.library.opcheck(api.npu_quant_matmul.default, tuple(inputs), named)


# --- what Meta refuses, and what it lets by -------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((2, 33), {}),
        ((2, 32), {"axis": 2}),
        ((2, 32), {"block_size": 16}),
        ((2, 32), {"scale_alg": 3}),
    ],
)
def test_meta_and_cpu_refuse_the_same_quantisations(
    cpu_operators: Any, shape: tuple, named: dict
) -> None:
    for device in ("meta", "cpu"):
        with pytest.raises(RuntimeError):
            torch.ops.npu.npu_dynamic_mx_quant(numbers(*shape).to(device), **named)


CHANGES: dict[str, Any] = {
    "contiguous transpose": lambda i, n: i.__setitem__(1, i[1].contiguous()),
    "untransposed weight": lambda i, n: i.__setitem__(1, i[1].t()),
    "groups of 16": lambda i, n: n.update(group_sizes=[1, 1, 16]),
    "no group sizes": lambda i, n: n.pop("group_sizes"),
    "fp8 codes": lambda i, n: n.update(x1_dtype=292),
    "torch's own FP4 dtype": lambda i, n: n.update(x1_dtype=45),
    "another scale dtype": lambda i, n: n.update(scale_dtype=292),
    "unequal block counts": lambda i, n: n.update(pertoken_scale=n["pertoken_scale"][:, :1]),
}
BY = {  # what Meta lets through, and a device refuses or computes wrongly
    "bf16 bias": lambda i, n: n.update(bias=torch.zeros(8, dtype=torch.bfloat16)),
    "3-D input": lambda i, n: (
        i.__setitem__(0, i[0][None]),
        n.update(pertoken_scale=n["pertoken_scale"][None]),
    ),
    "no output dtype": lambda i, n: n.pop("output_dtype"),
    "contiguous scale": lambda i, n: i.__setitem__(2, i[2].contiguous()),
}


def changed(name: str, device: str) -> None:
    inputs, named = matmul_inputs(4, 8, 128)
    {**CHANGES, **BY}[name](inputs, named)
    move = on_meta if device == "meta" else lambda value: value
    torch.ops.npu.npu_quant_matmul(*map(move, inputs), **{k: move(v) for k, v in named.items()})


@pytest.mark.parametrize("name", CHANGES)
def test_meta_and_cpu_refuse_the_same_products(cpu_operators: Any, name: str) -> None:
    for device in ("meta", "cpu"):
        with pytest.raises(RuntimeError):
            changed(name, device)


@pytest.mark.parametrize("name", BY)
def test_what_meta_lets_by_the_cpu_kernels_refuse(cpu_operators: Any, name: str) -> None:
    changed(name, "meta")
    with pytest.raises(RuntimeError):
        changed(name, "cpu")
