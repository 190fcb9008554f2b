"""How a configuration's fields are declared and checked.

Every setting has a default and a reason. The reason is also the `--help` text, so there is one place to read and one
to change.
"""

import dataclasses
import math
import re
from typing import Any
from urllib.parse import urlsplit

from babybert.errors import UsageError


class _Unset:
    """The type of `UNSET`."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()
"""The default of a field of which the config must know whether it was given. Such a config gives it a value when it is
made; only `PrepareConfig` keeps it, where another setting excludes the field."""


def option(default: Any, reason: str, is_text: bool = False) -> Any:
    """A dataclass field whose `reason` is its documentation and its `--help` text.

    Args:
        default: the default.
        reason: why there is this setting, and why it has this default.
        is_text: a `str` is text. Others are paths, addresses or names; a path may have bytes that are not text.
    """
    return dataclasses.field(default=default, metadata={"help": reason, "default": default, "is_text": is_text})


def recipe_option(default: Any, reason: str) -> Any:
    """An `option` that a recipe may set. `default` applies where neither the caller nor the recipe gives a value."""
    return unset_option(default, reason)


def unset_option(default: Any, reason: str) -> Any:
    """An `option` of which the config must know whether it was given. The config sets `default` where it was not."""
    return dataclasses.field(default=UNSET, metadata={"help": reason, "default": default, "is_text": False})


def require(condition: bool, message: str) -> None:
    """Raise `UsageError(message)` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def require_at_least(config: Any, minimum: float, *names: str) -> None:
    """Raise `UsageError` for the first of these fields that is below `minimum`."""
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, f"{name} is {value}; it must be at least {minimum}")


def require_between(config: Any, minimum: float, maximum: float, *names: str) -> None:
    """Raise `UsageError` for the first of these fields that is neither None nor within these bounds."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or minimum <= value <= maximum,
            f"{name} is {value}; it must be from {minimum:,} to {maximum:,}",
        )


def require_usable_numbers(config: Any) -> None:
    """Raise `UsageError` for a number that is not finite, or larger than any use of a setting allows."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float):
            require(math.isfinite(value), f"{field.name} is {value}; it must be a finite number")
        elif isinstance(value, int):
            require(abs(value) < 2**32, f"{field.name} is {str(value)[:20]}; it must be below {2**32:,}")


def require_host(name: str, host: str) -> None:
    """Raise `UsageError` unless `host` can be the name or address of a host."""
    try:
        is_valid = bool(host) and not re.search(r"[\s/]", host) and bool(host.encode("idna"))
    except UnicodeError:
        is_valid = False
    require(is_valid, f"{name} is {host!r}; it must be a host name or an address, such as 127.0.0.1 or 0.0.0.0")


def require_seed(seed: int) -> None:
    """Raise `UsageError` unless `seed` fits 32 bits, which every random generator here accepts."""
    require(0 <= seed < 2**32, f"seed is {seed}; it must be from 0 to {2**32 - 1}")


def require_http_address(name: str, url: str, example: str) -> None:
    """Raise `UsageError` unless `url` is an address that an HTTP request can be sent to."""
    problem = _problem_of_url(url)
    require(not problem, f"{name} is '{url}', which has {problem}; it must look like {example}")


def _problem_of_url(url: str) -> str:
    """What is wrong with the URL of a server; empty if nothing is."""
    if " " in url or not url.isprintable():
        return "a blank or a control character"
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host.encode("idna")
        parts.path.encode("ascii")
        port = parts.port
    except ValueError as error:
        return f"an invalid part ({error})"
    if parts.scheme not in ("http", "https"):
        return "another scheme than http and https"
    if not host:
        return "no host"
    if port == 0:
        return "no valid port"
    if parts.username is not None:  # urllib would take it for a part of the host
        return "a user name, which is not supported"
    return ""
