"""Tests of this folder run in an environment of their own: ``make contract-vllm``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.contract)


@pytest.fixture(autouse=True, scope="session")
def serving_stack() -> object:
    """The real vllm and vllm-ascend, ready; a skip with the reason where they are not installed."""
    if not (find_spec("vllm_ascend") and find_spec("torch_npu")):
        pytest.skip("needs vllm-ascend and torch-npu: make contract-vllm")
    from tests.contract_vllm.stack import stack

    return stack()
