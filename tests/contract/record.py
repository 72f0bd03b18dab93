"""Write the stubbed recording into ``tests/recordings``; see the README there.

    python3 tests/contract/environment.py python -m tests.contract.record

Small cases only, and two profiles: the file is there to be replayed, not to be complete.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from npu_qat.backends.npu import NpuBackend, NpuOps
from npu_qat.parity.device import Recording, judge, measure
from npu_qat.parity.device_recording import write_recording
from tests.contract import op_kernels

FOLDER = Path(__file__).resolve().parents[1] / "recordings"
PROFILES = ("ascend950", "ascend950-dual")
LEFT_OUT = ("patterns", "fp16", "activation", "shape-3x1056", "tail")


def record(backend: NpuBackend) -> Recording:
    """What ``backend`` answers in the small cases."""
    return measure(
        backend,
        torch.device("cpu"),
        environment={"machine": platform.machine(), "torch": torch.__version__},
        profiles=PROFILES,
        wanted=lambda name: not name.startswith(LEFT_OUT),
        large=False,
    )


def name_of(recording: Recording) -> str:
    return f"stubbed-torch-npu-{recording.backend['torch_npu'].partition('+')[0]}"


def main() -> None:
    import torch_npu  # noqa: F401, which registers the operators

    library = op_kernels.register()
    recording = record(NpuBackend(NpuOps.loaded(), "stubbed", torch.device("cpu")))
    del library
    for path in write_recording(FOLDER / f"{name_of(recording)}.json", recording, judge(recording)):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
