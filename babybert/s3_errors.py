"""What an error of S3 means for users: the exception of ours that it becomes, and what to change.

`s3_errors` is the only place that decides this. The exit codes follow from the class (see `errors.py`): UsageError (2)
for what stays wrong until somebody changes a setting, a key or a policy; DataError (3) for what does not exist;
StorageError (1) for what a retry may fix, which includes every code that is not listed here.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from babybert.errors import DataError, StorageError, UsageError, UserError

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

# Of a TLS connection that cannot be made with these settings. The last one is about AWS_CA_BUNDLE.
WRONG_TLS_SETTING = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "No such file")
MAX_MESSAGE_CHARACTERS = 300  # of the server's explanation, which can be a page of HTML


@dataclass(frozen=True)
class Meaning:
    """What an error means.

    Attributes:
        error_class: the exception that it becomes.
        problem: what is wrong.
        advice: what to do.
    """

    error_class: type[UserError]
    problem: str
    advice: str


DENIED = Meaning(UsageError, "access denied", "check the AWS credentials and the bucket's policy")
BAD_KEY = Meaning(
    UsageError,
    "access denied",
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile or role",
)
EXPIRED = Meaning(UsageError, "the AWS credentials have expired", "get new ones and start again")
WRONG_CLOCK = Meaning(UsageError, "the clock of this machine differs from the server's", "set it")
WRONG_REGION = Meaning(
    UsageError, "the bucket is in another region", "set AWS_DEFAULT_REGION and AWS_ENDPOINT_URL to the bucket's"
)
BAD_REQUEST = Meaning(
    UsageError, "S3 refuses the request", "check the address, the credentials, the region and AWS_ENDPOINT_URL"
)
ACCOUNT = Meaning(UsageError, "the account may not use S3", "ask its owner or the provider")
UNSUPPORTED = Meaning(
    UsageError,
    "the S3 server does not support this request",
    "use a server with conditional writes (If-None-Match, If-Match) and multipart uploads",
)
ENCRYPTION_KEY = Meaning(
    UsageError, "the bucket's encryption key cannot be used", "check the key and the right to use it"
)
ARCHIVED = Meaning(
    UsageError,
    "the object is in an archive class (such as Glacier)",
    "restore it, and exclude it from the lifecycle rule",
)
TOO_LARGE = Meaning(UsageError, "the object is larger than the server accepts", "raise its limit or use another server")
MISSING = Meaning(DataError, "no such object or bucket", "check the address")
FULL = Meaning(StorageError, "the bucket is full", "make room or raise the quota, and start again")
TEMPORARY = Meaning(StorageError, "S3 failed", "try again")

# Errors of S3, of compatible servers, and of STS, which exchanges a role for keys.
BY_CODE: dict[str, Meaning] = {
    **dict.fromkeys(("AccessDenied", "AccessDeniedException", "UnauthorizedAccess"), DENIED),
    **dict.fromkeys(
        (
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
            "InvalidToken",
            "InvalidClientTokenId",
            "InvalidIdentityToken",
            "InvalidSecurity",
            "UnrecognizedClientException",
            "CredentialsNotSupported",
            "MissingSecurityHeader",
        ),
        BAD_KEY,
    ),
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"), EXPIRED),
    **dict.fromkeys(("RequestTimeTooSkewed", "RequestExpired"), WRONG_CLOCK),
    **dict.fromkeys(
        ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"), WRONG_REGION
    ),
    # 400 is all that the answer to a HEAD request says.
    **dict.fromkeys(("InvalidBucketName", "InvalidURI", "KeyTooLongError"), BAD_REQUEST),
    **dict.fromkeys(("400", "BadRequest", "InvalidRequest", "InvalidArgument"), BAD_REQUEST),
    **dict.fromkeys(
        ("AccountProblem", "AllAccessDisabled", "NotSignedUp", "InvalidPayer", "UserSuspended", "OptInRequired"),
        ACCOUNT,
    ),
    **dict.fromkeys(("MethodNotAllowed", "NotImplemented", "XNotImplemented"), UNSUPPORTED),
    "InvalidObjectState": ARCHIVED,
    **dict.fromkeys(("EntityTooLarge", "MaxMessageLengthExceeded"), TOO_LARGE),
    **dict.fromkeys(("NoSuchKey", "NoSuchBucket", "NotFound"), MISSING),
    **dict.fromkeys(
        (
            "QuotaExceeded",
            "BucketQuotaExceeded",
            "XMinioAdminBucketQuotaExceeded",
            "XMinioStorageFull",
            "InsufficientStorage",
            "InsufficientCapacity",
        ),
        FULL,
    ),
}
# For other codes, and for HEAD requests, whose answers have no code.
BY_STATUS = {
    301: WRONG_REGION,
    401: DENIED,
    403: DENIED,
    404: MISSING,
    405: UNSUPPORTED,
    413: TOO_LARGE,
    501: UNSUPPORTED,
    507: FULL,
}
# The IAM action that allows an operation.
RIGHTS = {
    "ListObjectsV2": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "AssumeRole": "sts:AssumeRole",
    "AssumeRoleWithWebIdentity": "sts:AssumeRoleWithWebIdentity",
}


@contextlib.contextmanager
def s3_errors(address: str, right: str = "") -> Iterator[None]:
    """Turn errors of boto3 into ours. `right` is the IAM action to name if access is denied; by default, the request's.

    Other exceptions pass, also OSErrors of local files.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from s3transfer.exceptions import S3DownloadFailedError, S3ValidationError

    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error, ResponseParserError) as error:
        raise user_error(address, error, right) from error
    except RecursionError as error:
        raise _error_of_endless_redirect(address) from error
    except (S3DownloadFailedError, S3ValidationError) as error:  # the object changed while it was downloaded
        raise StorageError(f"{address}: {_one_line(error)}; try again") from error


def error_code(error: "ClientError") -> str:
    """The error code of S3; for a HEAD request the HTTP status."""
    return str(error.response.get("Error", {}).get("Code") or "")


def user_error(address: str, error: Exception, right: str = "") -> UserError:
    """The exception of ours for an exception of boto3."""
    from boto3.exceptions import RetriesExceededError, S3UploadFailedError
    from botocore.exceptions import ClientError

    cause: Any = error
    # Where the stack ends is a matter of chance. botocore reports what ends inside of a request as an error of it.
    if isinstance(getattr(error, "kwargs", {}).get("error"), RecursionError):
        return _error_of_endless_redirect(address)
    if isinstance(error, RetriesExceededError):
        cause = error.last_exception
    elif isinstance(error, S3UploadFailedError) and error.__context__:
        cause = error.__context__
    if isinstance(cause, ClientError):
        return _error_of_answer(address, cause, right)
    meaning = _meaning_of_exception(cause)
    return meaning.error_class(f"{address}: {_one_line(cause)}; {meaning.advice}")


def _error_of_endless_redirect(address: str) -> UsageError:
    """botocore asks a server that redirects everything for the bucket's region, forever."""
    return UsageError(f"{address}: {WRONG_REGION.problem} or at another endpoint; {WRONG_REGION.advice}")


def _error_of_answer(address: str, error: "ClientError", right: str) -> UserError:
    code = error_code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    meaning = meaning_of(code, status)
    advice = meaning.advice
    right = right or RIGHTS.get(error.operation_name, "")
    if meaning is DENIED and right:
        advice = f"the credentials need the right {right} there"
    message = _one_line(error.response.get("Error", {}).get("Message") or "")
    answer = ": ".join(part for part in (code or f"HTTP status {status}", message) if part)
    return meaning.error_class(f"{address}: {meaning.problem} ({answer}); {advice}")


def meaning_of(code: str, status: int) -> Meaning:
    """What an error code means; a code that is not listed, by its HTTP status."""
    if code.startswith("KMS.") and status < 500 and "Throttling" not in code:
        return ENCRYPTION_KEY
    return BY_CODE.get(code) or BY_STATUS.get(status, TEMPORARY)


def _meaning_of_exception(error: Exception) -> Meaning:
    """What an exception of boto3 means that is not an answer of the server."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    network = (exceptions.HTTPClientError, exceptions.ConnectionError)
    credentials = (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.NoAuthTokenError)
    login = (exceptions.SSOError, exceptions.TokenRetrievalError, exceptions.RefreshWithMFAUnsupportedError)
    credential_service = (exceptions.CredentialRetrievalError, exceptions.MetadataRetrievalError)
    damaged = (exceptions.IncompleteReadError, exceptions.ChecksumError, exceptions.FlexibleChecksumError, Boto3Error)
    if isinstance(error, network) and _is_wrong_setting(error):
        return Meaning(UsageError, "", "check AWS_ENDPOINT_URL, AWS_CA_BUNDLE and HTTPS_PROXY")
    if isinstance(error, network):
        return Meaning(StorageError, "", "check the endpoint and try again")
    if isinstance(error, credentials):
        return Meaning(UsageError, "", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role")
    if isinstance(error, login):
        return Meaning(UsageError, "", "log in again")
    if isinstance(error, credential_service):  # it may be away for a moment, for example while a node starts
        return Meaning(StorageError, "", "check the role or credential process and try again")
    if isinstance(error, damaged):
        return Meaning(StorageError, "", "try again")
    if isinstance(error, ResponseParserError):
        return Meaning(UsageError, "", "AWS_ENDPOINT_URL does not lead to an S3 server; correct it")
    return Meaning(UsageError, "", "correct the address, the AWS variables or ~/.aws/config")


def _is_wrong_setting(error: Exception) -> bool:
    """Whether a failed request cannot succeed later: TLS without trust or with the wrong port, an invalid address."""
    from botocore.exceptions import SSLError

    cause = getattr(error, "kwargs", {}).get("error")
    if isinstance(error, SSLError):
        return any(reason in str(cause) for reason in WRONG_TLS_SETTING)
    return isinstance(cause, (ValueError, FileNotFoundError, PermissionError))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:MAX_MESSAGE_CHARACTERS].rstrip(".")
