"""Profiles are data: names, uniqueness, suggestions, and a start without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from npu_qat.numerics.profiles import (
    PROFILES,
    ROUNDINGS,
    SCALE_RULES,
    get_profile,
    profile_names,
)
from tests.numerics.oracle import SPECS


def test_every_profile_has_an_oracle() -> None:
    assert set(PROFILES) == set(SPECS)


def test_names_are_unique_and_fields_known() -> None:
    assert profile_names() == list(PROFILES)
    for name, profile in PROFILES.items():
        assert profile.name == name and profile.doc
        assert profile.rounding in ROUNDINGS and profile.scale_rule in SCALE_RULES
        assert profile.block_size in (16, 32)
    assert len({profile.doc for profile in PROFILES.values()}) == len(PROFILES)


def test_no_two_profiles_are_the_same_under_different_names() -> None:
    # They may agree: two stacks can follow one rule. These pairs do, and no others.
    same: dict[tuple[object, ...], list[str]] = {}
    for profile in PROFILES.values():
        ignored = ("name", "doc", "forced_axis")
        fields = tuple(value for key, value in vars(profile).items() if key not in ignored)
        same.setdefault(fields, []).append(profile.name)
    assert [names for names in same.values() if len(names) > 1] == [
        ["fork-nvfp4-row", "fork-nvfp4-column"]
    ]


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'ascend950'"):
        get_profile("ascend-950")
    with pytest.raises(ValueError, match="Profiles: ocp, "):
        get_profile("zzzz")


def test_profiles_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PROFILES["ocp"].block_size = 16  # type: ignore[misc]


def test_profiles_load_without_torch() -> None:
    code = "import sys, npu_qat.numerics.profiles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("first", ["fake_quant", "pack", "to_npu_layout", "QuantizedTensor"])
def test_public_names_load_in_any_order(first: str) -> None:
    code = (
        f"from npu_qat.numerics import {first}\n"
        "import npu_qat.numerics as n\n"
        "assert all(callable(getattr(n, name)) for name in n.__all__ if name != 'PROFILES')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
