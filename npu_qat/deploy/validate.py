"""A quantised checkpoint, examined as strictly as its readers should and do not.

The real loader of vllm-ascend, run on damaged checkpoints, loads most of them without a word: a
scale that is missing (it computes with uninitialised memory), a scale stored as float8 or as
numbers (converted by value), a missing weight. Others make it fail with a shape that says nothing
about the cause. Here the architecture in ``config.json`` says which tensors there must be; the
signature says how each is stored; every tensor's type, shape and values are compared with that,
every file with its checksum, the whole with its fingerprint, and an adapter with what training and
export wrote down of it. Tensors are read one at a time.

Each finding names a tensor (or a file), the problem and what to do. None means: what the loader
reads is the model that the folder says was exported. Everything that it is compared with lies in
the folder, so damage and single changes are found, and someone who rewrites all of it consistently
is not; only something kept elsewhere tells that (``docs/deploy.md``).
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npu_qat.config.paths import layer_index
from npu_qat.deploy.adapter import (
    ADAPTER_FOLDER,
    BINDING,
    AdapterMismatch,
    read_adapter,
    read_binding,
)
from npu_qat.deploy.ascend import FLOAT, GROUP_SIZE, K_MULTIPLE, SCHEMES
from npu_qat.deploy.checkpoint import (
    ASCEND_SIGNATURE,
    INDEX_SUFFIX,
    PIECE,
    all_finite,
    architecture,
    expected_shapes,
    read_config,
    read_tensor,
    safetensors_files,
    tied_names,
)
from npu_qat.deploy.checksums import CHECKSUMS, read_checksums, sha256
from npu_qat.deploy.compressed_tensors import MXFP4, NVFP4
from npu_qat.deploy.formats import RECORD, length_per_shard
from npu_qat.deploy.reader import find_signatures, open_export
from npu_qat.layers.plan import sibling_groups

AGAIN = "export the model again with npu-qat export"
FLOATS = ("BF16", "F16", "F32")
# An E8M0 byte is exponent + 127. A weight tensor whose largest scale is 2^32 or more, or 2^-64 or
# less, is no trained weight; bytes like that are exponents to which 127 was never added.
_PLAUSIBLE_SCALES = range(64, 159)
_NAN_BYTE = 0xFF


@dataclass(frozen=True)
class Finding:
    """Something that a reader would accept and should not.

    Attributes:
        tensor: the tensor, or the file where no single tensor is meant.
        problem: what is wrong.
        fix: what to do about it.
    """

    tensor: str
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.problem}. Fix: {self.fix}"


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """What a stored tensor must be."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


def validate(folder: Path, *, tensor_parallel: int = 1) -> list[Finding]:
    """All that is wrong with the quantised checkpoint in ``folder``, in AscendV1 or
    compressed-tensors (FP4) format.

    Args:
        folder: an export of this program, or a checkpoint of another tool in the same format
            (then without checksums and fingerprint).
        tensor_parallel: devices that it will be cut over.

    Returns:
        Findings in the order file, description, tensors, values, adapter; empty if all is well.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    findings = list(_altered_files(folder))
    try:
        signatures = find_signatures(folder)
        model = architecture(folder, torch.bfloat16)
    except ValueError as error:
        return [*findings, Finding("config.json", str(error), "restore the file, or " + AGAIN)]
    stored, unreadable = _headers(folder)
    reported = {finding.tensor for finding in findings}
    findings += [finding for finding in unreadable if finding.tensor not in reported]
    if len(signatures) != 1:
        return [*findings, _wrong_signatures(signatures)]
    kind = _Ascend if signatures[0] == "ascend" else _CompressedTensors
    examination = kind(folder, model, stored, tensor_parallel)
    findings += examination.findings(complete=not unreadable)
    findings += _index(folder, stored)
    findings += _adapter(folder, examination.linears)
    if not findings:
        findings += _fingerprint(folder)
    return findings


class _Examination(ABC):
    """One folder in one format. Subclasses say what is stored for a linear."""

    def __init__(
        self, folder: Path, model: nn.Module, stored: dict[str, Stored], tensor_parallel: int
    ) -> None:
        self.folder, self.stored, self.tensor_parallel = folder, stored, tensor_parallel
        self.shapes = expected_shapes(model)
        self.tied = tied_names(model)
        # Linear -> (N, K), tied ones left out: they have no tensor of their own.
        self.linears = {
            path: (m.out_features, m.in_features)
            for path, m in model.named_modules()
            if isinstance(m, nn.Linear) and f"{path}.weight" in self.shapes
        }

    def findings(self, *, complete: bool) -> list[Finding]:
        """Everything about signature, tensors and values; ``complete``: no file is unreadable."""
        found = list(self.signature())
        expected: dict[str, Expected] = {}
        for path in self.linears:
            found += self.disagreement(path)
            if self.quantized(path):
                expected |= self.stored_for(path)
                found += self._uneven(path)
        for name, shape in self.shapes.items():
            path, _, kind = name.rpartition(".")
            if not (path in self.linears and self.quantized(path) and kind == "weight"):
                expected.setdefault(name, Expected(FLOATS, shape))
        # One finding a tensor: what is said already is not said again as missing or extra.
        named = {finding.tensor for finding in found}
        for name, wanted in expected.items():
            if name in self.stored:
                found += self._malformed(name, wanted) or self._values(name)
            elif complete and not named & {name, name.removesuffix("_packed")}:
                found.append(Finding(name, f"missing; {self.consequence}", AGAIN))
        explained = {f.tensor.removesuffix("_packed") for f in found}
        for name in self.stored:
            if name not in expected and not any(name.startswith(e) for e in explained):
                found.append(self._extra(name))
        return found + list(self._mixed())

    consequence = "the loader computes with whatever lies in memory there"

    @abstractmethod
    def signature(self) -> Iterable[Finding]:
        """Problems of the description or configuration as a whole."""

    @abstractmethod
    def kind_of(self, path: str) -> str:
        """The type that the signature gives to linear ``path``."""

    def quantized(self, path: str) -> bool:
        """Whether linear ``path`` is to be treated as quantised."""
        return self.kind_of(path) != FLOAT

    @abstractmethod
    def stored_for(self, path: str) -> dict[str, Expected]:
        """The tensors of quantised linear ``path``, without its bias unless that is special."""

    @abstractmethod
    def disagreement(self, path: str) -> Iterable[Finding]:
        """Signature and stored weight of ``path`` that contradict each other."""

    k_multiple: int
    k_reason: str

    def _uneven(self, path: str) -> Iterator[Finding]:
        inputs = self.linears[path][1]
        length = length_per_shard(path, inputs, self.tensor_parallel)
        if length % self.k_multiple:
            where = f" on each of {self.tensor_parallel} devices" if length != inputs else ""
            yield Finding(
                f"{path}.weight",
                f"K is {length:g}{where}, no multiple of {self.k_multiple}: {self.k_reason}",
                "leave this linear in 16 bits (quant.exclude)"
                + (" or serve on fewer devices" if where else ""),
            )

    def _mixed(self) -> Iterator[Finding]:
        for group in sibling_groups(self.linears):
            kinds = {path: self.kind_of(path) for path in group}
            if len(set(kinds.values())) > 1:
                shown = ", ".join(f"{p.rpartition('.')[2]} {k}" for p, k in kinds.items())
                yield Finding(
                    f"{group[0]}.weight",
                    f"mixed types in linears that the engine fuses: {shown}",
                    "give all of them one type: exclude all or none, and " + AGAIN,
                )

    def _malformed(self, name: str, wanted: Expected) -> list[Finding]:
        """At most one finding about the type or the shape of a stored tensor."""
        found = self.stored[name]
        if found.dtype not in wanted.dtypes:
            names = " or ".join(wanted.dtypes)
            problem, fix = _wrong_type(name, found.dtype)
            return [Finding(name, f"stored as {found.dtype}, not {names}{problem}", fix)]
        if found.shape != wanted.shape:
            problem = _wrong_shape(found.shape, wanted.shape)
            fix = f"store {list(wanted.shape)}, row-major; the loader arranges it itself"
            return [Finding(name, f"shape {list(found.shape)}{problem}", fix)]
        return []

    def _values(self, name: str) -> list[Finding]:
        found = self.stored[name]
        tensor = read_tensor(found.file, name)
        if name.endswith("weight_scale"):
            return list(_scale_values(name, tensor, lambda: self._codes(name)))
        if found.dtype in FLOATS and not all_finite(tensor):
            return [Finding(name, "holds NaN or Inf", "find where it came from, and " + AGAIN)]
        return []

    def _codes(self, scale: str) -> torch.Tensor | None:
        """The packed weight that ``scale`` belongs to, if it is usable."""
        name = scale.removesuffix("_scale")
        for candidate in (name, f"{name}_packed"):
            entry = self.stored.get(candidate)
            if entry is not None and entry.dtype == "U8":
                return read_tensor(entry.file, candidate)
        return None

    def _extra(self, name: str) -> Finding:
        where = self.stored[name].file.name
        return Finding(
            name,
            f"extra: the model and its signature have no such tensor (in {where})",
            f"remove it from {where}, or " + AGAIN,
        )


class _Ascend(_Examination):
    k_multiple = K_MULTIPLE
    k_reason = "vllm-ascend pairs the scales of 64 inputs"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.problems: list[Finding] = []
        try:
            content = json.loads((self.folder / ASCEND_SIGNATURE).read_text("utf-8"))
            self.description = dict(content)
        except (ValueError, TypeError) as error:
            self.description = {}
            self.problems = [Finding(ASCEND_SIGNATURE, f"cannot be read: {error}", AGAIN)]

    def signature(self) -> Iterator[Finding]:
        if self.problems:
            yield from self.problems
            return
        group_size = self.description.get("group_size")
        if group_size != GROUP_SIZE:
            yield Finding(
                ASCEND_SIGNATURE,
                f"group_size is {group_size!r}, not {GROUP_SIZE}, the block of MXFP4",
                f'set "group_size": {GROUP_SIZE}',
            )
        scales = [f"{path}.weight_scale" for path in self.linears if self.quantized(path)]
        known = [*self.shapes, *sorted(self.tied), *scales]
        types = {n: t for n, t in self.description.items() if isinstance(t, str) and "." in n}
        # Scales of a linear that is 4-bit in the description alone are part of that disagreement.
        claimed = {f"{p}.weight_scale" for p in self.linears if self.kind_of(p) != FLOAT}
        for name in sorted(set(types) - set(known) - set(self.stored) - claimed):
            yield Finding(
                name, "in the description, but not in the model", "remove it from the description"
            )
        for name in known:
            if name not in types:
                yield Finding(
                    name, f"not in {ASCEND_SIGNATURE}", "add it with its type, or " + AGAIN
                )

    def kind_of(self, path: str) -> str:
        kind = self.description.get(f"{path}.weight")
        if kind is None:  # reported; go on with what the tensors look like
            stored = self.stored.get(f"{path}.weight")
            return SCHEMES[0] if stored is not None and stored.dtype == "U8" else FLOAT
        return str(kind)

    def disagreement(self, path: str) -> Iterator[Finding]:
        weight, kind = f"{path}.weight", self.kind_of(path)
        if kind not in (*SCHEMES, FLOAT):
            yield Finding(
                weight, f"unknown type {kind!r} in the description", f"use one of {SCHEMES}"
            )
            return
        if kind != FLOAT and layer_index(path) is None:
            yield Finding(weight, f"{kind} outside of the decoder layers", "list it as FLOAT")
        stored = self.stored.get(weight)
        scale_kind = self.description.get(f"{weight}_scale", kind)
        if stored is not None and kind == FLOAT and stored.dtype in ("U8", "I8"):
            yield Finding(
                weight,
                f"FLOAT in the description, but stored as packed codes ({stored.dtype})",
                "give it the type of the other linears in the description",
            )
        elif stored is not None and kind != FLOAT and stored.dtype in FLOATS:
            yield Finding(
                weight,
                f"{kind} in the description, but stored in 16 bits ({stored.dtype})",
                "list it as FLOAT, or " + AGAIN,
            )
        elif kind != FLOAT and scale_kind != kind:
            yield Finding(
                f"{weight}_scale",
                f"{scale_kind} in the description, but its weight is {kind}",
                f"list it as {kind}",
            )

    def quantized(self, path: str) -> bool:
        # By the tensor where it contradicts the description: that is one finding, not three.
        stored = self.stored.get(f"{path}.weight")
        if stored is not None and stored.dtype in FLOATS:
            return False
        if stored is not None and stored.dtype in ("U8", "I8"):
            return True
        return super().quantized(path)

    def stored_for(self, path: str) -> dict[str, Expected]:
        n, k = self.linears[path]
        tensors = {
            f"{path}.weight": Expected(("U8",), (n, k // 2)),
            f"{path}.weight_scale": Expected(("U8",), (n, -(-k // GROUP_SIZE))),
        }
        if f"{path}.bias" in self.shapes:
            tensors[f"{path}.bias"] = Expected(("F32",), (n,))
        return tensors


class _CompressedTensors(_Examination):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config = read_config(self.folder)
        self.settings = dict(config.get("quantization_config") or {})
        self.layout = str(self.settings.get("format"))
        self.k_multiple = 16 if self.layout == NVFP4 else 32
        self.k_reason = "a block would be cut"

    def signature(self) -> Iterator[Finding]:
        if self.layout not in (MXFP4, NVFP4):
            yield Finding(
                "config.json",
                f"quantization_config has format {self.layout!r}; known are {MXFP4} and {NVFP4}",
                AGAIN,
            )
            return
        method, groups = self.settings.get("quant_method"), self.settings.get("config_groups") or {}
        if method != "compressed-tensors":
            yield Finding(
                "config.json",
                f"quantization_config: quant_method is {method!r}, so another reader takes it",
                'set it to "compressed-tensors"',
            )
        if len(groups) != 1:
            yield Finding(
                "config.json",
                f"quantization_config has {len(groups)} config_groups; one type for all quantised "
                "linears is known",
                AGAIN,
            )
        inner = self._group().get("format", self.layout)
        if inner != self.layout:
            yield Finding(
                "config.json",
                f"quantization_config: the group's format is {inner!r}, but all in all it is "
                f"{self.layout!r}",
                f"set both to {self.layout!r}",
            )
        weights = self._group().get("weights") or {}
        wanted = {
            "num_bits": 4,
            "type": "float",
            "group_size": self.k_multiple,
            "strategy": "group" if self.layout == MXFP4 else "tensor_group",
        }
        for key, value in wanted.items():
            if weights.get(key) != value:
                yield Finding(
                    "config.json",
                    f"quantization_config: weights.{key} is {weights.get(key)!r}, but "
                    f"{self.layout} has {value!r}",
                    f"set it to {value!r}",
                )
        if self.layout == NVFP4:
            yield from self._unshared()

    def _group(self) -> dict[str, Any]:
        groups = self.settings.get("config_groups") or {}
        return next(iter(groups.values()), {})

    def _unshared(self) -> Iterator[Finding]:
        """Global scales that differ within a group: engines take one of them for all."""
        for group in sibling_groups(p for p in self.linears if self.quantized(p)):
            for kind in ("weight_global_scale", "input_global_scale"):
                names = [f"{p}.{kind}" for p in group if f"{p}.{kind}" in self.stored]
                values = [read_tensor(self.stored[n].file, n).reshape(-1) for n in names]
                odd = [n for n, v in zip(names, values, strict=True) if not v.equal(values[0])]
                if odd:
                    yield Finding(
                        odd[0],
                        f"differs from {names[0]}, but engines fuse the two and use one scale",
                        "quantise the group with one shared scale: " + AGAIN,
                    )

    def kind_of(self, path: str) -> str:
        meant = _named(path, self._group().get("targets") or [])
        ignored = _named(path, self.settings.get("ignore") or [])
        return self.layout if meant and not ignored else FLOAT

    def disagreement(self, path: str) -> Iterator[Finding]:
        packed, plain = f"{path}.weight_packed", f"{path}.weight"
        if self.kind_of(path) == FLOAT and packed in self.stored and plain not in self.stored:
            yield Finding(
                packed,
                "packed, but config.json lists the linear under 'ignore', or not under 'targets'",
                'remove it from quantization_config.ignore, and let targets be ["Linear"]',
            )
        if self.kind_of(path) != FLOAT and plain in self.stored and packed not in self.stored:
            yield Finding(
                plain,
                "in 16 bits, but config.json says that it is quantised",
                "list the linear under quantization_config.ignore, or " + AGAIN,
            )

    def quantized(self, path: str) -> bool:
        packed, plain = f"{path}.weight_packed", f"{path}.weight"
        if (packed in self.stored) != (plain in self.stored):
            return packed in self.stored
        return super().quantized(path)

    def stored_for(self, path: str) -> dict[str, Expected]:
        n, k = self.linears[path]
        scale = Expected(("U8",), (n, k // 32))
        tensors = {f"{path}.weight_packed": Expected(("U8",), (n, k // 2))}
        if self.layout == NVFP4:
            scale = Expected(("F8_E4M3",), (n, k // 16))
            tensors[f"{path}.weight_global_scale"] = Expected(("F32",), (1,))
            if self._group().get("input_activations"):
                tensors[f"{path}.input_global_scale"] = Expected(("F32",), (1,))
        return {**tensors, f"{path}.weight_scale": scale}

    def _values(self, name: str) -> list[Finding]:
        found = super()._values(name)
        if found or not name.endswith("_global_scale"):
            return found
        positive = float(read_tensor(self.stored[name].file, name)) > 0
        return [] if positive else [Finding(name, "not positive, but a number to divide by", AGAIN)]


def _named(path: str, entries: Iterable[str]) -> bool:
    """Whether a list of compressed-tensors names the linear ``path``: by its path, by a regular
    expression after ``re:`` that its path begins with, or by its class."""
    return any(
        re.match(entry.removeprefix("re:"), path) is not None
        if entry.startswith("re:")
        else entry in (path, "Linear")
        for entry in entries
    )


# --- values and shapes ------------------------------------------------------------------------


def _wrong_type(name: str, dtype: str) -> tuple[str, str]:
    """What a wrong type of ``name`` means, and what to do."""
    if not name.endswith("weight_scale"):
        if dtype == "I8":
            return "", "store the same bytes as uint8: tensor.view(torch.uint8)"
        return "", AGAIN
    if dtype.startswith("F8"):
        return (
            ": the loader converts the numbers instead of copying the bytes",
            "store the same bytes as uint8: tensor.view(torch.uint8)",
        )
    if dtype == "I8":
        return ": exponents without the bias", "add 127 and store as uint8"
    return ": numbers instead of exponents", "store log2(scale) + 127 as uint8"


def _wrong_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What a wrong shape looks like."""
    if found == wanted[::-1]:
        return f" is transposed already, instead of {list(wanted)}"
    if len(found) == 3 and len(wanted) == 2 and found[-1] == 2:
        return f" is arranged in pairs already, instead of {list(wanted)}"
    return f" instead of {list(wanted)}"


def _scale_values(name: str, scales: torch.Tensor, codes: Any) -> Iterator[Finding]:
    """NaN scales, and E8M0 bytes that cannot be exponents + 127."""
    scale_bytes = scales.view(torch.uint8)
    nan = scale_bytes == _NAN_BYTE
    if scales.dtype != torch.uint8:  # E4M3: NaN with either sign, and scales are not negative
        nan = (scale_bytes & 0x7F == 0x7F) | (scale_bytes >= 0x80)
    if nan.any():
        row, block = (int(i) for i in nan.nonzero()[0])
        kind = "0xFF (NaN)" if scales.dtype == torch.uint8 else "NaN or negative"
        yield Finding(
            name,
            f"{int(nan.sum())} scales are {kind}, the first at row {row}, block {block}",
            "the 16-bit weight held NaN or Inf, or the file is damaged: " + AGAIN,
        )
    elif scales.dtype == torch.uint8 and int(scale_bytes.max()) not in _PLAUSIBLE_SCALES:
        packed = codes()
        # A tensor of zeros may have any scale.
        if packed is not None and any(bool((p & 0x77).any()) for p in packed.split(PIECE)):
            yield Finding(
                name,
                f"the largest scale byte is {int(scale_bytes.max())}, that is a scale of "
                f"2^{int(scale_bytes.max()) - 127}: exponents without the bias of 127",
                "add 127 to every byte, or " + AGAIN,
            )


# --- files ------------------------------------------------------------------------------------


def _altered_files(folder: Path) -> Iterator[Finding]:
    if not (folder / CHECKSUMS).exists():
        if (folder / RECORD).exists():
            yield Finding(CHECKSUMS, "missing, so no file can be checked", AGAIN)
        return
    try:
        listed = read_checksums(folder)
    except ValueError as error:
        yield Finding(CHECKSUMS, str(error), "restore the file, or " + AGAIN)
        return
    for name, digest in listed.items():
        if not (folder / name).is_file():
            yield Finding(name, "the file is missing", "copy the folder again, or " + AGAIN)
        elif sha256(folder / name) != digest:
            yield Finding(
                name,
                "truncated or altered: its SHA-256 is not the one in " + CHECKSUMS,
                "copy the file again, or " + AGAIN,
            )
    read = [*safetensors_files(folder), *sorted(folder.glob("*.json"))]
    for name in sorted({file.name for file in read} - set(listed)):
        yield Finding(name, "added after the export", "remove it, or " + AGAIN)


def _headers(folder: Path) -> tuple[dict[str, Stored], list[Finding]]:
    """Every stored tensor, and what is wrong with the files as such."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, Stored] = {}
    findings = []
    for file in safetensors_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (a method of the library, not a dict)
                    part = handle.get_slice(name)
                    if name in stored:
                        where = f"{stored[name].file.name} and {file.name}"
                        findings.append(
                            Finding(name, f"in two files, {where}", "remove one of them")
                        )
                    stored[name] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            fix = "copy the file again, or " + AGAIN
            findings.append(Finding(file.name, f"cannot be read: {error}", fix))
    for name in sorted(_indexed_files(folder)):
        if not (folder / name).is_file():
            findings.append(Finding(name, "the file is missing", "copy the folder again"))
    return stored, findings


def _indexed_files(folder: Path) -> set[str]:
    """Files that an index names; of a damaged index none, which ``_index`` reports."""
    names: set[str] = set()
    for index in folder.glob(f"*{INDEX_SUFFIX}"):
        try:
            names |= set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return names


def _index(folder: Path, stored: dict[str, Stored]) -> Iterator[Finding]:
    """An index that points elsewhere; tensors that are nowhere are reported as missing."""
    for index in sorted(folder.glob(f"*{INDEX_SUFFIX}")):
        try:
            listed = json.loads(index.read_text("utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            yield Finding(index.name, f"cannot be read: {error!r}", AGAIN)
            continue
        for name, tensor in stored.items():
            if listed.get(name) != tensor.file.name:
                said = listed.get(name, "nowhere")
                yield Finding(name, f"in {tensor.file.name}, but {index.name} says {said}", AGAIN)


def _wrong_signatures(signatures: list[str]) -> Finding:
    if signatures:
        return Finding(
            "config.json",
            f"quantization_config beside {ASCEND_SIGNATURE}: two signatures, and readers "
            "disagree about which one counts",
            f"for Ascend remove quantization_config, for compressed-tensors {ASCEND_SIGNATURE}",
        )
    return Finding(
        ASCEND_SIGNATURE,
        "missing, and config.json has no quantization_config: readers would take this for a "
        "16-bit model",
        "restore the file, or " + AGAIN,
    )


def _adapter(folder: Path, linears: dict[str, tuple[int, int]]) -> Iterator[Finding]:
    """An adapter that is gone, cannot be applied, or is not what is written down of it."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        beside = record["adapter"] == "beside"
        exported = record.get("adapter_content") if beside else None  # earlier versions: none
    except (OSError, ValueError, KeyError, TypeError):
        beside, exported = False, None  # of another tool, or damaged: ``_fingerprint``
    if not (folder / ADAPTER_FOLDER).exists():
        if beside:
            yield Finding(ADAPTER_FOLDER, f"missing, but {RECORD} has one beside the base", AGAIN)
        return
    try:
        adapter = read_adapter(folder / ADAPTER_FOLDER)
        adapter.check(linears)
    except ValueError as error:
        yield Finding(ADAPTER_FOLDER, str(error), AGAIN)
        return
    try:
        bound = read_binding(adapter.folder).content
    except AdapterMismatch:
        bound = None  # ``_fingerprint``
    for where, content in ((RECORD, exported), (f"{ADAPTER_FOLDER}/{BINDING}", bound)):
        changes = [] if content is None else adapter.changes(content)
        if changes:
            problem = f"not the adapter that {where} describes: {'; '.join(changes)}"
            yield Finding(ADAPTER_FOLDER, problem, "put the adapter back, or " + AGAIN)
            return


def _fingerprint(folder: Path) -> Iterator[Finding]:
    """Compare the tensors with the fingerprints in the record and in the adapter's binding."""
    claims: dict[str, str] = {}
    try:
        if (folder / RECORD).exists():
            content = json.loads((folder / RECORD).read_text("utf-8"))
            claims[RECORD] = content["base_fingerprint"]
        if (folder / ADAPTER_FOLDER).exists():
            claims[ADAPTER_FOLDER] = read_binding(folder / ADAPTER_FOLDER).base
    except (ValueError, KeyError, TypeError) as error:
        where = ADAPTER_FOLDER if isinstance(error, AdapterMismatch) else RECORD
        yield Finding(where, f"does not say which base it belongs to: {error}", AGAIN)
        return
    if not claims:
        return
    found = open_export(folder).fingerprint()
    for where, claimed in claims.items():
        if claimed != found:
            what = "was trained on" if where == ADAPTER_FOLDER else "describes"
            yield Finding(
                where,
                f"{what} another base: fingerprint {claimed[:16]}..., tensors {found[:16]}...",
                "put the tensors that belong to it back, or " + AGAIN,
            )
