"""What the training side computes, written down so that another machine can be asked about it.

A recording is a folder with ``recording.safetensors`` (inputs, codes, scales and outputs of every
quantised linear; log-probabilities of real text) and ``recording.json`` (which model, which recipe,
which machine and versions, the texts, the noise floor). ``parity run`` makes one in memory and
checks at once; ``parity record`` writes it, and ``parity check`` reads it where the NPU is: the
machine that checks needs the export and the recording, not the run and not the 16-bit model.

    x.<linear>        [M, K]        inputs, for the first linear of those that read one tensor
    codes.<linear>    u8 [M, K/2]   packed E2M1 codes of x as training makes them, likewise
    scales.<linear>   u8 [M, blocks]
    y.<linear>        [M, N]        what the training module answers to x
    logp.<i>, best.<i>, top_ids.<i>, top_logp.<i>      row i of the texts (``observe``)

Weights are not in it but their digests. Both files are sealed by SHA-256: a recording that was cut,
edited or mixed is refused. That finds damage, not a forger, who could seal again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from npu_qat.__about__ import __version__
from npu_qat.deploy.adapter import read_adapter
from npu_qat.deploy.checksums import sha256
from npu_qat.deploy.core import divisor, fingerprint_of, raw_bytes
from npu_qat.layers.base_model import prompt_ids, stop_ids
from npu_qat.layers.plan import sibling_groups
from npu_qat.layers.quant_linear import QuantLinear
from npu_qat.numerics import QuantizedTensor, dequantize, pack
from npu_qat.parity.observe import (
    Differences,
    NoiseFloor,
    Observed,
    generate,
    measure_noise,
    observe,
)
from npu_qat.parity.training_side import TrainingSide

VERSION = 1
TENSORS, CONTENT = "recording.safetensors", "recording.json"
# Inputs that are kept of each linear: 64 rows of 1,536 are 196 kB in 16 bits.
ROWS = 64


@dataclass(frozen=True)
class Settings:
    """How much is recorded.

    Attributes:
        prompts: problems of the task's test split.
        max_new_tokens: of each greedy completion.
        seeds: perturbations of the residual stream behind the noise floor.
        batch_size: rows that go through the model together.
    """

    prompts: int = 16
    max_new_tokens: int = 48
    seeds: int = 3
    batch_size: int = 8


@dataclass
class Recording:
    """What the training side computed; see the module docstring.

    Attributes:
        content: the content of ``recording.json``, without seals.
        tensors: the content of ``recording.safetensors``.
    """

    content: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def rows(self) -> list[list[int]]:
        """Prompt and completion of each text, as token ids."""
        return [p["tokens"] + p["completion"] for p in self.content["prompts"]]

    @property
    def messages(self) -> list[list[dict[str, str]]]:
        """The chat prompts."""
        return [p["messages"] for p in self.content["prompts"]]

    @property
    def observed(self) -> list[Observed]:
        """What the training side said about each row."""
        t = self.tensors
        return [
            Observed(t[f"logp.{i}"], t[f"best.{i}"], t[f"top_ids.{i}"], t[f"top_logp.{i}"])
            for i in range(len(self.content["prompts"]))
        ]

    @property
    def noise(self) -> NoiseFloor:
        """The noise floor of the training side."""
        kept = self.content["noise"]
        variants = {name: Differences(**values) for name, values in kept["variants"].items()}
        return NoiseFloor(variants, kept["positions"], kept["generated"], kept["example"])

    def input_of(self, path: str) -> torch.Tensor:
        """The recorded input [M, K] of linear ``path``."""
        return self.tensors[f"x.{self.content['linears'][path]['input']}"]

    def save(self, folder: Path) -> None:
        """Write the recording into a new folder.

        Raises:
            ValueError: ``folder`` is not empty.
        """
        from safetensors.torch import save_file

        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty; name a new folder with --output")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / TENSORS)
        content = {**self.content, "tensors_sha256": sha256(folder / TENSORS)}
        content["seal"] = _seal(content)
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / CONTENT).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Recording:
        """Read a recording.

        Raises:
            ValueError: it is not there, of another version, incomplete, cut or edited.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content = json.loads((folder / CONTENT).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no readable recording: {error}") from error
        if not isinstance(content, dict) or content.get("version") != VERSION:
            found = content.get("version") if isinstance(content, dict) else None
            raise ValueError(
                f"{folder} is a recording of version {found}, but this program reads version "
                f"{VERSION}; record again with npu-qat {__version__}"
            )
        if content.pop("seal", None) != _seal(content):
            raise ValueError(f"{folder}/{CONTENT} was edited or damaged: its seal does not fit")
        if not (folder / TENSORS).is_file():
            raise ValueError(f"{folder}/{TENSORS} is missing; copy the folder again")
        if sha256(folder / TENSORS) != content.pop("tensors_sha256"):
            raise ValueError(
                f"{folder}/{TENSORS} is cut, edited or of another recording: its SHA-256 is not "
                f"the one in {CONTENT}"
            )
        try:
            return cls(content, load_file(folder / TENSORS))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder}/{TENSORS} cannot be read: {error}") from error


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# --- making one ---------------------------------------------------------------------------------


def record(
    side: TrainingSide, settings: Settings, environment: Mapping[str, Any] | None = None
) -> Recording:
    """What ``side`` computes on its own task's test problems.

    Args:
        side: the training side.
        settings: how much.
        environment: of this machine, kept as it is.

    Raises:
        ValueError: the task has fewer problems, or the model's numbers are not finite.
    """
    if not 0 < settings.prompts <= len(side.task.test):
        raise ValueError(
            f"--prompts {settings.prompts}: the task has {len(side.task.test)} test problems"
        )
    problems = side.task.test[: settings.prompts]
    with side.handle.phase("evaluation"), torch.no_grad():
        content, tensors = _texts(side, problems, settings)
        inputs = _inputs(side, [p["tokens"] + p["completion"] for p in content["prompts"]])
        linears = _linears(side, inputs, tensors)
    fingerprint, digests = weight_digests(side)
    for path, kept in linears.items():
        kept["weight"] = digests[path]
    content |= {
        "version": VERSION,
        "npu_qat": __version__,
        "environment": dict(environment or {}),
        "computed_on": compute_identity(side.selection.device),
        "model": side.config.model.model_dump(mode="json"),
        "recipe": side.core.recipe.model_dump(mode="json"),
        "activations": side.activations,
        "base_fingerprint": fingerprint,
        "adapter": None if side.adapter is None else adapter_fingerprint(side.adapter),
        "linears": linears,
    }
    return Recording(content, tensors)


def compute_identity(device: torch.device) -> dict[str, str]:
    """What decides the order of a sum in fp32: equal means bitwise equality can be asked for."""
    from npu_qat.parity.machine import processor

    return {
        "device": device.type,
        "processor": processor(device),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }


def adapter_fingerprint(folder: Path) -> str:
    """SHA-256 over the matrices and scales of an adapter."""
    return read_adapter(folder).fingerprint()


def weight_digests(side: TrainingSide) -> tuple[str, dict[str, str]]:
    """The base's fingerprint, and a digest of every quantised weight as the modules hold it."""
    fingerprint = fingerprint_of(side.core)
    trained = None if side.base is None else side.base.fingerprint
    if trained is not None and fingerprint.hexdigest(input_scales=False) != trained:
        raise ValueError(
            f"{side.core.checkpoint.folder} is not the model that was trained: its fingerprint is "
            f"not the run's {trained[:16]}...; restore it"
        )
    digests = {path: weight_digest(packed_weight(m)) for path, m in side.handle.layers.items()}
    return fingerprint.hexdigest(), digests


def packed_weight(layer: QuantLinear) -> QuantizedTensor:
    """The codes that a training module multiplies with, on the CPU."""
    scale = getattr(layer, "weight_tensor_scale", None)
    profile = layer.state.recipe.weight_profile
    return QuantizedTensor.from_packed(
        layer.weight_packed.data.cpu(),
        layer.weight_scale.data.cpu(),
        shape=(layer.out_features, layer.in_features),
        profile=profile,
        axis=layer.weight_axis,
        tensor_scale=None if scale is None else scale.cpu(),
    )


def weight_digest(q: QuantizedTensor) -> str:
    """SHA-256 over codes, scale bytes and the divisor of a tensor scale that is not 1."""
    digest = hashlib.sha256(raw_bytes(q.packed))
    digest.update(raw_bytes(q.scales))
    if q.tensor_scale is not None and float(q.tensor_scale) != 1.0:
        digest.update(raw_bytes(divisor(q.tensor_scale)))
    return digest.hexdigest()


def _texts(
    side: TrainingSide, problems: Any, settings: Settings
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Prompts, greedy completions, what the model says about both, and the noise of that."""
    messages = [side.task.messages(problem) for problem in problems]
    prompts = [prompt_ids(side.tokenizer, m) for m in messages]
    eos = stop_ids(side.model, side.tokenizer)
    pad = eos[0] if side.tokenizer.pad_token_id is None else side.tokenizer.pad_token_id

    def decode(model: Any, size: int) -> list[list[int]]:
        return generate(
            model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            eos_ids=eos,
            pad_id=pad,
            batch_size=size,
        )

    greedy = decode(side.model, settings.batch_size)
    rows = [p + c for p, c in zip(prompts, greedy, strict=True)]
    observed = observe(side.model, rows, batch_size=settings.batch_size, pad_id=pad)
    noise = measure_noise(
        side.model,
        rows,
        observed,
        greedy,
        seeds=settings.seeds,
        batch_size=settings.batch_size,
        pad_id=pad,
        decode=decode,
    )
    tensors: dict[str, torch.Tensor] = {}
    for i, seen in enumerate(observed):
        tensors |= {f"{name}.{i}": tensor for name, tensor in vars(seen).items()}
    content = {
        "prompts": [
            {"messages": m, "tokens": p, "completion": c}
            for m, p, c in zip(messages, prompts, greedy, strict=True)
        ],
        "generation": {**asdict(settings), "eos_ids": eos, "pad_id": pad},
        "noise": {
            "variants": {name: asdict(d) for name, d in noise.variants.items()},
            "positions": noise.positions,
            "generated": noise.generated,
            "example": noise.example,
        },
    }
    return content, tensors


def _inputs(side: TrainingSide, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Linear -> up to ``ROWS`` of its inputs [M, K], spread over the first row that is long enough
    and those after it."""
    kept: dict[str, list[torch.Tensor]] = {path: [] for path in side.handle.layers}

    def keep(path: str) -> Any:
        def hook(module: Any, arguments: Any) -> None:
            kept[path].append(arguments[0].detach().reshape(-1, arguments[0].shape[-1]))

        return hook

    handles = [m.register_forward_pre_hook(keep(p)) for p, m in side.handle.layers.items()]
    device = next(side.model.parameters()).device
    try:
        seen = 0
        for row in rows:
            side.model(input_ids=torch.tensor([row], device=device), use_cache=False)
            seen += len(row)
            if seen >= ROWS:
                break
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for path, pieces in kept.items():
        x = torch.cat(pieces)
        if x.numel() == 0:
            raise ValueError(f"{path} was never reached by the prompts")
        found[path] = x[torch.linspace(0, len(x) - 1, min(ROWS, len(x))).long()]
    return found


def _linears(
    side: TrainingSide, inputs: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """Record inputs, codes and outputs of every linear into ``tensors``; returns what is known of
    each: shape, whose input it shares, and how many operands are not what the codes stand for."""
    linears: dict[str, dict[str, Any]] = {}
    for group in sibling_groups(inputs):
        leader = group[0]
        tensors[f"x.{leader}"] = inputs[leader].cpu()
        for path in group:
            layer = side.handle.layers[path]
            shared = leader if torch.equal(inputs[path], inputs[leader]) else path
            tensors[f"x.{shared}"] = inputs[path].cpu()
            y, operand = _answer(layer, inputs[path])
            tensors[f"y.{path}"] = y.cpu()
            linears[path] = {
                "shape": [layer.out_features, layer.in_features],
                "input": shared,
                "operand_mismatches": 0,
            }
            if layer.state.recipe.quantizes_input:
                q = quantize_input(layer, inputs[path])
                tensors[f"codes.{shared}"] = pack(q.codes).cpu()
                tensors[f"scales.{shared}"] = q.scales.cpu()
                value = dequantize(q, operand.dtype, apply_tensor_scale=False)
                differ = (value != operand) & ~(value.isnan() & operand.isnan())
                linears[path]["operand_mismatches"] = int(differ.sum())
    return linears


def quantize_input(layer: QuantLinear, x: torch.Tensor) -> QuantizedTensor:
    """Codes of ``x`` [M, K] by the training side's backend."""
    return layer.state.backend.quantize(
        x,
        layer.state.recipe.activation_profile,
        tensor_scale=getattr(layer, "input_tensor_scale", None),
    )


def _answer(layer: QuantLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``layer`` computes from ``x``, and the operand that entered its matmul."""
    seen: list[torch.Tensor] = []

    def observer(layer: QuantLinear, x: Any, operand: Any, result: Any, y: Any) -> None:
        seen.append(operand() if callable(operand) else operand)

    with _observed(layer, observer):
        y = layer(x)
    return y, seen[0]


@contextmanager
def _observed(layer: QuantLinear, observer: Any) -> Iterator[None]:
    before, layer.state.observer = layer.state.observer, observer
    try:
        yield
    finally:
        layer.state.observer = before
