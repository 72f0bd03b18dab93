"""The numpy witness and the torch arithmetic, written apart, agree on every case."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from npu_qat.config import Recipe
from npu_qat.deploy import open_export
from npu_qat.numerics import QuantizedTensor, dequantize, quantize
from npu_qat.numerics.scales import values_from_bytes
from npu_qat.parity import independent
from npu_qat.parity.independent import ExportFiles, e4m3, e8m0, encode
from tests.deploy.models import NVFP4, export_tiny

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(dtype: torch.dtype) -> torch.Tensor:
    """Ordinary numbers, ties, zeros, outliers, tiny and huge blocks, NaN and Inf."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 100, generator=generator)
    x[1] = (torch.randint(-28, 29, (100,), generator=generator)) / 4  # ties under scale 1 or 2
    x[2] *= 10.0 ** torch.randint(-6, 5, (100,), generator=generator)
    x[3], x[4] = 0.0, -0.0
    x[5] *= 2.0**-124
    x[6] *= 2.0**-126
    x[7] *= 2.0**125
    x[8, 3], x[9, 40], x[10, 99] = torch.nan, torch.inf, -torch.inf
    x[11] = torch.where(torch.arange(100) % 2 == 0, 1.75, 1.0)
    return x.to(dtype)


def exact(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("profile", ["ascend950", "compressed-tensors"])
def test_encoders_agree_code_by_code(profile: str, dtype: torch.dtype) -> None:
    x = inputs(dtype)
    q, found = quantize(x, profile), encode(exact(x), profile)
    assert found is not None
    np.testing.assert_array_equal(found[1], q.scales.numpy())
    np.testing.assert_array_equal(found[0], q.codes.numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [0.7, 31.0, 4e-4])
def test_the_nvfp4_encoder_agrees_too(dtype: torch.dtype, largest: float) -> None:
    x = inputs(dtype)[:5]
    divisor = np.float32(2688.0 / np.float32(largest))
    q = quantize(x, "nvfp4", tensor_scale=torch.tensor(1.0) / torch.tensor(divisor))
    found = encode(exact(x), "nvfp4", divisor)
    assert found is not None
    np.testing.assert_array_equal(found[1], q.scales.numpy())
    np.testing.assert_array_equal(found[0], q.codes.numpy())


def test_every_scale_byte_has_one_value() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    for ours, name in ((e8m0, "ocp"), (e4m3, "nvfp4")):
        theirs = values_from_bytes(byte, quantize(torch.ones(1, 32), name).profile)
        np.testing.assert_array_equal(ours(byte.numpy()), theirs.double().numpy())


def test_a_profile_that_no_engine_applies_has_no_encoder() -> None:
    assert encode(np.ones((1, 32)), "ocp-ceil") is None


@pytest.mark.parametrize(
    ("format", "recipe"),
    [("ascend", Recipe()), ("compressed-tensors", Recipe()), ("compressed-tensors", NVFP4)],
    ids=["ascend", "mxfp4", "nvfp4"],
)
def test_both_readers_see_the_same_numbers(tmp_path: Path, format: str, recipe: Recipe) -> None:
    folder = export_tiny(tmp_path, format, recipe).folder
    files, exported = ExportFiles(folder), dict(open_export(folder).entries())
    packed = {n: v for n, v in exported.items() if isinstance(v, QuantizedTensor)}
    seen = dict(files.weights())
    assert {f"{path}.weight" for path in seen} == set(packed) and len(seen) == 14
    for path, weight in seen.items():
        theirs = dequantize(packed[f"{path}.weight"], apply_tensor_scale=False).double().numpy()
        np.testing.assert_array_equal(weight.values, theirs)
    for name in set(files.float_names()) & set(exported):
        value = exported[name]
        assert isinstance(value, torch.Tensor)
        np.testing.assert_array_equal(files.floats(name), value.double().numpy())


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    folder = export_tiny(tmp_path).folder
    (file,) = folder.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="is cut"):
        ExportFiles(folder)
    file.write_bytes(b"\xff" * 7 + b"\0" + whole[8:100])
    with pytest.raises(ValueError, match="is no safetensors file"):
        ExportFiles(folder)


def test_the_witness_shares_no_code() -> None:
    """What it imports decides whether it is one."""
    tree = ast.parse(Path(independent.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {n for n in names if n.startswith(("npu_qat", "torch", "safetensors"))}
