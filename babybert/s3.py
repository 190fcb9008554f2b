"""S3 as this project uses it: one client, `s3://bucket/key` addresses, and a few requests.

boto3 finds credentials, region and endpoint in the standard AWS ways (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`,
`~/.aws/config`, roles of a cluster), so the project has no settings for them. The functions that send requests raise
boto3's exceptions; call them inside `s3_errors.s3_errors`.
"""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from babybert.errors import UsageError, UserError
from babybert.s3_errors import error_code, s3_errors

SCHEME = "s3://"
TIMEOUT_VARIABLE = "BABYBERT_S3_TIMEOUT"
DEFAULT_TIMEOUT = "20"  # seconds, for a server that accepts a connection and never answers
LONGEST_TIMEOUT = 1_000_000  # seconds; timers of the operating system end at much more
BUCKET_NAME = re.compile(r"[a-zA-Z0-9.\-_]{1,255}")  # as botocore has it; the servers' own rules are stricter
LARGE_COPY_BYTES = 1 << 28  # copied in parts of this size, because a server may take long for a single one
# What S3 and compatible servers answer when the condition of a write does not hold.
CONDITION_FAILED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409", "404", "NoSuchKey")


def is_s3(address: str) -> bool:
    """Whether `address` is an S3 address."""
    return address.startswith(SCHEME)


def split_address(address: str) -> tuple[str, str]:
    """Bucket and key (or prefix) of `s3://bucket/key`. Raises UsageError when there is no valid bucket name."""
    bucket, _, key = address.removeprefix(SCHEME).partition("/")
    if not is_s3(address) or not bucket:
        raise UsageError(f"{address}: not an S3 address; it must look like s3://bucket/key")
    if not BUCKET_NAME.fullmatch(bucket):
        raise UsageError(
            f"{address}: '{bucket}' is not a bucket name; it may contain letters, digits, hyphens, dots and underscores"
        )
    return bucket, key


def make_client() -> Any:
    """A boto3 client that retries temporary errors. Raises UsageError when its settings are incomplete or wrong.

    Keys of a role are fetched here for the first time; boto3 renews them. Raises StorageError if that fails.
    """
    import boto3  # takes a quarter of a second, which only users of S3 should pay
    from botocore.config import Config

    seconds = _timeout()
    config = Config(
        retries={"mode": "standard", "max_attempts": 3}, connect_timeout=min(seconds, 5.0), read_timeout=seconds
    )
    try:
        with s3_errors("S3"):
            session = boto3.Session()
            _check_credentials(session.get_credentials())
            return session.client("s3", config=config)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(f"S3: {error}; correct the AWS variables or ~/.aws/config") from error


def shared_client() -> Any:
    """The client of this process, for many small pieces of work; another one if the settings have changed meanwhile."""
    settings = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", TIMEOUT_VARIABLE))}
    return _shared_client(tuple(sorted(settings.items())))


@functools.lru_cache(maxsize=1)
def _shared_client(settings: tuple[tuple[str, str], ...]) -> Any:
    return make_client()


def _check_credentials(credentials: Any) -> None:
    """Raise UsageError for keys with a line break, as a Secret made of the output of `echo` has. None is no error here.

    S3 would answer that the signature is wrong, or the request could not be sent at all.
    """
    keys = credentials.get_frozen_credentials() if credentials else ()
    if any(key and key != key.strip() for key in keys):
        raise UsageError("S3: the AWS credentials begin or end with a blank or a line break; remove it")


def _timeout() -> float:
    """Seconds to wait for a server that accepts a connection and never answers. Raises UsageError."""
    text = os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise UsageError(f"{TIMEOUT_VARIABLE} is '{text}'; it must be seconds, above 0 and at most {LONGEST_TIMEOUT:,}")
    return seconds


def list_keys(client: Any, bucket: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Key and size in bytes of each object below a prefix; see `list_objects`."""
    for key, size, _ in list_objects(client, bucket, prefix):
        yield key, size


def list_objects(client: Any, bucket: str, prefix: str) -> Iterator[tuple[str, int, str]]:
    """Key, size in bytes and ETag (without quotation marks) of each object below a prefix, in the order of the keys.

    Raises UsageError if the answer is not a listing: boto3 takes a web page for an empty one.
    """
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        if "Name" not in page and "IsTruncated" not in page:
            raise UsageError(f"s3://{bucket}/{prefix}: the answer is not from an S3 server; correct AWS_ENDPOINT_URL")
        for entry in page.get("Contents", []):
            yield entry["Key"], entry["Size"], entry.get("ETag", "").strip('"')


def list_uploads(client: Any, bucket: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Key and id of each upload in parts below a prefix that was neither completed nor aborted."""
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
        for upload in page.get("Uploads", []):
            yield upload["Key"], upload["UploadId"]


def object_status(client: Any, bucket: str, key: str) -> tuple[int, str]:
    """Size in bytes and ETag (without quotation marks) of an object."""
    response = client.head_object(Bucket=bucket, Key=key)
    return response["ContentLength"], response.get("ETag", "").strip('"')


def upload_file(client: Any, path: Path, bucket: str, key: str) -> None:
    """Upload a file. It appears complete or not at all. Raises OSError if it cannot be read."""
    client.upload_file(str(path), bucket, key)


def download_file(client: Any, bucket: str, key: str, file: IO[bytes]) -> None:
    """Download an object into an open file. Raises OSError if it cannot be written."""
    client.download_fileobj(bucket, key, file)


def copy_object(client: Any, bucket: str, source: str, target: str, etag: str) -> None:
    """Copy an object inside a bucket, on the server, if it has this ETag. It appears complete or not at all."""
    from boto3.s3.transfer import TransferConfig

    config = TransferConfig(
        multipart_threshold=LARGE_COPY_BYTES, multipart_chunksize=LARGE_COPY_BYTES, use_threads=False
    )
    client.copy({"Bucket": bucket, "Key": source}, bucket, target, {"CopySourceIfMatch": f'"{etag}"'}, Config=config)


def get_if_exists(client: Any, bucket: str, key: str) -> tuple[str, bytes] | None:
    """ETag and content of an object; None if there is none."""
    from botocore.exceptions import ClientError

    try:
        response = client.get_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error_code(error) in ("NoSuchKey", "404"):
            return None
        raise
    return response.get("ETag", ""), response["Body"].read()


def put_if(client: Any, bucket: str, key: str, body: bytes, **condition: str) -> str | None:
    """Write an object if `condition` (`IfNoneMatch` or `IfMatch`) holds. Returns its ETag, or None if it does not."""
    from botocore.exceptions import ClientError

    try:
        response = client.put_object(Bucket=bucket, Key=key, Body=body, **condition)
    except ClientError as error:
        if error_code(error) in CONDITION_FAILED:
            return None
        raise
    return str(response.get("ETag", ""))
