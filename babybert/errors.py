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


class UserError(ValueError):
    """Something the user can fix. The message says what is wrong, where, and what to do."""

    exit_code = EXIT_CRASH


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


def cannot_write(message: str, error: OSError) -> UserError:
    """UsageError if access is denied for good (permissions, a read-only disk), else StorageError."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(message)
    return StorageError(message)
