"""The arguments that commands share: where the configuration comes from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npu_qat.config import Loaded

DEVICES = ("auto", "npu", "cuda", "cpu")
EXAMPLES = "examples:"
BACKENDS = ("auto", "reference", "cpu", "cuda", "npu", "ascendc")


def add_config_arguments(parser: argparse.ArgumentParser, *, positional: bool = True) -> None:
    """``[CONFIG] [--preset NAME] [--set KEY=VALUE ...]``."""
    if positional:
        parser.add_argument(
            "config", nargs="?", metavar="CONFIG", help="a YAML file; its keys go over the preset's"
        )
    parser.add_argument(
        "--preset", metavar="NAME", help="start from a preset ('npu-qat config presets' lists them)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="set one key, e.g. --set train.lr=1e-5; again for more; goes over everything else",
    )


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills descriptions to the width of the terminal and leaves examples line by line."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(EXAMPLES):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def examples(*lines: str) -> str:
    """The examples at the end of a command's help. A test parses each line."""
    return EXAMPLES + "\n" + "\n".join(f"  {line}" for line in lines)


def load_from(
    args: argparse.Namespace,
    *,
    config: str | None,
    preset: str | None,
    options: dict[str, str] | None = None,
) -> Loaded:
    """Load ``preset`` < ``config`` < ``--set`` < ``options``.

    Args:
        args: the parsed command line, for ``--set``.
        config, preset: file and preset; None for none.
        options: our key -> text of options such as ``--device``, which go over ``--set``.
    """
    from npu_qat.config import Override, load_run, parse_overrides

    overrides = parse_overrides(args.overrides)
    for key, value in (options or {}).items():
        option = key.rpartition(".")[2].replace("output_dir", "output")
        overrides.append(Override(tuple(key.split(".")), value, f"--{option} {value}"))
    return load_run(config, preset=preset, overrides=overrides)
