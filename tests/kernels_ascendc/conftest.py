"""The kernels, compiled once a test process with the host model."""

from __future__ import annotations

import pytest

from tests.kernels_ascendc import host_model


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return host_model.build(tmp_path_factory.mktemp("kernels") / "kernels.so")


@pytest.fixture
def kernels(library):
    return host_model.HostKernels(library)
