"""Every operator and argument that the product passes exists in every supported torch-npu.

The tables come out of the releases' wheels, unzipped and never imported. They say nothing of
numbers; they do say that a call binds, which is what an API change breaks first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from npu_qat.backends import BackendUnavailable
from npu_qat.backends.base import PackedWeight
from npu_qat.backends.npu import NpuBackend, NpuOps
from npu_qat.backends.npu import ops as contract
from npu_qat.backends.npu.profiles import computed_profiles
from npu_qat.numerics import quantize
from tests.contract import op_kernels
from tests.contract.environment import SCHEMA_FILES, SCHEMA_RELEASES

pytestmark = pytest.mark.contract

OLDEST = "2.9.0.post2"  # op-plugin 26.0.0
NEWER = {contract.ANTI_QUANT}  # came with op-plugin 26.1.0; used behind NpuOps.has


@dataclass(frozen=True)
class Schema:
    """One overload of an operator."""

    name: str
    arguments: Mapping[str, str]  # name -> type and default, in order
    positional: int
    returns: str


def parse(text: str) -> Schema:
    """A schema in torch's notation: ``name(Tensor x, *, int axis=-1) -> Tensor``."""
    name, inside, returns = re.fullmatch(r"(\S+?)\((.*)\)\s*->\s*(.*)", text.strip()).groups()  # type: ignore[union-attr]
    arguments: dict[str, str] = {}
    positional = None
    for part in re.split(r",\s*(?![^\[(]*[\])])", inside) if inside else []:
        if part == "*":
            positional = len(arguments)
            continue
        head, _, default = part.partition("=")
        kind, _, argument = head.rpartition(" ")
        # The code generator registers "self" under another name.
        arguments["input" if argument == "self" else argument] = f"{kind}={number(default)}"
    return Schema(name, arguments, len(arguments) if positional is None else positional, returns)


def number(default: str) -> str:
    """``0.`` and ``0.0`` are one default."""
    try:
        return str(float(default))
    except ValueError:
        return default.strip("'\"")


def schemas(home: Path, release: str) -> dict[str, list[Schema]]:
    """Operator name without overload -> its schemas, from a release's tables."""
    found: dict[str, list[Schema]] = {}
    for file in SCHEMA_FILES:
        content = yaml.safe_load((home / "schemas" / release / file).read_text(encoding="utf-8"))
        for section in content.values():
            for entry in section if isinstance(section, list) else []:
                text = entry.get("func", "") if isinstance(entry, dict) else ""
                if text.startswith("npu_"):
                    schema = parse(text)
                    found.setdefault(schema.name.partition(".")[0], []).append(schema)
    return found


def names(overloads: list[Schema]) -> frozenset[str]:
    return frozenset(argument for schema in overloads for argument in schema.arguments)


@pytest.mark.parametrize("release", SCHEMA_RELEASES)
def test_every_operator_and_argument_that_is_passed_exists(
    contract_home: Path, release: str
) -> None:
    found = schemas(contract_home, release)
    assert len(found) > 200
    for operator, passed in contract.PASSED.items():
        if operator in NEWER and operator not in found:
            assert release == OLDEST
            continue
        assert passed <= names(found[operator]), operator


def test_the_newer_operator_is_really_missing_in_the_oldest_release(contract_home: Path) -> None:
    """So the way around it (decoding in plain torch) is needed, and is what runs there."""
    assert contract.ANTI_QUANT not in schemas(contract_home, OLDEST)
    assert "max_low_bound" not in names(schemas(contract_home, OLDEST)[contract.MX_QUANT])


@pytest.mark.parametrize("release", SCHEMA_RELEASES)
def test_arguments_keep_their_types_and_defaults(contract_home: Path, release: str) -> None:
    oldest, found = schemas(contract_home, OLDEST), schemas(contract_home, release)
    for operator in set(contract.PASSED) - NEWER:
        (then,) = [s for s in oldest[operator] if contract.PASSED[operator] <= set(s.arguments)][:1]
        candidates = [s for s in found[operator] if s.name == then.name]
        assert len(candidates) >= 1 and candidates[0].returns == then.returns
        now = candidates[0]
        assert {a: now.arguments.get(a) for a in then.arguments} == dict(then.arguments), operator
        assert now.positional == then.positional


def test_the_tables_are_what_the_package_registers(contract_home: Path, torch_npu: Any) -> None:
    release = torch_npu.__version__.partition("+")[0]
    found = schemas(contract_home, release)
    for operator in contract.PASSED:
        packet = getattr(torch.ops.npu, operator)
        overloads = [getattr(packet, name)._schema for name in packet.overloads()]
        registered = {str(o).removeprefix("npu::").replace("SymInt", "int") for o in overloads}
        assert {(s.name, tuple(s.arguments.items())) for s in found[operator]} == {
            (s.name, tuple(s.arguments.items())) for s in map(parse, registered)
        }


class Calls:
    """Stands in for ``torch_npu``: computes with the CPU kernels and notes what was passed."""

    def __init__(self, release: str) -> None:
        self.__version__ = release
        self.made: list[tuple[str, int, frozenset[str]]] = []

    def __getattr__(self, name: str) -> Any:
        kernel = op_kernels.KERNELS[name]

        def call(*arguments: Any, **named: Any) -> Any:
            self.made.append((name, len(arguments), frozenset(named)))
            return kernel(*arguments, **named)

        return call


@pytest.mark.parametrize("release", SCHEMA_RELEASES)
def test_every_call_that_is_really_made_binds(contract_home: Path, release: str) -> None:
    """The backend told that it runs on this release, through all it can do."""
    found = schemas(contract_home, release)
    api = Calls(release)
    arguments = {name: names(found[name]) for name in contract.PASSED if name in found}
    backend = NpuBackend(NpuOps(api, arguments, release), "stubbed", torch.device("cpu"))
    x, w = torch.randn(4, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    for profile in computed_profiles():
        q = backend.quantize(x, profile)
        assert torch.equal(q.codes, quantize(x, profile).codes)
        assert torch.equal(backend.dequantize(q, torch.bfloat16), backend.fake_quant(x, profile))
        backend.check_fused(profile, profile, 64, 16)
        weight = backend.prepare_weight(PackedWeight.of(quantize(w, profile)))
        for bias in (None, torch.zeros(16).bfloat16()):
            backend.fused_linear(backend.encode_input(x, profile), weight, bias)
    assert backend.quantize(x, "ascend950", 0).axis == 0
    used = {name for name, _, _ in api.made}
    assert used == set(contract.PASSED) - (NEWER if release == OLDEST else set())
    for name, count, named in set(api.made):
        fits = [s for s in found[name] if count <= s.positional and named <= set(s.arguments)]
        assert fits, f"{name} with {count} positional arguments and {sorted(named)}"


def test_an_operator_that_lost_an_argument_is_refused(contract_home: Path) -> None:
    found = schemas(contract_home, OLDEST)
    arguments = {name: names(found[name]) for name in contract.PASSED if name in found}
    arguments[contract.MATMUL] -= {"group_sizes"}
    ops = NpuOps(SimpleNamespace(), arguments, OLDEST)
    with pytest.raises(BackendUnavailable, match="without group_sizes"):
        ops.require(contract.MATMUL)


def test_schemas_are_parsed() -> None:
    schema = parse('npu_f.out(Tensor(a!) x, int[2] y=[1, 1], *, str s="a", float? z=0.) -> (A, B)')
    assert schema.name == "npu_f.out" and schema.positional == 2 and schema.returns == "(A, B)"
    assert schema.arguments == {
        "x": "Tensor(a!)=",
        "y": "int[2]=[1, 1]",
        "s": "str=a",
        "z": "float?=0.0",
    }
