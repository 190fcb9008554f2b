"""Texts of JSON files: one object per line (JSON Lines), or one array of objects. Neither is held in memory."""

import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any, cast

from babybert.corpus.files import (
    LONGEST_NAME_SHOWN,
    BadRows,
    decoded_chunks,
    decompressed,
    encoding_of,
    shown_names,
    shown_text,
    utf8_lines,
)
from babybert.corpus.s3_file import SourceFile
from babybert.errors import DataError

START_BYTES = 256  # in which the first character that is not white space is looked for
LONGEST_ESCAPE = 12  # characters: `\ud83d\ude00`
WHITE_SPACE = re.compile(r"\s*")
# An object becomes a tuple of pairs, so that a key that is there twice is noticed. Integers become floats, because
# Python refuses to convert very long ones.
DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_int=float)


def read_json_texts(path: SourceFile, file: IO[bytes], bad_rows: BadRows, key: str) -> Iterator[tuple[str, str]]:
    """Yield where each text under `key` is, for messages, and the text. Blank lines are skipped."""
    for where, pairs in read_json_objects(path, file, bad_rows):
        try:
            yield where, text_of_key(pairs, key, "--text-column")
        except ValueError as error:
            bad_rows.report(f"{where}: {error}")


def read_json_objects(
    path: SourceFile, file: IO[bytes], bad_rows: BadRows
) -> Iterator[tuple[str, tuple[tuple[str, Any], ...]]]:
    """Yield where each object of a file is, for messages, and its keys with their values. Numbers are floats."""
    content = decompressed(path, file)
    encoding = encoding_of(content)
    start: bytes = cast(Any, content).peek(START_BYTES)[:START_BYTES]
    is_array = start.decode(encoding, "ignore").lstrip().startswith("[")
    values = _read_array(path, content, encoding) if is_array else read_json_lines(path, content, bad_rows)
    for where, value in values:
        if isinstance(value, tuple):
            yield where, value
        else:
            bad_rows.report(f"{where}: not a JSON object")


def value_of_key(pairs: tuple[tuple[str, Any], ...], key: str, flag: str) -> Any:
    """The value of `key` in an object. Raises ValueError if it is not there once; `flag` names another key."""
    values = [value for name, value in pairs if name == key]
    if not values:
        names = shown_names([name for name, _ in pairs])
        raise ValueError(f"no key '{key}'; it has {names or 'none'}; choose one with {flag}")
    if len(values) > 1:
        raise ValueError(f"has the key '{key}' {len(values)} times")
    return values[0]


def text_of_key(pairs: tuple[tuple[str, Any], ...], key: str, flag: str) -> str:
    """The text under `key`. Raises ValueError as `value_of_key` does, and for another value than a string."""
    value = value_of_key(pairs, key, flag)
    if not isinstance(value, str):
        raise ValueError(f"'{key}' is not a string")
    return value


def read_json_lines(name: SourceFile | str, content: io.BufferedIOBase, bad_rows: BadRows) -> Iterator[tuple[str, Any]]:
    """Yield where each line is, for messages, and its value. Blank lines are skipped; an object is a tuple of pairs."""
    for line_number, line in enumerate(utf8_lines(content), 1):
        where = f"{name}: line {line_number}"
        try:
            text = line.decode().strip()
            value = DECODER.decode(text) if text else None
        except UnicodeDecodeError as error:
            bad_rows.report(f"{where}: byte {error.start} of the line is not UTF-8")
        except (ValueError, RecursionError) as error:
            bad_rows.report(f"{where}: not JSON: {_explain(error)}; each line must be an object")
        else:
            if text:
                yield where, value


def _read_array(path: SourceFile, content: io.BufferedIOBase, encoding: str) -> Iterator[tuple[str, Any]]:
    """Yield the elements of an array that is all that is in the file."""
    array = _ArrayText(decoded_chunks(content, encoding))
    array.take()  # the bracket
    number = 0
    while array.next_character() and (number or array.next_character() != "]"):
        number += 1
        where = f"{path}: element {number} of the array"
        try:
            value = array.value()
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {_explain(error)}") from error
        yield where, value
        if array.next_character() != ",":
            break
        array.take()
    if array.take() != "]":
        raise DataError(f"{path}: not JSON: element {number} of the array is not followed by a comma or ]")
    if array.next_character():
        raise DataError(f"{path}: not JSON: has text after the end of the array")


class _ArrayText:
    """A position in a text that is read in chunks. Memory holds one chunk, or one value if that is longer."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self._buffer = ""
        self._position = 0

    def next_character(self) -> str:
        """Skip white space and return the next character, without taking it; an empty text at the end."""
        while True:
            white_space = WHITE_SPACE.match(self._buffer, self._position)
            assert white_space  # it may be empty
            self._position = white_space.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read():
                return ""

    def take(self) -> str:
        """Skip white space, and take the next character."""
        character = self.next_character()
        self._position += len(character)
        return character

    def value(self) -> Any:
        """Take a JSON value. Raises JSONDecodeError if there is none, RecursionError if it is nested too deeply."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._buffer, self._position)
                length = end - self._position
                # At the end of the buffer, the value may go on: 1 may be the start of 12.
                if end < len(self._buffer) or not self._read():
                    self._position += length
                    return value
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - LONGEST_ESCAPE
                if not (is_cut and self._read()):
                    raise

    def _read(self) -> bool:
        """Double what is left of the buffer, so that no value is parsed too often. Return False at the end."""
        rest = self._buffer[self._position :]
        chunks = [rest]
        wanted = 2 * len(rest) + 1
        while sum(map(len, chunks)) < wanted and (chunk := next(self._chunks, "")):
            chunks.append(chunk)
        self._buffer = "".join(chunks)
        self._position = 0
        return len(self._buffer) > len(rest)


def _explain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else shown_text(str(error), LONGEST_NAME_SHOWN)
