"""``fake-quant``: quantise and dequantise a tensor, beside a clone of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from npu_qat.bench.peers import FakeQuantizer, fake_quantizers
from npu_qat.bench.rows import Row, Setup, working
from npu_qat.bench.timing import Times

Quantizer = Callable[[torch.Tensor], torch.Tensor]
Shapes = tuple[tuple[int, int], ...]
GPU_SHAPES: Shapes = ((8192, 8192), (8192, 8960), (8192, 1536), (2048, 1536))
CPU_SHAPES: Shapes = ((4096, 4096), (4096, 384), (512, 128), (64, 128))
PROFILES = ("ascend950", "nvfp4-one-level", "ocp-even")
# Inputs that one graph works through; together they are larger than any L2 cache.
_BYTES_IN_TURN = 256 << 20
_MOST_IN_TURN = 64


def rows(setup: Setup) -> Iterator[Row]:
    """A row a shape and quantiser; every quantiser of a shape is measured in turns with the clone.

    On a GPU the plain names are of captured calls; ``eager`` ones include the launch.
    """
    backend = setup.selection.backend
    shapes = GPU_SHAPES if setup.on_gpu else CPU_SHAPES
    shapes = shapes[-1:] if setup.quick else shapes
    for shape in shapes:
        quantizers: dict[str, Quantizer] = {
            f"{backend.name}-{profile}": partial(_ours, setup, profile) for profile in PROFILES
        }
        if backend.name != "emulation":
            quantizers["reference-ascend950"] = _reference
        if setup.peers:
            found: list[FakeQuantizer] = list(fake_quantizers(setup.note))
            quantizers |= {peer.name: peer.call for peer in found}
        yield from _of_shape(setup, shape, quantizers)
    if setup.on_gpu:
        return
    for dtype in (torch.float16, torch.float32)[: 1 if setup.quick else 2]:
        quantizers = {f"{backend.name}-ascend950": partial(_ours, setup, "ascend950")}
        yield from _of_shape(setup, shapes[0], quantizers, dtype)


def _ours(setup: Setup, profile: str, x: torch.Tensor) -> torch.Tensor:
    return setup.selection.backend.fake_quant(x, profile)


def _reference(x: torch.Tensor) -> torch.Tensor:
    from npu_qat.numerics import fake_quant

    return fake_quant(x, "ascend950")


def _of_shape(
    setup: Setup,
    shape: tuple[int, int],
    quantizers: dict[str, Quantizer],
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Row]:
    device = setup.selection.device
    name = f"{str(dtype).removeprefix('torch.')}/{shape[0]}x{shape[1]}"
    x = torch.randn(shape, device=device).to(dtype)
    found = working({who: partial(q, x) for who, q in quantizers.items()}, name, setup.note)
    calls: dict[str, Quantizer] = {"clone": torch.clone, **{who: quantizers[who] for who in found}}
    plain = setup.clock.measure({who: partial(call, x) for who, call in calls.items()})
    graphed = _captured(setup, calls, x) if device.type == "cuda" else {}
    for who in found:
        if who in graphed:
            yield Row.of_times(f"fake-quant/{who}/{name}", graphed[who], graphed["clone"])
            yield Row.of_times(f"fake-quant/{who}/{name}/eager", plain[who], plain["clone"])
        else:
            yield Row.of_times(f"fake-quant/{who}/{name}", plain[who], plain["clone"])


def _captured(setup: Setup, calls: dict[str, Quantizer], x: torch.Tensor) -> dict[str, Times]:
    """Times from CUDA graphs, of those that can be captured."""
    size = x.numel() * x.element_size()
    inputs = [x, *(x.clone() for _ in range(min(_MOST_IN_TURN, _BYTES_IN_TURN // size)))]
    sequences = {}
    for who, call in calls.items():
        sequence = [partial(call, each) for each in inputs]
        try:
            setup.clock.measure_graphs({who: sequence[:1]})
        except Exception as error:  # a synchronisation inside, or memory outside the graph
            torch.cuda.synchronize()
            setup.note(f"{who}: measured without a graph ({_first_line(error)})")
        else:
            sequences[who] = sequence
    return setup.clock.measure_graphs(sequences) if "clone" in sequences else {}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
