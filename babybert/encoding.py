"""Texts and paths in every locale: what Python could not decode comes in readable, and what cannot be encoded goes out.

On Linux a path is any bytes. Python decodes paths, arguments and variables with the locale's encoding and turns each
byte that does not fit into a lone surrogate (PEP 383). With `LC_ALL=C` this happens to every letter outside ASCII.
"""

import codecs
import io
import os
import sys

HANDLER = "babybert-escape"


def decode_text(text: str) -> str:
    """The UTF-8 text of an argument. Raises UnicodeError for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8")


def decode_path(text: str) -> str:
    """A path from an argument or a file, in the form in which this locale's Python opens it. Raises UnicodeError."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def printable(text: str) -> str:
    """A path as valid Unicode: bytes that are not UTF-8 are shown as `\\xe9`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def escape_unencodable_output() -> None:
    """Let standard output and standard error print every text.

    What the encoding of the terminal lacks is printed as `\\u2014`, and a byte of a path that is not text as that byte.
    """
    codecs.register_error(HANDLER, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of `codecs`: what replaces the first character that cannot be encoded, and where to go on.

    A stream may be one that others read as well, as pytest does. Bytes that cannot be decoded are shown as `\\xe9`.
    """
    if not isinstance(error, UnicodeEncodeError):
        return codecs.backslashreplace_errors(error)
    character = error.object[error.start]
    end = error.start + 1
    if "\udc80" <= character <= "\udcff":
        return character.encode("ascii", "surrogateescape"), end
    return character.encode("ascii", "backslashreplace"), end
