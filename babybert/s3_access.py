"""Tries once everything that a job does in S3, before its work.

A right that is missing, or a server that cannot do what is needed, then ends the job at once with exit code 2, and not
after hours of work. The probe has a name like what the job writes, so that a policy for these names applies to it.
"""

import contextlib
import uuid
from collections.abc import Callable
from typing import Any

from babybert.errors import UsageError, UserError
from babybert.s3 import get_if_exists, list_keys, put_if
from babybert.s3_errors import s3_errors

Action = tuple[str, str, Callable[[], Any]]  # what is done, the right that it needs, and how
PROBE = "check-"
ANOTHER_ETAG = '"00000000000000000000000000000000"'  # of no object


def check_access(client: Any, bucket: str, prefix: str, address: str, copy_to: str | None = None) -> None:
    """Raise UsageError, DataError or StorageError for the first thing that cannot be done, naming the right it needs.

    Args:
        client: a boto3 client.
        bucket: the bucket.
        prefix: what the keys begin with that the job writes.
        address: where the job writes, for messages.
        copy_to: what the keys begin with to which the job copies objects; None if it does not.
    """
    probe = f"{prefix}{PROBE}{uuid.uuid4().hex}"
    actions: tuple[Action, ...] = (
        ("list", "s3:ListBucket", lambda: next(list_keys(client, bucket, prefix), None)),
        ("write", "s3:PutObject", lambda: client.put_object(Bucket=bucket, Key=probe, Body=b"")),
        ("read", "s3:GetObject", lambda: client.get_object(Bucket=bucket, Key=probe)["Body"].read()),
        # Without the right to list the bucket, S3 answers 403 for a missing object instead of 404. A policy that allows
        # to list some prefixes only has this effect, too.
        (
            "look for a missing object",
            "s3:ListBucket",
            lambda: get_if_exists(client, bucket, f"{probe}-missing"),
        ),
        ("write on a condition", "s3:PutObject", lambda: _check_conditions(client, bucket, probe, address)),
        ("upload in parts", "s3:PutObject", lambda: _upload_in_parts(client, bucket, probe)),
        ("abort an upload", "s3:AbortMultipartUpload", lambda: _abort_upload(client, bucket, probe)),
        ("delete", "s3:DeleteObject", lambda: client.delete_object(Bucket=bucket, Key=probe)),
    )
    if copy_to is not None:
        actions = (*actions[:-1], *_copy_actions(client, bucket, probe, copy_to), actions[-1])
    try:
        for action, right, call in actions:
            with s3_errors(f"{address}: cannot {action} there", right):
                call()
    except UserError:
        with contextlib.suppress(UserError), s3_errors(address):
            client.delete_object(Bucket=bucket, Key=probe)
        raise


def is_probe(name: str) -> bool:
    """Whether an object is what a job tries its access with."""
    return name.rpartition("/")[2].startswith(PROBE)


def _copy_actions(client: Any, bucket: str, probe: str, copy_to: str) -> tuple[Action, ...]:
    copy = f"{copy_to}{PROBE}{uuid.uuid4().hex}"
    source = {"Bucket": bucket, "Key": probe}
    return (
        ("copy", "s3:PutObject", lambda: client.copy_object(Bucket=bucket, Key=copy, CopySource=source)),
        ("delete", "s3:DeleteObject", lambda: client.delete_object(Bucket=bucket, Key=copy)),
    )


def _check_conditions(client: Any, bucket: str, probe: str, address: str) -> None:
    """Both conditions are false. A server that does not know them writes nevertheless."""
    for condition in ({"IfNoneMatch": "*"}, {"IfMatch": ANOTHER_ETAG}):
        if put_if(client, bucket, probe, b"", **condition) is not None:
            raise UsageError(
                f"{address}: the S3 server ignores conditions of a write ({', '.join(condition)}), which keep two jobs "
                "apart; use a server with conditional writes"
            )


def _upload_in_parts(client: Any, bucket: str, probe: str) -> None:
    upload = client.create_multipart_upload(Bucket=bucket, Key=probe)["UploadId"]
    part = client.upload_part(Bucket=bucket, Key=probe, UploadId=upload, PartNumber=1, Body=b"x")
    client.complete_multipart_upload(
        Bucket=bucket,
        Key=probe,
        UploadId=upload,
        MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
    )


def _abort_upload(client: Any, bucket: str, probe: str) -> None:
    upload = client.create_multipart_upload(Bucket=bucket, Key=probe)["UploadId"]
    client.abort_multipart_upload(Bucket=bucket, Key=probe, UploadId=upload)
