"""Five rows of two arms, as a run with that tracker logs them; in a process of its own, because
trackers keep settings and services for the life of a process.

Usage: tracker_worker.py NAME FOLDER; prints the state, or the error of a tracker that cannot start.
"""

from __future__ import annotations

import sys
from pathlib import Path

from npu_qat.integrations.trackers import TrackedRun, open_trackers


def main(name: str, folder: str) -> None:
    about = TrackedRun("demo", Path(folder), "abc123def456", "tests", {"train": {"lr": 0.001}})
    try:
        with open_trackers([name], about) as tracked:
            for arm in ("w4a4", "bf16_lora"):
                for step in (1, 2):
                    tracked.log({f"{arm}/loss": 1.0 / step, f"{arm}/lr": 0.1}, step)
            tracked.log({"bf16_lora/loss": 0.25}, 3)
        print(f"STATE {tracked.state[name]}")
    except ValueError as error:
        print(f"REFUSED {error}")


main(*sys.argv[1:])
