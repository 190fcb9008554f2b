"""Fill a configuration dataclass from flags, `BABYBERT_*` variables and a YAML file.

One mechanism for every command: a field `batch_size` of command `pretrain` is `--batch-size`, the variable
`BABYBERT_PRETRAIN_BATCH_SIZE`, and the key `batch_size` below `pretrain:` in the file given with `--config`. A flag
wins over a variable, a variable over the file, the file over the default. An unknown flag or key is refused; an
unknown variable is not, because Kubernetes puts variables of its own making beside ours.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from babybert.errors import UsageError

Config = TypeVar("Config")
MANY = tuple[str, ...]  # several values after a flag; a list in YAML; parted by commas in a variable


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Give `parser` one flag for each field of `config_class`, with the field's reason as its help."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings below each command's name")
    kinds = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        flag = "--" + field.name.replace("_", "-")
        text = f"{field.metadata['help']} [default: {_shown(field.default)}]".replace("%", "%%")
        if kinds[field.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif kinds[field.name] == MANY:
            parser.add_argument(flag, default=None, nargs="+", metavar="TEXT", help=text)
        else:
            parser.add_argument(flag, default=None, metavar=_metavar(kinds[field.name]), help=text)


def fill(config_class: type[Config], command: str, flags: argparse.Namespace, environment: Mapping[str, str]) -> Config:
    """Make a `config_class` of what the flags, the variables and the file say.

    Raises UsageError naming the flag, variable or file and key that is wrong.
    """
    from_file = _read_section(flags.config, command) if flags.config else {}
    kinds = typing.get_type_hints(config_class)
    known = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(set(from_file) - known)
    if unknown:
        raise UsageError(f"{flags.config}: '{command}' has no setting '{unknown[0]}'; see `babybert {command} --help`")
    values = {}
    for name in known:
        variable = f"BABYBERT_{command}_{name}".upper().replace("-", "_")
        if getattr(flags, name) is not None:
            values[name] = _convert(getattr(flags, name), kinds[name], "--" + name.replace("_", "-"))
        elif variable in environment:
            text = environment[variable]
            parts = [part.strip() for part in text.split(",") if part.strip()]
            values[name] = _convert(parts if kinds[name] == MANY else text, kinds[name], variable)
        elif name in from_file:
            values[name] = _convert(from_file[name], kinds[name], f"{flags.config}: {command}.{name}")
    implied = getattr(
        config_class, "implied", None
    )  # a setting may stand for several others: they yield to any that is given
    return config_class(**{**(implied(values) if implied else {}), **values})


def _read_section(path: Path, command: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: is not YAML: {reason}") from error
    section = {} if content is None else content.get(command, {}) if isinstance(content, dict) else content
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise UsageError(f"{path}: expected settings by name below '{command}:'")
    return {str(name): value for name, value in section.items()}


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value`, a string or what YAML made of it, as `kind`."""
    choices = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        if value is None or value in ("", "none"):
            return None
        kind = next(choice for choice in choices if choice is not type(None))
    if typing.get_origin(kind) is Literal:
        if value not in choices:
            raise UsageError(f"{where} is '{value}'; choose one of {', '.join(choices)}")
        return value
    if kind == MANY:
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise UsageError(f"{where} is '{value}'; it must be a text or a list of texts")
        return tuple(value)
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in words:
            raise UsageError(f"{where} is '{value}'; it must be true or false")
        return words[str(value).lower()]
    if value is None or isinstance(value, (bool, dict, list)):
        raise UsageError(f"{where} is '{value}'; it must be {_NAMES[kind]}")
    try:
        return kind(str(value))
    except ValueError:
        raise UsageError(f"{where} is '{value}'; it must be {_NAMES[kind]}") from None


_NAMES = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    base = next(k for k in typing.get_args(kind) if k is not type(None)) if isinstance(kind, types.UnionType) else kind
    return {int: "N", float: "X", str: "TEXT", Path: "PATH"}[base]


def _shown(default: Any) -> str:
    if default in (None, ()):
        return "none"
    return (
        " ".join(default)
        if isinstance(default, tuple)
        else str(default).lower()
        if isinstance(default, bool)
        else str(default)
    )
