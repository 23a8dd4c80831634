"""What the commands of `vrag` share: how one is declared, how its options become a config, how a table is shown."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vrag_lib.config import Config, ConfigError, override, setting_names
from vrag_lib.presets import PRESETS, load_config

if TYPE_CHECKING:
    import pandas as pd

_WITH_MODEL = ("transformers", "openai")
"""The policies that have a model."""


def add_command(
    commands, name: str, run, help_text: str, positionals: Sequence[tuple[str, str]] = ()
) -> argparse.ArgumentParser:
    """A sub-command that calls `run` with its arguments, with the options that every one has."""
    parser = commands.add_parser(
        name,
        help=help_text.replace("%", "%%"),  # argparse fills in this one, not the description
        description=help_text,
        epilog="Settings of the preset are changed by key=value arguments; `vrag config` lists them.",
    )
    parser.set_defaults(run=run, listed_settings=[])
    for positional, text in positionals:
        parser.add_argument(positional, help=text)
    parser.add_argument("--preset", default="laptop", help=f"one of {', '.join(PRESETS)} (default: %(default)s)")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    return parser


class _SeveralValues(argparse.Action):
    """The values of an option that takes several, without the settings that stand behind them."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        wanted = [value for value in values if not _is_setting(value)]
        if not wanted:
            raise argparse.ArgumentError(self, "expected at least one argument")
        setattr(namespace, self.dest, wanted)
        namespace.listed_settings = [*namespace.listed_settings, *filter(_is_setting, values)]


def _is_setting(value: object) -> bool:
    return isinstance(value, str) and "=" in value


def add_several(parser: argparse.ArgumentParser, name: str, kind: Callable = str, **options) -> None:
    """An option of one value of `kind` or more. Settings may stand behind its values: `parse` finds them there."""

    def read(text: str) -> object:
        return text if _is_setting(text) else kind(text)

    read.__name__ = kind.__name__  # argparse names it where a value is of another kind
    parser.add_argument(name, nargs="+", type=read, action=_SeveralValues, **options)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command; `overrides` are its settings, in their order. They may stand anywhere but directly
    behind a flag in front of an argument; argparse cannot declare them: they are what it does not know. Exits with
    status 2 for what is neither."""
    arguments, rest = parser.parse_known_args(_settings_last(argv))
    unknown = [text for text in rest if text.startswith("-") or "=" not in text]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}; settings are written key=value")
    settings = {*rest, *arguments.listed_settings}
    arguments.overrides = [text for text in argv if text in settings]
    return arguments


def _settings_last(argv: Sequence[str]) -> list[str]:
    """The same with the settings behind the rest, so that none is taken for a command's argument. What follows an
    option stays: it may be its value."""
    known = setting_names()
    settings = [
        i
        for i, (before, text) in enumerate(zip(["", *argv], argv, strict=False))
        if "=" in text and text.partition("=")[0] in known and ("=" in before or not before.startswith("-"))
    ]
    rest = [text for i, text in enumerate(argv) if i not in settings]
    if rest and rest[-1].startswith("-"):  # should it lack its value, it must not get a setting for one
        rest, last = rest[:-1], rest[-1:]
    else:
        last = []
    return [*rest, *(argv[i] for i in settings), *last]


def read_config(
    arguments: argparse.Namespace, named: Mapping[str, object] | None = None, experiment: bool = False
) -> Config:
    """The preset, then options given by name, then `key=value` overrides: the later wins."""
    options = [f"{key}={value}" for key, value in (named or {}).items() if value is not None]
    return load_config(arguments.preset, [*options, *arguments.overrides], experiment)


def add_policy_options(parser: argparse.ArgumentParser, default: str) -> None:
    """The options that `read_policy_config` reads."""
    implied = "without it --base-url means openai, a --model that is a folder or hub id transformers"
    parser.add_argument("--policy", help=f"extractive, transformers or openai (default: {default}; {implied})")
    parser.add_argument("--model", help="the policy's model: path, hub id or the endpoint's name for it")
    parser.add_argument("--base-url", help="endpoint of an OpenAI-compatible server, up to and including /v1")


def read_policy_config(
    arguments: argparse.Namespace, named: Mapping[str, object] | None = None, experiment: bool = False
) -> Config:
    """`read_config` of a command that has a policy. What the options leave open is settled here and said on stderr: the
    policy that they imply, and the size at which its checkpoint reads images.

    Raises ConfigError for an option that the policy has no use for.
    """
    options = {
        "policy.kind": arguments.policy,
        "policy.model": arguments.model,
        "policy.base_url": arguments.base_url,
        **(named or {}),
    }
    config = read_config(arguments, options, experiment)
    if arguments.policy is None and "policy.kind" not in overridden(arguments):
        config = _imply_policy(arguments, config)
    if arguments.model is not None:
        _refuse_unused("--model", "--policy", config.policy.kind, _WITH_MODEL)
    if arguments.base_url is not None:
        judge = " (a judge's is --judge-url)" if getattr(arguments, "judge_model", None) else ""
        _refuse_unused(f"--base-url{judge}", "--policy", config.policy.kind, ("openai",))
    return _fit_images(arguments, config)


def overridden(arguments: argparse.Namespace) -> set[str]:
    """The settings that the command line gives as key=value."""
    return {text.partition("=")[0].strip() for text in arguments.overrides}


def _imply_policy(arguments: argparse.Namespace, config: Config) -> Config:
    kind, option = config.policy.kind, "--base-url" if arguments.base_url else "--model"
    if arguments.base_url:
        implied = "openai"
    elif arguments.model is None or kind in _WITH_MODEL:
        return config
    elif _names_checkpoint(arguments.model):
        implied = "transformers"
    else:
        raise ConfigError(
            f"--model {arguments.model} is neither a folder nor a hub id (owner/name); for an endpoint's model add "
            "--base-url"
        )
    if implied == kind:
        return config
    print(f"{option} is given without --policy, which therefore is {implied}, not {kind}", file=sys.stderr)
    return override(config, [f"policy.kind={implied}"])


def _names_checkpoint(model: str) -> bool:
    """Whether this is a folder or looks like a hub id; where its owner is a folder here, it is a path mistyped."""
    path = Path(model)
    return path.is_dir() or bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) and not path.parent.is_dir())


def _refuse_unused(option: str, choice: str, chosen: str, used_by: Sequence[str]) -> None:
    if chosen not in used_by:
        uses = " or ".join(f"{choice} {name}" for name in used_by)
        raise ConfigError(f"{option} has no use with {choice} {chosen}: leave it out, or add {uses}")


def _fit_images(arguments: argparse.Namespace, config: Config) -> Config:
    """Images no larger than the checkpoint reads them, unless the command line says how large they are."""
    sizes = ("environment.min_pixels", "environment.max_pixels")
    if config.policy.kind != "transformers" or not config.policy.model or overridden(arguments).intersection(sizes):
        return config
    from vrag_lib.factory import image_pixels
    from vrag_lib.geometry import PATCH

    pixels = image_pixels(config.policy.model)
    if pixels is None or pixels[1] >= config.environment.max_pixels:
        return config
    least, most = (area // PATCH**2 for area in pixels)
    print(
        f"{config.policy.model} reads images of {least} to {most} vision tokens: pages are shown at that size; "
        f"{sizes[0]}= and {sizes[1]}= set another",
        file=sys.stderr,
    )
    return override(config, [f"{name}={area}" for name, area in zip(sizes, pixels, strict=True)])


def add_retriever_options(parser: argparse.ArgumentParser, kinds: str, *aliases: str) -> None:
    """The options that `retriever_settings` reads; `aliases` of --retriever-model."""
    parser.add_argument("--retriever", help=f"{kinds} (default: the preset's)")
    what = "visual: path or hub id of a ColPali-type model"
    parser.add_argument("--retriever-model", *aliases, dest="retriever_model", metavar="MODEL", help=what)


def retriever_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """The retriever's options as settings."""
    return {"retrieval.kind": arguments.retriever, "retrieval.model": arguments.retriever_model}


def check_retriever(arguments: argparse.Namespace, config: Config) -> Config:
    """The config. Raises ConfigError for a --retriever-model that its retriever has no use for."""
    if arguments.retriever_model is not None:
        _refuse_unused("--retriever-model", "--retriever", config.retrieval.kind, ("visual",))
    return config


def interval_table(
    table: pd.DataFrame, labels: Sequence[str], metrics: Sequence[str], scale: float = 1.0, width: int = 120
) -> str:
    """The label columns and as many of `metrics` as a line of `width` characters holds, the first ones first, each
    multiplied by `scale` and written `mean [low, high]` from its columns `<metric>`, `<metric>_low`, `<metric>_high`.
    """
    shown = table[list(labels)].astype(str).map(lambda text: text if len(text) <= 32 else text[:31] + "…")
    for name in metrics:
        cells = (scale * table[[name, f"{name}_low", f"{name}_high"]]).to_numpy()
        texts = ["" if mean != mean else f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high in cells]
        wider = shown.assign(**{name: texts})
        if len(wider.to_string(index=False).partition("\n")[0]) > width:
            break
        shown = wider
    return shown.to_string(index=False)
