"""Fill a configuration dataclass from flags, `BABYBERT_*` variables and a YAML file.

One mechanism serves every command. A field `batch_size` of command `pretrain` is the flag `--batch-size`, the variable
`BABYBERT_PRETRAIN_BATCH_SIZE`, and the key `batch_size` below `pretrain:` in the file given with `--config`. A flag
wins over a variable, a variable over the file, the file over the default. An unknown flag or key is an error. An
unknown variable is not, because Kubernetes adds variables whose names can start the same way.
"""

import argparse
import dataclasses
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from babybert.config.settings_file import read_section
from babybert.encoding import decode_path, decode_text
from babybert.errors import UsageError
from babybert.s3 import is_s3

Config = TypeVar("Config")
STRINGS = tuple[str, ...]  # several values after a flag, a list in YAML, separated by commas in a variable
BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
NOTATIONS = {
    int: re.compile(r"[+-]?(0|[1-9][0-9_]*)"),
    float: re.compile(r"[+-]?(0|[1-9][0-9_]*)?(\.[0-9]*)?([eE][+-]?[0-9]+)?"),
}
MOST_SHOWN = 80  # characters of a wrong value in a message
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
    config_class: type[Config],
    command: str,
    flags: argparse.Namespace,
    environment: Mapping[str, str],
    commands: Collection[str],
) -> Config:
    """Make a `config_class` from the flags, the variables and the file, whose sections are named after `commands`.

    Raises UsageError that names the wrong flag, variable, or file and key.
    """
    file_values = read_section(flags.config, command, commands) if flags.config else {}
    types_by_name = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    is_text_by_name = {field.name: field.metadata["is_text"] for field in fields}
    unknown = sorted(set(file_values) - set(names))
    if unknown:
        raise UsageError(f"{flags.config}: '{command}' has no setting '{unknown[0]}'; see `babybert {command} --help`")
    values: dict[str, Any] = {}
    for name in names:
        value_type, is_text = types_by_name[name], is_text_by_name[name]
        variable = f"BABYBERT_{command}_{name}".upper().replace("-", "_")
        if getattr(flags, name) is not None:
            values[name] = _convert(getattr(flags, name), value_type, "--" + name.replace("_", "-"), is_text)
        elif variable in environment:
            values[name] = _convert(_split_variable(environment[variable], value_type), value_type, variable, is_text)
        elif name in file_values:
            values[name] = _convert(file_values[name], value_type, f"{flags.config}: {command}.{name}", is_text)
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


def _split_variable(text: str, value_type: Any) -> str | list[str]:
    """A variable's text, as a list where several values are expected."""
    if value_type != STRINGS:
        return text
    return [item.strip() for item in text.split(",") if item.strip()]


def _convert(value: Any, value_type: Any, where: str, is_text: bool) -> Any:
    """`value`, a text, a list of texts, a boolean or None, as `value_type`. Raises UsageError that names `where`.

    Args:
        is_text: the value is read as text, not as a path or address.
    """
    if value_type == Path | str:
        value_type = str if isinstance(value, str) and is_s3(value) else Path
    if _is_union(value_type):
        if value is None or value in ("", "none"):
            return None
        value_type = _without_none(value_type)
    if typing.get_origin(value_type) is Literal:
        return _convert_choice(value, typing.get_args(value_type), where)
    if value_type == STRINGS:
        return _convert_strings(value, where, is_text)
    if value_type is bool:
        return _convert_bool(value, where)
    if not isinstance(value, str):
        raise UsageError(f"{where} is {_shown(value)}; it must be {DESCRIPTIONS[value_type]}")
    if value_type in (int, float):
        return _convert_number(value, value_type, where)
    return value_type(_convert_string(value, where, is_text))


def _convert_choice(value: Any, choices: tuple[str, ...], where: str) -> str:
    if value not in choices:
        raise UsageError(f"{where} is {_shown(value)}; choose one of {', '.join(choices)}")
    return str(value)


def _convert_strings(value: Any, where: str, is_text: bool) -> tuple[str, ...]:
    if value is None:
        raise UsageError(f"{where} is {_shown(value)}; it must be a text or a list of texts")
    return tuple(_convert_string(item, where, is_text) for item in ([value] if isinstance(value, str) else value))


def _convert_bool(value: Any, where: str) -> bool:
    word = str(value).strip().lower()
    if word not in BOOLEANS:
        raise UsageError(f"{where} is {_shown(value)}; it must be true or false")
    return BOOLEANS[word]


def _convert_number(text: str, value_type: type, where: str) -> int | float:
    """A number in plain notation. Python also reads digits of other scripts, and leading zeros that were octal once."""
    text = text.strip()
    message = f"{where} is {_shown(text)}; it must be {DESCRIPTIONS[value_type]}"
    if not NOTATIONS[value_type].fullmatch(text):
        raise UsageError(message)
    try:
        number: int | float = value_type(text)
    except ValueError:  # misplaced underscores, or thousands of digits
        raise UsageError(message) from None
    if isinstance(number, float) and not math.isfinite(number):
        raise UsageError(f"{where} is {_shown(text)}; it must be a finite number")
    return number


def _convert_string(text: str, where: str, is_text: bool) -> str:
    if not text:  # as a host it would mean every address, as a path this folder
        raise UsageError(f"{where} is empty; give it a value or leave it out")
    if "\0" in text:
        raise UsageError(f"{where} has a NUL character; remove it")
    return convert_text(text, where) if is_text or is_s3(text) else _convert_path(text, where)


def convert_text(text: str, where: str) -> str:
    """A text from the command line, a variable or a file. Raises UsageError that names `where` if it is not Unicode."""
    try:
        return decode_text(text)
    except UnicodeError as error:
        raise UsageError(f"{where} is not UTF-8 text; write it in UTF-8") from error


def _convert_path(text: str, where: str) -> str:
    try:
        return decode_path(text)
    except UnicodeError as error:
        raise UsageError(f"{where} is {text!a}; it must be a path") from error


def _shown(value: Any) -> str:
    """A value for a message."""
    if value is None:
        return "null"
    text = str(value)
    return f"'{text}'" if len(text) <= MOST_SHOWN else f"'{text[:MOST_SHOWN]}...'"


def _is_union(value_type: Any) -> bool:
    """Whether the type is `X | None`. With a Literal for X, Python makes a `typing.Union` of it."""
    return typing.get_origin(value_type) in (types.UnionType, typing.Union)


def _without_none(value_type: Any) -> Any:
    """`X` for `X | None`."""
    return next(choice for choice in typing.get_args(value_type) if choice is not type(None))


def _metavar(value_type: Any) -> str:
    """What stands for a flag's value in the help text."""
    if _is_union(value_type):
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
