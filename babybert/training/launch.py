"""torchrun that ends with the exit code of its processes: `python -m babybert.training.launch`, with torchrun's flags.

torchrun itself ends with 1 whatever its processes end with. A scheduler could then not tell a wrong setting (2), wrong
data (3) and a stopped run that has saved (143) from a crash (1).
"""

import signal
import sys
import time
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from babybert.errors import EXIT_DATA, EXIT_INTERRUPTED, EXIT_USAGE

REASONS = (EXIT_USAGE, EXIT_DATA, EXIT_INTERRUPTED, 128 + signal.SIGTERM)
# If one process ends with a reason, those on other nodes crash because they lost it. Its node must be the first to end.
SECONDS_BEFORE_CRASH = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with these arguments (default: the command line's); returns the exit code of the first failure."""
    try:
        run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # negative: a signal's number
        print(f"babybert launch: rank {rank} ended with exit code {code}", file=sys.stderr)
    except SignalException as received:
        code = 128 + received.sigval
    else:
        return 0
    if code not in REASONS:
        time.sleep(SECONDS_BEFORE_CRASH)
    return code


if __name__ == "__main__":
    sys.exit(main())
