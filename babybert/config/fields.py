"""How a configuration's fields are declared and checked.

Every setting has a default and a reason. The reason is also the `--help` text, so there is one place to read and one
to change.
"""

import dataclasses
from typing import Any
from urllib.parse import urlsplit

from babybert.errors import UsageError


class _Unset:
    """The type of `UNSET`."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()
"""The default of a field that a recipe may set. It never survives the construction of a config."""


def option(default: Any, reason: str) -> Any:
    """A dataclass field whose `reason` is its documentation and its `--help` text."""
    return dataclasses.field(default=default, metadata={"help": reason, "default": default})


def recipe_option(default: Any, reason: str) -> Any:
    """An `option` that a recipe may set. `default` applies where neither the caller nor the recipe gives a value."""
    return dataclasses.field(default=UNSET, metadata={"help": reason, "default": default})


def require(condition: bool, message: str) -> None:
    """Raise `UsageError(message)` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def require_at_least(config: Any, minimum: float, *names: str) -> None:
    """Raise `UsageError` for the first of these fields that is below `minimum`."""
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, f"{name} is {value}; it must be at least {minimum}")


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
