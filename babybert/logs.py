"""Logging of the `babybert` command: plain lines on standard error.

Modules log through `logging.getLogger(__name__)`. As a library, BabyBERT leaves the configuration of logging to the
program that imports it. The command line calls `configure_logging`, so that results on standard output can be piped.
"""

import logging
import sys
from typing import TextIO

LOGGER_NAME = "babybert"


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is when a record arrives: tests and redirections replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _PlainFormatter(logging.Formatter):
    """The message alone; warnings and errors are prefixed with their level."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"


def configure_logging() -> None:
    """Send messages of level INFO and above to standard error. Calling it again changes nothing."""
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # some libraries, such as TorchServe's archiver, give the root logger a handler
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setFormatter(_PlainFormatter())
        logger.addHandler(handler)
