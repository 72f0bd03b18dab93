"""The result of a run as one HTML page that needs nothing else.

``write_report(run_dir)`` reads the run directory (``rundata``), puts the numbers into words
(``verdict``), draws the plots (``plots``) and fills the page (``html``, ``template.html.j2``).
matplotlib and jinja2 are imported when a report is written.
"""

from __future__ import annotations

from pathlib import Path


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir`` and return its path; see ``html.write_report``."""
    from npu_qat.reporting.html import write_report as write

    return write(run_dir)


__all__ = ["write_report"]
