"""The YAML file of settings. Every value stays the text that is in the file, and is then converted as a flag's is.

YAML 1.1 itself would turn `1:30` into 90, `010` into 8, `no` into false and `2024-01-01` into a date, whatever the
setting expects, and keep the last of two equal keys in silence. Here a key that is given twice is an error. Of YAML's
own types only the mapping, the list and null are used; anchors, aliases and `<<` work.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from babybert.errors import UsageError, os_reason

FREE_PREFIX = "x-"  # of sections that are not read: a place for anchors
MERGE_KEY = "<<"
NULLS = ("", "~", "null", "Null", "NULL")
TEXT_TAG = "tag:yaml.org,2002:str"


def read_section(path: Path, command: str, commands: Collection[str]) -> dict[str, Any]:
    """The settings below `command:`: a text, a list of texts or None by name.

    Raises UsageError, also for a section whose name is none of `commands`.
    """
    root = _read_yaml(path)
    if _is_null(root):  # an empty file
        return {}
    expected = f"settings by name below '{command}:'"
    sections = _entries(path, root, expected)
    for name, node in sections.items():
        if name not in commands and not name.startswith(FREE_PREFIX):
            raise UsageError(f"{_place(path, node)}: '{name}' is no command; choose one of {', '.join(commands)}")
    section = sections.get(command)
    if _is_null(section):
        return {}
    return {name: _value(path, node) for name, node in _entries(path, section, expected).items()}


def _read_yaml(path: Path) -> yaml.Node | None:
    """The nodes of the file. Aliases refer to the node of their anchor, so nothing grows."""
    try:
        return yaml.compose(path.read_bytes().decode("utf-8"), yaml.BaseLoader)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {os_reason(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8: byte {error.start}") from error
    except RecursionError as error:
        raise UsageError(f"{path}: is not YAML: it is nested too deeply") from error
    # ValueError and OverflowError: an escape such as "\\Uffffffff" names no character.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: is not YAML: {reason}") from error


def _entries(path: Path, node: yaml.Node | None, expected: str) -> dict[str, yaml.Node]:
    """The values of a mapping by name. Its own entries win over those that `<<` merges into it."""
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path}: expected {expected}")
    entries: dict[str, yaml.Node] = {}
    merged: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or _is_null(key):
            raise UsageError(f"{_place(path, key)}: expected a name and ':'")
        if key.value == MERGE_KEY:
            merged = {**_merged_entries(path, value), **merged}
        elif key.value in entries:
            raise UsageError(f"{_place(path, key)}: '{key.value}' is given twice; remove one of them")
        else:
            entries[key.value] = value
    return {**merged, **entries}


def _merged_entries(path: Path, node: yaml.Node) -> dict[str, yaml.Node]:
    """The entries of the mapping, or of the list of mappings, behind `<<`; the first of the list wins."""
    entries: dict[str, yaml.Node] = {}
    for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if not isinstance(source, yaml.MappingNode) or any(key.value == MERGE_KEY for key, _ in source.value):
            raise UsageError(f"{_place(path, node)}: '<<' merges a mapping that has no '<<' itself")
        entries = {**_entries(path, source, "a mapping"), **entries}
    return entries


def _value(path: Path, node: yaml.Node) -> str | list[str] | None:
    if _is_null(node):
        return None
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for item in nodes:
        if not isinstance(item, yaml.ScalarNode) or (item is not node and _is_null(item)):
            raise UsageError(f"{_place(path, item)}: expected one value, or a list of values")
        if item.tag != TEXT_TAG:
            raise UsageError(f"{_place(path, item)}: the tag '{item.tag}' is not supported; write the value alone")
    texts = [item.value for item in nodes]
    return texts if isinstance(node, yaml.SequenceNode) else texts[0]


def _is_null(node: yaml.Node | None) -> bool:
    """Whether there is no value: none is written, or a null without quotes."""
    return node is None or (isinstance(node, yaml.ScalarNode) and not node.style and node.value in NULLS)


def _place(path: Path, node: yaml.Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}"
