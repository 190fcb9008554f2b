"""The errors that are meant for users, and the exit code that each ends a command with.

Exit codes are an interface: a Kubernetes Job decides by them whether to retry. A wrong setting (2) or wrong data (3)
stays wrong however often it is retried. Anything else (1) may be temporary. `cli.main` prints these errors as one line.
Every other exception is a bug and keeps its traceback.
"""

import errno

EXIT_CRASH = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_INTERRUPTED = 130


def one_line(text: str) -> str:
    """Return a text with all characters escaped that would break a line, or that a terminal would obey.

    Bytes of a path that are not text (lone surrogates, PEP 383) stay: standard error knows how to show them.
    """
    return "".join(
        character
        if character.isprintable() or "\udc80" <= character <= "\udcff"
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


class UserError(ValueError):
    """Something the user can fix. The message says what is wrong, where, and what to do.

    As text it is one line: line breaks and control characters, of a file's name for example, are escaped.
    """

    exit_code = EXIT_CRASH

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(UserError):
    """A wrong flag or setting, or a wrong combination of them."""

    exit_code = EXIT_USAGE


class DataError(UserError):
    """A file, row or archive that is missing, corrupt or of the wrong kind."""

    exit_code = EXIT_DATA


class NoCheckpoint(DataError):
    """A run that has no valid checkpoint, perhaps because it has just begun."""


class StorageError(UserError):
    """A disk or server that is full or fails. Unlike with the two above, a retry may help."""

    exit_code = EXIT_CRASH


FULL = (errno.ENOSPC, errno.EDQUOT)
# No access, or no possible path, whatever is done with it.
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG)
# A place that cannot be written, however often it is tried: denied, or below a file, or not a folder.
REFUSED = (*DENIED, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def cannot_write(message: str, error: OSError) -> UserError:
    """UsageError if another place has to be chosen (read-only, below a file), else StorageError (a full disk)."""
    return UsageError(message) if error.errno in REFUSED else StorageError(message)


def os_reason(error: OSError) -> str:
    """Why the operating system refused, in one line. `error.strerror` is None if a library made the error."""
    return error.strerror or " ".join(str(error).split()) or type(error).__name__
