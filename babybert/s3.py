"""S3 as this project uses it: one client, `s3://bucket/key` addresses, and errors that users can act on.

boto3 finds credentials, region and endpoint in the standard AWS ways (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`,
`~/.aws/config`, roles of a cluster), so the project has no settings for them.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from babybert.errors import DataError, StorageError, UsageError

SCHEME = "s3://"
TIMEOUT_VARIABLE = "BABYBERT_S3_TIMEOUT"
LONGEST_TIMEOUT = 1_000_000  # seconds; timers of the operating system end at much more
MISSING = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
DENIED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")


def is_s3(address: str) -> bool:
    """Whether `address` is an S3 address."""
    return address.startswith(SCHEME)


def split_address(address: str) -> tuple[str, str]:
    """Bucket and key (or prefix) of `s3://bucket/key`. Raises UsageError when there is no bucket."""
    bucket, _, key = address.removeprefix(SCHEME).partition("/")
    if not is_s3(address) or not bucket:
        raise UsageError(f"{address}: not an S3 address; it must look like s3://bucket/key")
    return bucket, key


def make_client() -> Any:
    """A boto3 client that retries temporary errors. Raises UsageError when its configuration is incomplete."""
    import boto3  # takes a quarter of a second, which only users of S3 should pay
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    seconds = _timeout()
    try:
        config = Config(
            retries={"mode": "standard", "max_attempts": 3},
            connect_timeout=min(seconds, 5.0),
            read_timeout=seconds,
        )
        return boto3.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise UsageError(f"S3: {error}; set the AWS variables or ~/.aws/config") from error


def _timeout() -> float:
    """Seconds to wait for a server that accepts a connection and never answers. Raises UsageError."""
    text = os.environ.get(TIMEOUT_VARIABLE, "20")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise UsageError(f"{TIMEOUT_VARIABLE} is '{text}'; it must be seconds, above 0 and at most {LONGEST_TIMEOUT:,}")
    return seconds


@contextlib.contextmanager
def s3_errors(address: str) -> Iterator[None]:
    """Turn boto3's errors into ours: missing is DataError, denied is UsageError, the rest is StorageError."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in MISSING:
            raise DataError(f"{address}: no such object or bucket") from error
        if code in DENIED:
            raise UsageError(
                f"{address}: access denied ({code}); check the AWS credentials and the bucket's policy"
            ) from error
        raise StorageError(f"{address}: S3 answered {code}: {error}; try again") from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise UsageError(
            f"{address}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        ) from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(f"{address}: {error}; check the endpoint and try again") from error


def list_keys(client: Any, bucket: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Key and size in bytes of each object below a prefix, in the order of the keys."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", []):
            yield entry["Key"], entry["Size"]
