"""Trainers as they are in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.training.launching import RENDEZVOUS


@pytest.fixture
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide the process group of one that a run in this process may have left behind.

    It stays until the process ends, and a Trainer that finds it wraps its model for it.
    """
    from accelerate.state import AcceleratorState

    for name in RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
