"""What the commands of `vrag` share: how one is declared, and how its options become a config."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from vrag_lib.config import PRESETS, Config, load_config


def add_command(
    commands, name: str, run, help_text: str, positionals: Sequence[tuple[str, str]] = ()
) -> argparse.ArgumentParser:
    """A sub-command that calls `run` with its arguments, with the options that every one has."""
    parser = commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog="Settings of the preset are changed by key=value arguments; `vrag config` lists them.",
    )
    parser.set_defaults(run=run)
    for positional, text in positionals:
        parser.add_argument(positional, help=text)
    parser.add_argument("--preset", default="laptop", help=f"one of {', '.join(PRESETS)} (default: %(default)s)")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    return parser


def read_config(
    arguments: argparse.Namespace, named: Mapping[str, object] | None = None, experiment: bool = False
) -> Config:
    """The preset, then options given by name, then `key=value` overrides: the later wins."""
    options = [f"{key}={value}" for key, value in (named or {}).items() if value is not None]
    return load_config(arguments.preset, [*options, *arguments.overrides], experiment)
