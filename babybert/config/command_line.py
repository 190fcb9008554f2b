"""Fill a configuration dataclass from flags, `BABYBERT_*` variables and a YAML file.

One mechanism serves every command. A field `batch_size` of command `pretrain` is the flag `--batch-size`, the variable
`BABYBERT_PRETRAIN_BATCH_SIZE`, and the key `batch_size` below `pretrain:` in the file given with `--config`. A flag
wins over a variable, a variable over the file, the file over the default. An unknown flag or key is an error. An
unknown variable is not, because Kubernetes adds variables whose names can start the same way.
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
STRINGS = tuple[str, ...]  # several values after a flag, a list in YAML, separated by commas in a variable
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
DESCRIPTIONS = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Give `parser` one flag for each field of `config_class`, with the field's reason as its help.

    The fields of each base class form a separate group in the help text.
    """
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings below each command's name")
    types_by_name = typing.get_type_hints(config_class)
    bases = [base for base in config_class.__bases__ if dataclasses.is_dataclass(base)]
    groups = {base: parser.add_argument_group((base.__doc__ or "").rstrip(".")) for base in bases}
    for field in dataclasses.fields(config_class):
        _add_flag(_group_of(field.name, groups, parser), field, types_by_name[field.name])


def load_config(
    config_class: type[Config], command: str, flags: argparse.Namespace, environment: Mapping[str, str]
) -> Config:
    """Make a `config_class` from the flags, the variables and the file.

    Raises UsageError that names the wrong flag, variable, or file and key.
    """
    file_values = _read_section(flags.config, command) if flags.config else {}
    types_by_name = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    unknown = sorted(set(file_values) - set(names))
    if unknown:
        raise UsageError(f"{flags.config}: '{command}' has no setting '{unknown[0]}'; see `babybert {command} --help`")
    values: dict[str, Any] = {}
    for name in names:
        value_type = types_by_name[name]
        variable = f"BABYBERT_{command}_{name}".upper().replace("-", "_")
        if getattr(flags, name) is not None:
            values[name] = _convert(getattr(flags, name), value_type, "--" + name.replace("_", "-"))
        elif variable in environment:
            values[name] = _convert(_split_variable(environment[variable], value_type), value_type, variable)
        elif name in file_values:
            values[name] = _convert(file_values[name], value_type, f"{flags.config}: {command}.{name}")
    return config_class(**values)


def _group_of(name: str, groups: Mapping[type, Any], parser: argparse.ArgumentParser) -> Any:
    """The help group of the base class that declares field `name`, or the parser itself."""
    for base, group in groups.items():
        if name in base.__annotations__:
            return group
    return parser


def _add_flag(group: Any, field: dataclasses.Field[Any], value_type: Any) -> None:
    """Add one field's flag."""
    flag = "--" + field.name.replace("_", "-")
    help_text = f"{field.metadata['help']} [default: {_format_default(field.metadata['default'])}]".replace("%", "%%")
    if value_type is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)
    elif value_type == STRINGS:
        group.add_argument(flag, default=None, nargs="+", metavar="TEXT", help=help_text)
    else:
        group.add_argument(flag, default=None, metavar=_metavar(value_type), help=help_text)


def _read_section(path: Path, command: str) -> dict[str, Any]:
    """The settings below `command:` in a YAML file. Raises UsageError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: is not YAML: {reason}") from error
    section = content.get(command) if isinstance(content, dict) else content
    if section is None:  # an empty file or section
        return {}
    if not isinstance(section, dict):
        raise UsageError(f"{path}: expected settings by name below '{command}:'")
    return {str(name): value for name, value in section.items()}


def _split_variable(text: str, value_type: Any) -> str | list[str]:
    """A variable's text, as a list where several values are expected."""
    if value_type != STRINGS:
        return text
    return [item.strip() for item in text.split(",") if item.strip()]


def _convert(value: Any, value_type: Any, where: str) -> Any:
    """`value`, a string or what YAML made of it, as `value_type`. Raises UsageError that names `where`."""
    if isinstance(value_type, types.UnionType):
        if value is None or value in ("", "none"):
            return None
        value_type = _without_none(value_type)
    if typing.get_origin(value_type) is Literal:
        return _convert_choice(value, typing.get_args(value_type), where)
    if value_type == STRINGS:
        return _convert_strings(value, where)
    if value_type is bool:
        return _convert_bool(value, where)
    return _convert_scalar(value, value_type, where)


def _convert_choice(value: Any, choices: tuple[str, ...], where: str) -> str:
    if value not in choices:
        raise UsageError(f"{where} is '{value}'; choose one of {', '.join(choices)}")
    return str(value)


def _convert_strings(value: Any, where: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise UsageError(f"{where} is '{value}'; it must be a text or a list of texts")
    return tuple(values)


def _convert_bool(value: Any, where: str) -> bool:
    word = str(value).lower()
    if word not in BOOLEANS:
        raise UsageError(f"{where} is '{value}'; it must be true or false")
    return BOOLEANS[word]


def _convert_scalar(value: Any, value_type: Any, where: str) -> Any:
    message = f"{where} is '{value}'; it must be {DESCRIPTIONS[value_type]}"
    if value is None or isinstance(value, (bool, dict, list)):
        raise UsageError(message)
    if str(value) == "" and value_type in (str, Path):  # as a host it would mean every address, as a path this folder
        raise UsageError(f"{where} is empty; give it a value or leave it out")
    try:
        return value_type(str(value))
    except ValueError:
        raise UsageError(message) from None


def _without_none(value_type: Any) -> Any:
    """`X` for `X | None`."""
    return next(choice for choice in typing.get_args(value_type) if choice is not type(None))


def _metavar(value_type: Any) -> str:
    """What stands for a flag's value in the help text."""
    if isinstance(value_type, types.UnionType):
        value_type = _without_none(value_type)
    if typing.get_origin(value_type) is Literal:
        return "|".join(typing.get_args(value_type))
    return METAVARS[value_type]


def _format_default(default: Any) -> str:
    if default in (None, ()):
        return "none"
    if isinstance(default, tuple):
        return " ".join(default)
    if isinstance(default, bool):
        return str(default).lower()
    return str(default)
