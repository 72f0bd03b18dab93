"""Plausible mistakes in a kernel do not pass: wrong bytes, or the host model stops."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.kernels_ascendc.host_model import KERNELS, build

TILE, WORK = "src/mxfp4_tile.h", "src/work.h"
FAKE_QUANT, NORM = "src/mxfp4_fake_quant.h", "src/rms_norm_mxfp4_fake_quant.h"
PACK, DEQUANT = "src/mxfp4_pack.h", "src/mxfp4_dequant.h"

WRONG_BYTES = {
    "ties the other way": (TILE, "static_cast<int32_t>(rule_.nudge)", "rule_.nudge ? 0 : 8"),
    "one binade too much": (TILE, "rule_.bump - (2 << 7)", "rule_.bump - (1 << 7)"),
    "no clamp at 6": (
        TILE,
        "magnitude_, magnitude_, kLargest, count",
        "magnitude_, magnitude_, 8.0f, count",
    ),
    "sign of zero lost": (
        TILE,
        "bits, work_.template ReinterpretCast<uint16_t>(),",
        "bits, bits,",
    ),
    "tiny blocks not flushed": (
        TILE,
        "exponent, rule_.tinyScale, blocks",
        "exponent, kHalfScale, blocks",
    ),
    "NaN forgotten": (TILE, "scale_, kNan, blocks", "scale_, 0, blocks"),
    "tail not filled with zeros": (TILE, "magnitude_[copied], 0.0f,", "magnitude_[copied], 99.0f,"),
    "last core forgets its rest": (WORK, "(total + cores - 1) / cores", "total / cores"),
    "packed: sign in another bit": (PACK, "sign, sign, 3u, count", "sign, sign, 2u, count"),
    "packed: 0.5 lost": (PACK, "magnitude, magnitude, 2.0f", "magnitude, magnitude, 1.0f"),
    "packed: neighbours overlap": (PACK, "second, both, 16 - bits,", "second, both, 17 - bits,"),
    "packed: scale byte doubled": (
        PACK,
        "mxfp4_.Scale(), 23, blocks",
        "mxfp4_.Scale(), 22, blocks",
    ),
    "packed: codes of NaN blocks kept": (
        PACK,
        "        mxfp4_.MulBlocks(codes, factor, extent.Blocks());\n",
        "",
    ),
    "decoded: 6 becomes 5": (DEQUANT, "bend_, value_, -6.0f", "bend_, value_, -7.0f"),
    "decoded: sign dropped": (
        DEQUANT,
        "result, result, code, count",
        "result, result, result, count",
    ),
    "decoded: scale byte 0 is 0": (
        DEQUANT,
        "factor_, factor_, kHalfScale, blocks",
        "factor_, factor_, 0, blocks",
    ),
    "decoded: scale byte 255 is a number": (
        DEQUANT,
        "nan, nan, kNan, blocks",
        "nan, nan, 0, blocks",
    ),
    "norm: epsilon forgotten": (NORM, "mean_, mean_, epsilon_,", "mean_, mean_, 0.0f,"),
    "norm: mean of the padded row": (NORM, "static_cast<float>(row_.valid)", "row_.Padded()"),
    "norm: half of the squares": (NORM, "numbers[half], count - half", "numbers, count - half"),
    "norm: gamma forgotten": (
        NORM,
        "Mul(value, value, work, count)",
        "Mul(work, value, work, count)",
    ),
}
STOPS = {
    "buffer too small": (
        FAKE_QUANT,
        "outQueue_, kBuffers, kTileLength<T> * sizeof(T)",
        "outQueue_, kBuffers, kTileLength<T>",
    ),
    "too much for the unified buffer": (
        "include/npu_qat/mxfp4.h",
        "? 8192 : 4096",
        "? 16384 : 8192",
    ),
    "buffer not given back": (FAKE_QUANT, "        inQueue_.FreeTensor(in);\n", ""),
    "buffer given back twice": (
        FAKE_QUANT,
        "outQueue_.FreeTensor(out);",
        "outQueue_.FreeTensor(out);\n        outQueue_.FreeTensor(out);",
    ),
    "no barrier": (
        TILE,
        "AscendC::Add(magnitude_, magnitude_, work_, count);\n        Barrier();",
        "AscendC::Add(magnitude_, magnitude_, work_, count);",
    ),
    "too many repeats": ("include/npu_qat/mxfp4.h", "kMaxRepeat = 248", "kMaxRepeat = 256"),
    "address not a multiple of 32 bytes": (NORM, "numbers[half]", "numbers[half - 1]"),
    "operands that overlap": (
        TILE,
        "MulByBlock(values, factors, work_, blocks)",
        "MulByBlock(values, factors, values, blocks)",
    ),
    "packed: no barrier": (
        PACK,
        "AscendC::Max(pair_, pair_, upper, count);\n        Barrier();",
        "AscendC::Max(pair_, pair_, upper, count);",
    ),
    "packed: buffer of the scales too small": (
        PACK,
        "scaleQueue_, kBuffers, kTile / kBlock",
        "scaleQueue_, kBuffers, kTile / kBlock / 2",
    ),
    "decoded: shift by all bits": (
        DEQUANT,
        "code, code, static_cast<uint16_t>(15)",
        "code, code, static_cast<uint16_t>(16)",
    ),
    "norm: gamma given back twice": (
        NORM,
        "gammaQueue_.FreeTensor(gamma);",
        "gammaQueue_.FreeTensor(gamma);\n        gammaQueue_.FreeTensor(gamma);",
    ),
}

TRY = """
import sys
from pathlib import Path
import torch
from npu_qat import numerics
from tests.adversarial import every_code_and_scale, ordinary, special, ties
from tests.kernels_ascendc.host_model import HostKernels
from tests.numerics.compare import rms_norm, same, ulps
kernels = HostKernels(Path(sys.argv[1]))
good = True
for profile in ("ascend950", "ascend950-rint"):
    inputs = [ordinary(shape, torch.bfloat16) for shape in ((4, 1536), (5, 33), (3, 20000))]
    for x in [*inputs, ties(torch.bfloat16), special(torch.bfloat16)]:
        good &= same(kernels.fake_quant(x, profile), numerics.fake_quant(x, profile))
        codes, scales = kernels.pack(x, profile)
        q = numerics.quantize(x, profile)
        good &= same(codes, q.packed) and same(scales, q.scales)
codes, scales = every_code_and_scale()
q = numerics.QuantizedTensor.from_packed(
    codes, scales, shape=(256, 512), profile=numerics.get_profile("ocp"), axis=-1
)
values = kernels.dequant(codes, scales, 512, torch.bfloat16)
good &= same(values, numerics.dequantize(q, torch.bfloat16))
for length in (100, 896):
    x, gamma = ordinary((5, length), torch.bfloat16), ordinary((length,), torch.bfloat16)
    x[3] = 0
    y, q = kernels.rms_norm_fake_quant(x, gamma, 1e-6, "ascend950")
    good &= ulps(y, rms_norm(x, gamma, 1e-6)) <= 1
    good &= same(q, numerics.fake_quant(y, "ascend950"))
sys.exit(0 if good else 3)
"""


pytestmark = pytest.mark.slow  # each compiles the kernels anew


def outcome(tmp_path, file: str, old: str, new: str) -> subprocess.CompletedProcess[str]:
    """Change `old` to `new` in a copy of the kernels, compile it, and run it on some inputs."""
    copy = tmp_path / "kernels_ascendc"
    shutil.copytree(KERNELS, copy)
    text = (copy / file).read_text()
    assert text.count(old) == 1 or old == new, f"{file} no longer holds {old!r} once"
    (copy / file).write_text(text.replace(old, new))
    library = build(tmp_path / "kernels.so", copy)
    command = [sys.executable, "-c", TRY, str(library)]
    return subprocess.run(command, capture_output=True, text=True, cwd=KERNELS.parent)


def test_without_a_mistake_it_passes(tmp_path):
    done = outcome(tmp_path, TILE, "Barrier", "Barrier")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mistake", WRONG_BYTES)
def test_gives_wrong_bytes(mistake, tmp_path):
    assert outcome(tmp_path, *WRONG_BYTES[mistake]).returncode == 3


@pytest.mark.parametrize("mistake", STOPS)
def test_is_stopped(mistake, tmp_path):
    done = outcome(tmp_path, *STOPS[mistake])
    assert done.returncode < 0 and "not allowed on the chip" in done.stderr
