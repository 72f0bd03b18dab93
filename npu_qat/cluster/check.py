"""One line of a doctor's report. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "absent", "warning", "missing"]


@dataclass(frozen=True)
class Check:
    """One line of the report. ``missing`` means that training cannot work without it."""

    area: str
    name: str
    status: Status
    value: str
    advice: str = ""
