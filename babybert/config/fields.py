"""How a configuration's fields are declared and checked.

Every setting has a default and a reason. The reason is also the `--help` text, so there is one place to read and one
to change.
"""

import dataclasses
from typing import Any

from babybert.errors import UsageError


class _Unset:
    """The type of `UNSET`."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()
"""The default of a field of which the config must know whether it was given. Such a config gives it a value when it is
made; only `PrepareConfig` keeps it, where another setting excludes the field."""


def option(default: Any, reason: str) -> Any:
    """A dataclass field whose `reason` is its documentation and its `--help` text."""
    return dataclasses.field(default=default, metadata={"help": reason, "default": default})


def recipe_option(default: Any, reason: str) -> Any:
    """An `option` that a recipe may set. `default` applies where neither the caller nor the recipe gives a value."""
    return unset_option(default, reason)


def unset_option(default: Any, reason: str) -> Any:
    """An `option` of which the config must know whether it was given. The config sets `default` where it was not."""
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
