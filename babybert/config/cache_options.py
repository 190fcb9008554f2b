"""Settings for data in S3, shared by the commands that read datasets."""

from dataclasses import dataclass
from pathlib import Path

from babybert.config.fields import option, require_at_least
from babybert.s3 import is_s3, split_address

DATA_HELP = "folder or s3:// address that `babybert prepare` wrote"


@dataclass(frozen=True)
class CacheOptions:
    """Where data from S3 is kept on this machine."""

    cache: Path | None = option(
        None, "folder for data from S3, shared by all processes; none: babybert/datasets in XDG_CACHE_HOME or ~/.cache"
    )
    cache_gb: int = option(
        200, "how large this folder may become, in GB; data that was not used for the longest time is deleted first"
    )

    def check_cache(self) -> None:
        """Raise UsageError for a cache that can hold nothing."""
        require_at_least(self, 1, "cache_gb")


def check_address(data: Path | str) -> None:
    """Raise UsageError for an S3 address without a valid bucket."""
    if is_s3(str(data)):
        split_address(str(data))
