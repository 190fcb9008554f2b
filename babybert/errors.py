"""The errors that are meant for people, and the exit code each one ends a command with.

Exit codes are an interface: a Kubernetes Job decides by them whether to try again. A wrong setting (2) or wrong
data (3) stays wrong however often it is retried; anything else (1) may be passing. `cli.main` prints these errors
as one line; every other exception is a defect of ours and keeps its traceback.
"""

import errno

EXIT_CRASH = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """Something the user can put right; the message says what is wrong, where, and what to do."""

    exit_code = EXIT_CRASH


class UsageError(UserError):
    """A bad flag, setting, or combination of them."""

    exit_code = EXIT_USAGE


class DataError(UserError):
    """A file, row or archive that is missing, broken, or not what it should be."""

    exit_code = EXIT_DATA


class StorageError(UserError):
    """A disk that is full or fails: worth another try, unlike the two above."""

    exit_code = EXIT_CRASH


def cannot_write(message: str, error: OSError) -> UserError:
    """StorageError, which is worth another try, or UsageError where the folder is refused for good (permissions, a read-only disk)."""
    refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return (UsageError if refused else StorageError)(message)
