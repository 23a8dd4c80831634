"""One setting of a config: its default and meaning, what it may be, how it is read from the command line."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

KEY_REMEDY = "; a key is read from the environment variable that policy.api_key_env names"
"""What `check_url` adds for a model's endpoint."""

_KEY = re.compile(
    r"(?:sk|pk|gsk|csk|hf|r8|xai|tgp|fw|ghp|gho)_"  # as providers begin them
    r"(?:(?=\w*[A-Z])(?=\w*[a-z0-9])\w+|(?=\w*\d)\w{12,})"
    r"|(?=\w*\d)(?=\w*[a-z])(?=\w*[A-Z])\w{21,}"  # drawn at random
    r"|(?=\w*\d)[A-Za-z0-9]{21,}"
)
"""What looks like a key, not like the name of a variable: OPENAI_API_KEY, hf_token and my_key_2 do not."""


class ConfigError(ValueError):
    """A setting that is unknown, cannot have its value or cannot be had here; the message names it and the remedy."""


def setting(default: Any, text: str, least: float | None = None, one_of: Sequence[str] = ()) -> Any:
    """A field with its documentation; its number is at least `least`, its word one of `one_of`."""
    return dataclasses.field(default=default, metadata={"doc": text, "least": least, "one_of": one_of})


def check_settings(stage: Any, name: str) -> None:
    """Raises ConfigError, naming the setting, for a number below its least or a word that is none of its own."""
    for f in dataclasses.fields(stage):
        value, least, one_of = getattr(stage, f.name), f.metadata["least"], f.metadata["one_of"]
        if least is not None and not least <= value < float("inf"):
            raise ConfigError(f"{name}.{f.name} is at least {least} and finite, not {value}")
        if one_of and value not in one_of:
            raise ConfigError(f"{name}.{f.name} is one of {', '.join(one_of)}, not {value!r}")


def check_url(name: str, url: str, remedy: str = "") -> None:
    """Raises ConfigError for what is no address of a server, and for one with a user name, password or query: results
    and messages name addresses. The message names the setting and the remedy, never the address itself."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # a port out of range, or half of an IPv6 address
        usable = False
    if not usable:
        raise ConfigError(f"{name} is no address; one is written like http://localhost:8000, http:// or https:// first")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"{name} holds a user name, password or query: leave it out, results keep addresses{remedy}")


def same_server(url: str, other: str) -> bool:
    """Whether two addresses that `check_url` lets pass have one scheme, host and port.

    >>> same_server("https://Host/v1", "https://host:443/api/v1"), same_server("http://host/v1", "https://host/v1")
    (True, False)
    """
    ports = {"http": 80, "https": 443}
    parts = [urlsplit(each) for each in (url, other)]
    ours, theirs = ((p.scheme, p.hostname, p.port or ports[p.scheme]) for p in parts)
    return ours == theirs


def check_key_name(name: str, value: str) -> None:
    """Raises ConfigError for what is no name of an environment variable, and for what looks like the key itself:
    results keep the name. The message does not repeat it. Nothing is no name, and allowed; so is what is set."""
    if value not in os.environ and (not re.fullmatch(r"[A-Za-z_]\w*|", value) or _KEY.fullmatch(value)):
        raise ConfigError(
            f"{name} is the name of an environment variable, not what it holds: put the key into one, such as "
            "OPENAI_API_KEY, and name that"
        )


def check_device(name: str, value: str) -> None:
    """Raises ConfigError for what torch would not know as a device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ConfigError(f"{name} is one of auto, cpu, cuda, or a card such as cuda:1, not {value!r}")


def read_value(value: str, kind: Any, key: str) -> Any:
    """One override value as `kind`: bool, int, float, str, or one of these or None."""
    if isinstance(kind, types.UnionType):
        if value.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if kind is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise ConfigError(f"{key} is true or false, not {value!r}")
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{key} needs a value of type {kind.__name__}, not {value!r}") from None
