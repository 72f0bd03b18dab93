"""The four questions, and their answers from a recording and an exported folder.

    L0 codes        are weights and activations the same 4-bit codes under the same scales?
    L1 layers       does each linear answer the same to the same input?
    L2 model        do the models say the same of real text, within the measured noise?
    L3 checkpoint   is the folder what it claims to be, for readers that share no code?

The levels explain each other: a wrong code shows at L0 by its cause, at L1 as a layer, at L2 as a
shift, or not at all, if the noise is larger. So all of them are answered, whatever the first says.

L0 and L1 ask for equality. Where the serving engine rounds activations by another rule than
training did, its outputs cannot be equal: then weights are compared, and the rest is labelled
"activations differ" instead of being judged.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npu_qat.backends import Selection
from npu_qat.deploy.adapter import ADAPTER_FOLDER
from npu_qat.deploy.core import INPUT_SCALE
from npu_qat.deploy.export import RECORD
from npu_qat.deploy.reader import open_export
from npu_qat.deploy.validate import validate
from npu_qat.layers.audit import Check
from npu_qat.layers.base_model import prompt_ids
from npu_qat.numerics import QuantizedTensor, dequantize, get_profile, unpack
from npu_qat.parity.independent import ExportFiles
from npu_qat.parity.mismatch import Mismatches, compare_codes
from npu_qat.parity.observe import TITLES, compare, generate, observe
from npu_qat.parity.recording import (
    Recording,
    adapter_fingerprint,
    compute_identity,
    packed_weight,
    weight_digest,
)
from npu_qat.parity.serving import ServedModel, open_served, served_activations
from npu_qat.parity.training_side import TrainingSide

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"
QUESTIONS = {
    "L0": ("Codes", "Are weights and activations the same 4-bit codes under the same scales?"),
    "L1": ("Layers", "Does each linear answer the same to the same input?"),
    "L2": ("Model", "Do the models say the same of real text, within the measured noise?"),
    "L3": ("Checkpoint", "Is the folder what it claims to be, for readers that share no code?"),
}
_PATTERNS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# Distances in units in the last place that the report counts apart.
ULP_BINS = (0, 1, 2, 4, 8, 16)


@dataclass
class Level:
    """The answer at one level.

    Attributes:
        key: L0 to L3.
        checks: what was compared, expected and measured.
        skipped: why the level, or a part of it, was not judged; empty if it was.
        data: numbers behind the checks, for JSON and plots.
    """

    key: str
    checks: list[Check] = field(default_factory=list)
    skipped: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``pass``, ``fail``, or ``skipped`` where nothing was judged."""
        if not self.checks:
            return SKIPPED
        return PASS if all(check.ok for check in self.checks) else FAIL

    def add(self, name: str, expected: str, measured: str, ok: bool) -> None:
        """Append one check."""
        self.checks.append(Check(name, expected, measured, ok))


@dataclass
class ParityReport:
    """All levels, and what was compared.

    Attributes:
        folder: the export.
        format: of the export.
        trained, served: activations on both sides.
        levels: L0 to L3.
        recording: what is known of the training side, without texts.
        checked_on: device, processor and torch of the serving side.
        environment: of the machine that checked.
    """

    folder: Path
    format: str
    trained: str
    served: str
    levels: list[Level]
    recording: dict[str, Any]
    checked_on: dict[str, str]
    environment: dict[str, Any]

    @property
    def passed(self) -> bool:
        """No level failed, and at least codes and checkpoint were judged."""
        verdicts = {level.key: level.verdict for level in self.levels}
        return FAIL not in verdicts.values() and verdicts["L0"] == verdicts["L3"] == PASS

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": PASS if self.passed else FAIL,
            "export": str(self.folder),
            "format": self.format,
            "activations": {"trained": self.trained, "served": self.served},
            "levels": [
                {
                    "level": level.key,
                    "title": QUESTIONS[level.key][0],
                    "verdict": level.verdict,
                    "skipped": level.skipped,
                    "checks": [asdict(check) for check in level.checks],
                    **level.data,
                }
                for level in self.levels
            ],
            "recorded": self.recording,
            "checked_on": self.checked_on,
            "environment": self.environment,
        }


def check(
    recording: Recording,
    folder: Path,
    selection: Selection,
    *,
    side: TrainingSide | None = None,
    environment: Mapping[str, Any] | None = None,
) -> ParityReport:
    """Compare the export in ``folder`` with what the training side computed.

    Args:
        recording: of the training side.
        folder: the export; its adapter, if the recording has one, is ``folder/adapter``.
        selection: device and backend that compute the serving path here.
        side: the training side itself, where it is at hand: differing weights are then classified.
        environment: of this machine, kept as it is.

    Raises:
        ValueError: the recording is of another model than the export says it is.
    """
    exported = open_export(folder)
    _refuse_other_model(recording, folder)
    trained, served = recording.content["activations"], served_activations(folder)
    same = trained == served
    checkpoint = _checkpoint(recording, folder)
    levels = {key: Level(key) for key in QUESTIONS}
    levels["L3"] = checkpoint
    try:
        model = open_served(
            folder,
            adapter=_adapter(folder) if recording.content["adapter"] else None,
            device=selection.device,
            backend=selection.backend,
            attention=recording.content["model"]["attention"],
        )
    except (ValueError, KeyError, RuntimeError) as error:
        for key in ("L0", "L1", "L2"):
            levels[key].add("the checkpoint can be loaded", "yes", f"no: {error}", False)
    else:
        differ = "" if same else f"activations differ: trained with {trained}, served with {served}"
        _weights(levels["L0"], recording, model, side)
        levels["L0"].skipped = levels["L1"].skipped = levels["L2"].skipped = differ
        if same:
            _activations(levels["L0"], recording, model)
            _layers(levels["L1"], recording, model, selection)
            _model(levels["L2"], recording, model)
    known = {
        key: recording.content[key]
        for key in ("npu_qat", "environment", "computed_on", "model", "recipe", "base_fingerprint")
    }
    return ParityReport(
        folder=folder,
        format=exported.format,
        trained=trained,
        served=served,
        levels=list(levels.values()),
        recording=known,
        checked_on=compute_identity(selection.device),
        environment=dict(environment or {}),
    )


def _refuse_other_model(recording: Recording, folder: Path) -> None:
    """A recording of another base says nothing about this export; damage to this one does."""
    if not (folder / RECORD).exists():
        return
    try:
        claims = json.loads((folder / RECORD).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder}/{RECORD} cannot be read: {error}") from error
    if claims.get("adapter") == "merged":
        raise ValueError(
            f"{folder} holds a merged adapter: its base is another one than was trained on. "
            "Export with --adapter keep to compare; npu-qat export --adapter merge prints what "
            "survives the merge"
        )
    claimed = claims.get("base_fingerprint")
    expected = recording.content["base_fingerprint"]
    if claimed != expected:
        raise ValueError(
            f"the recording is of another base (fingerprint {expected[:16]}...) than {folder} "
            f"({str(claimed)[:16]}...); record the run that was exported, or export it again"
        )


def _adapter(folder: Path) -> Path | None:
    return folder / ADAPTER_FOLDER if (folder / ADAPTER_FOLDER).is_dir() else None


# --- L0 -----------------------------------------------------------------------------------------


def _weights(
    level: Level, recording: Recording, model: ServedModel, side: TrainingSide | None
) -> None:
    """Codes and scales of every weight."""
    linears = recording.content["linears"]
    missing = sorted(set(linears) ^ set(model.layers))
    level.add(
        "the same linears are quantised",
        f"{len(linears)} linears",
        f"{len(model.layers)}" + (f", not in both: {missing[0]}" if missing else ""),
        not missing,
    )
    both = [path for path in linears if path in model.layers]
    served = {path: _cpu(model.layers[path].codes) for path in both}
    wrong = [path for path in both if weight_digest(served[path]) != linears[path]["weight"]]
    total, by_linear = Mismatches(), {}
    for path in wrong if side is not None else []:
        assert side is not None
        source = side.core.checkpoint.read([f"{path}.weight"])[f"{path}.weight"]
        expected = packed_weight(side.handle.layers[path])
        found = compare_codes(expected, served[path], source, where=f"{path}.weight")
        by_linear[path] = found.as_dict()
        total += found
    detail = ""
    if wrong:
        detail = f", first {wrong[0]}" + (f": {total}" if side is not None else "")
    level.add(
        "codes and scales of weights",
        f"equal in {len(both)} linears",
        f"equal in {len(both) - len(wrong)}{detail}",
        not wrong,
    )
    level.data["weights"] = {"linears": len(both), "differing": wrong, "causes": by_linear}


def _activations(level: Level, recording: Recording, model: ServedModel) -> None:
    """Codes and scales of recorded inputs, by the serving side's encoder."""
    linears = recording.content["linears"]
    profile = recording.content["recipe"]["activation_profile"]
    total, by_linear, done = Mismatches(), {}, set()
    for path, kept in linears.items():
        source = kept["input"]
        if path not in model.layers or source in done or f"codes.{source}" not in recording.tensors:
            continue
        done.add(source)
        x = recording.input_of(path)
        layer = model.layers[path]
        tensor_scale = None if layer.input_scale is None else layer.input_scale.cpu()
        expected = QuantizedTensor(
            unpack(recording.tensors[f"codes.{source}"], x.shape[-1]),
            recording.tensors[f"scales.{source}"],
            get_profile(profile),
            1,
            tensor_scale,
        )
        codes, scales = layer.encode(x.to(_device(model)))
        found = QuantizedTensor(codes.cpu(), scales.cpu(), get_profile(profile), 1, tensor_scale)
        result = compare_codes(expected, found, x, where=f"input of {source}")
        if result.total:
            by_linear[source] = result.as_dict()
        total += result
    if not done:
        return
    level.add("codes and scales of inputs", "0 differ", str(total), total.total == 0)
    wrong = {p: k["operand_mismatches"] for p, k in linears.items() if k["operand_mismatches"]}
    level.add(
        "training multiplies the numbers of these codes",
        "0 linears differ",
        f"{len(wrong)} differ" + (f", first {next(iter(wrong))}" if wrong else ""),
        not wrong,
    )
    level.data["inputs"] = {**total.as_dict(), "tensors": len(done), "by_linear": by_linear}


# --- L1 -----------------------------------------------------------------------------------------


def _layers(level: Level, recording: Recording, model: ServedModel, selection: Selection) -> None:
    """Answers of every linear to recorded inputs."""
    bitwise = compute_identity(selection.device) == recording.content["computed_on"]
    bitwise &= selection.device.type == "cpu"
    limit = 0 if bitwise else 1
    counts = dict.fromkeys(ULP_BINS, 0)
    elements = differing = 0
    by_linear: dict[str, dict[str, Any]] = {}
    worst: tuple[int, str] = (0, "")
    for path in recording.content["linears"]:
        if path not in model.layers:
            continue
        with torch.no_grad():
            y = model.layers[path](recording.input_of(path).to(_device(model))).cpu()
        expected = recording.tensors[f"y.{path}"]
        distance = ulp_distance(expected, y)
        changed = int((~_same_bits(expected, y)).sum())
        elements, differing = elements + y.numel(), differing + changed
        for low, high in zip(ULP_BINS, (*ULP_BINS[1:], 2**62), strict=True):
            counts[low] += int(((distance >= low) & (distance < high)).sum())
        largest = int(distance.max())
        by_linear[path] = {"max_ulp": largest, "differing": changed, "elements": y.numel()}
        if largest > worst[0]:
            where = np.unravel_index(int(distance.argmax()), tuple(distance.shape))
            place = [int(i) for i in where]
            values = f"{expected[tuple(place)]:.6g} trained, {y[tuple(place)]:.6g} served"
            worst = (largest, f"{path} {place}: {values}")
    if not by_linear:
        return
    beyond = [path for path, row in by_linear.items() if row["max_ulp"] > limit]
    if limit == 0:
        beyond = [path for path, row in by_linear.items() if row["differing"]]
    expected_text = (
        "bitwise equal (same processor and torch)"
        if bitwise
        else "at most 1 unit in the last place"
    )
    measured = (
        f"{differing} of {elements} values differ, at most {worst[0]} units in the last place"
    )
    if worst[1]:
        measured += f"; worst {worst[1]}"
    name = f"outputs of {len(by_linear)} linears"
    level.add(name, expected_text, measured, not beyond)
    level.data |= {
        "limit_ulp": limit,
        "ulp_counts": {str(low): n for low, n in counts.items()},
        "by_linear": by_linear,
        "beyond": beyond,
    }


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Steps between neighbouring floats from ``a`` to ``b`` (int64); NaN to NaN is 0."""
    integer = _PATTERNS[a.dtype]
    ordered = []
    for x in (a, b):
        bits = x.contiguous().view(integer).long()
        lowest = torch.iinfo(integer).min
        ordered.append(torch.where(bits < 0, lowest - bits, bits))
    distance = (ordered[0] - ordered[1]).abs()
    return distance.masked_fill(a.isnan() & b.isnan(), 0)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    integer = _PATTERNS[a.dtype]
    return a.contiguous().view(integer) == b.contiguous().view(integer)


# --- L2 -----------------------------------------------------------------------------------------


def _model(level: Level, recording: Recording, model: ServedModel) -> None:
    """Log-probabilities and greedy tokens on the recorded texts."""
    kept = recording.content["generation"]
    reference, noise = recording.observed, recording.noise
    observed = observe(
        model.model,
        recording.rows,
        batch_size=kept["batch_size"],
        pad_id=kept["pad_id"],
        tops=[o.top_ids for o in reference],
    )
    prompts = recording.content["prompts"]
    greedy = generate(
        model.model,
        [p["tokens"] for p in prompts],
        max_new_tokens=kept["max_new_tokens"],
        eos_ids=kept["eos_ids"],
        pad_id=kept["pad_id"],
        batch_size=kept["batch_size"],
    )
    found = compare(reference, observed, ([p["completion"] for p in prompts], greedy))
    limits, floor = noise.limits(), asdict(noise.floor)
    for name, value in asdict(found).items():
        level.add(
            TITLES[name],
            f"at most {limits[name]:.3g} (noise floor {floor[name]:.3g})",
            f"{value:.3g}",
            value <= limits[name],
        )
    pairs = zip(reference, observed, strict=True)
    gaps = torch.cat([(b.logp - a.logp).abs() for a, b in pairs]).tolist()
    level.data |= {
        "measured": asdict(found),
        "limits": limits,
        "noise": {name: asdict(d) for name, d in noise.variants.items()},
        "positions": noise.positions,
        "generated": noise.generated,
        "gaps": gaps,
        "noise_gaps": noise.example,
    }


# --- L3 -----------------------------------------------------------------------------------------


def _checkpoint(recording: Recording, folder: Path) -> Level:
    """The folder as an artefact: its own check, two readers, and what it must have from the run."""
    level = Level("L3")
    findings = validate(folder)
    level.add(
        "npu-qat validate",
        "no findings",
        f"{len(findings)} findings" + (f", first {findings[0]}" if findings else ""),
        not findings,
    )
    _two_readers(level, folder)
    try:
        fingerprint = open_export(folder).fingerprint()
    except (ValueError, KeyError, RuntimeError) as error:
        fingerprint = f"unreadable: {error}"
    expected = recording.content["base_fingerprint"]
    level.add("fingerprint of the base", expected[:16], fingerprint[:16], fingerprint == expected)
    _check_adapter(level, recording, folder)
    _check_prompts(level, recording, folder)
    _library(level, folder)
    return level


def _two_readers(level: Level, folder: Path) -> None:
    """Every number through ``deploy/reader`` and through the numpy witness."""
    name = "two readers that share no code see the same numbers"
    try:
        files, exported = ExportFiles(folder), open_export(folder)
        weights = dict(files.weights())
        numbers = set(files.float_names())
        compared, wrong = 0, []
        for entry, value in exported.entries():
            path = entry.removesuffix(".weight")
            if entry.endswith(f".{INPUT_SCALE}"):
                continue
            compared += 1
            if isinstance(value, QuantizedTensor):
                ours = dequantize(value, apply_tensor_scale=False).double().numpy()
                same = path in weights and np.array_equal(ours, weights[path].values, True)
            else:
                assert isinstance(value, torch.Tensor)
                same = entry in numbers and np.array_equal(
                    files.floats(entry), value.double().numpy(), True
                )
            if not same:
                wrong.append(entry)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        level.add(name, "yes", f"cannot be read: {error}", False)
        return
    detail = f", first {wrong[0]}" if wrong else ""
    level.add(name, f"{compared} tensors", f"{compared - len(wrong)} equal{detail}", not wrong)


def _check_adapter(level: Level, recording: Recording, folder: Path) -> None:
    expected, found = recording.content["adapter"], _adapter(folder)
    if expected is None and found is None:
        return
    measured = "none"
    if found is not None:
        try:
            measured = adapter_fingerprint(found)
        except ValueError as error:
            measured = str(error)
    level.add("adapter", (expected or "none")[:16], measured[:16], measured == (expected or "none"))


def _check_prompts(level: Level, recording: Recording, folder: Path) -> None:
    """The exported tokenizer and chat template make the same tokens."""
    from transformers import AutoTokenizer

    name = "the exported tokenizer makes the same prompt tokens"
    prompts = recording.content["prompts"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        wrong = [
            i for i, p in enumerate(prompts) if prompt_ids(tokenizer, p["messages"]) != p["tokens"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        level.add(name, f"{len(prompts)} prompts", f"cannot be loaded: {error}", False)
        return
    detail = f", first prompt {wrong[0]}" if wrong else ""
    level.add(
        name, f"{len(prompts)} prompts", f"{len(prompts) - len(wrong)} equal{detail}", not wrong
    )


def _library(level: Level, folder: Path) -> None:
    """compressed-tensors' own reader, where the format is its own and it is installed."""
    exported = open_export(folder)
    if exported.format != "compressed-tensors":
        return
    if importlib.util.find_spec("compressed_tensors") is None:
        level.data["library"] = "compressed-tensors is not installed, so its reader was not asked"
        return
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    settings = CompressedTensorsConfig(run_compressed=False)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, dtype="auto"
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        level.add("transformers with compressed-tensors", "loads", f"{error}", False)
        return
    state, wrong, compared = model.state_dict(), [], 0
    for name, value in exported.entries():
        if not isinstance(value, QuantizedTensor):
            continue
        compared += 1
        theirs = state[name]
        ours = dequantize(value, theirs.dtype)
        if value.tensor_scale is None:
            same = torch.equal(theirs.float(), ours.float())
        else:  # the library multiplies in another order
            same = torch.allclose(theirs.float(), ours.float(), rtol=2**-7, atol=0)
        if not same:
            wrong.append(name)
    detail = f", first {wrong[0]}" if wrong else ""
    level.add(
        "transformers with compressed-tensors",
        f"{compared} weights",
        f"{compared - len(wrong)} equal{detail}",
        not wrong,
    )


def _cpu(q: QuantizedTensor) -> QuantizedTensor:
    scale = None if q.tensor_scale is None else q.tensor_scale.cpu()
    return replace(q, codes=q.codes.cpu(), scales=q.scales.cpu(), tensor_scale=scale)


def _device(model: ServedModel) -> torch.device:
    device: torch.device = next(model.model.parameters()).device
    return device
