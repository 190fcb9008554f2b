"""Checks of the values in a request body. An error is one line: what is wrong, what was sent, and what the limit is."""

import json
from typing import Any

from babybert.errors import UsageError

MAX_CHARACTERS = 10_000  # of one text or sentence; 512 tokens of English are about 2,500 characters
MAX_QUOTED_CHARACTERS = 60  # of a value from the request that an error message repeats


def load_json(body: bytes | str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or Infinity."""
    try:
        text = body if isinstance(body, str) else body.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UsageError(f"the body is not JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise UsageError("the body is not JSON that can be read: it is nested too deeply") from None
    except UsageError:
        raise
    except ValueError:  # Python limits the number of digits of an integer (sys.get_int_max_str_digits)
        raise UsageError("the body is not JSON that can be read: a number in it has too many digits") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise UsageError(f"the key {quoted(duplicate)} is there more than once")
    return result


def _refuse_constant(name: str) -> Any:
    raise UsageError(f"the body is not JSON: {name} is not a number in JSON")


def require_keys(
    body: dict[str, Any], required: tuple[str, ...], optional: tuple[str, ...], intro: str = "this task takes"
) -> None:
    """Refuse unknown and missing keys; `intro` begins the part of the message that lists the valid keys."""
    valid_keys = (*required, *optional)
    for key in body:
        if key not in valid_keys:
            raise UsageError(f"unknown key {quoted(key)}; {intro} {', '.join(valid_keys)}")
    for key in required:
        if key not in body:
            raise UsageError(f"'{key}' is missing; {intro} {', '.join(valid_keys)}")


def require_list(name: str, value: Any, max_length: int) -> Any:
    """`value`, if it is a list of 1 to `max_length` elements."""
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"'{name}' must be a list, not {json_type(value)}")
    if not value:
        raise UsageError(f"'{name}' is an empty list")
    if len(value) > max_length:
        raise UsageError(f"'{name}' is a list of {len(value):,}; at most {max_length} are answered in one request")
    return value


def require_text(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is a text that can be tokenized: not empty, not too long, and valid Unicode."""
    if not isinstance(value, str):
        raise UsageError(f"'{name}' must be a string, not {json_type(value)}")
    if not value or value.isspace():
        raise UsageError(f"'{name}' is empty")
    if len(value) > MAX_CHARACTERS:
        raise UsageError(f"'{name}' is {len(value):,} characters long; at most {MAX_CHARACTERS:,} are read")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"'{name}' has half of a surrogate pair, which is not a character") from None


def require_flag(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise UsageError(f"'{name}' must be true or false, not {json_type(value)}")


def quoted(value: Any) -> str:
    """A value from a request for an error message: shortened, and with unpaired surrogates escaped."""
    if isinstance(value, str):
        text = repr(value)
    elif value is None or isinstance(value, (bool, int, float)):
        text = json.dumps(value)
    else:
        text = json_type(value)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}..."


def json_type(value: Any) -> str:
    """What the type of a value is called in an error message."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), "that")
