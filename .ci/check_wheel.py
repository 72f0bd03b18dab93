"""Fail unless a wheel holds every committed file of the package, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile


def main(wheel: str) -> int:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "npu_qat"],
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = {name for name in listed.stdout.split("\0") if name}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        size = sum(entry.compress_size for entry in archive.infolist())
    for name in sorted(wanted - packed):
        print(f"missing in the wheel: {name}")
    for name in sorted(packed - wanted):
        print(f"in the wheel and not in git: {name}")
    print(f"{len(packed)} files, {size / 1e6:.1f} MB")
    return int(wanted != packed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
