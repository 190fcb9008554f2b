"""What each error of S3 means: its exit code, and what the message tells users to change."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore import exceptions
from botocore.config import Config
from botocore.parsers import ResponseParserError
from conftest import S3, aws_variables
from faulty_proxy import Refusal, S3Proxy, answering, pass_all

from babybert.cli import main
from babybert.errors import EXIT_CRASH, EXIT_DATA, EXIT_USAGE, UsageError, UserError
from babybert.s3 import get_if_exists, list_keys, make_client, put_if, split_address
from babybert.s3_errors import s3_errors, user_error

RETRY = EXIT_CRASH
# (HTTP status, error code, exit code)
ANSWERS = [
    (403, "AccessDenied", EXIT_USAGE),
    (403, "AllAccessDisabled", EXIT_USAGE),
    (403, "AccountProblem", EXIT_USAGE),
    (400, "AuthorizationHeaderMalformed", EXIT_USAGE),
    (400, "BadDigest", RETRY),
    (409, "ConditionalRequestConflict", RETRY),
    (400, "EntityTooLarge", EXIT_USAGE),
    (400, "ExpiredToken", EXIT_USAGE),
    (400, "IllegalLocationConstraintException", EXIT_USAGE),
    (400, "IncompleteBody", RETRY),
    (500, "InternalError", RETRY),
    (403, "InvalidAccessKeyId", EXIT_USAGE),
    (400, "InvalidArgument", EXIT_USAGE),
    (400, "InvalidBucketName", EXIT_USAGE),
    (403, "InvalidObjectState", EXIT_USAGE),
    (400, "InvalidPart", RETRY),
    (403, "InvalidPayer", EXIT_USAGE),
    (400, "InvalidRequest", EXIT_USAGE),
    (403, "InvalidSecurity", EXIT_USAGE),
    (400, "InvalidToken", EXIT_USAGE),
    (400, "InvalidURI", EXIT_USAGE),
    (400, "KeyTooLongError", EXIT_USAGE),
    (400, "KMS.DisabledException", EXIT_USAGE),
    (400, "KMS.KMSInvalidStateException", EXIT_USAGE),
    (400, "KMS.NotFoundException", EXIT_USAGE),
    (400, "KMS.ThrottlingException", RETRY),
    (500, "KMS.InternalException", RETRY),
    (405, "MethodNotAllowed", EXIT_USAGE),
    (404, "NoSuchBucket", EXIT_DATA),
    (404, "NoSuchKey", EXIT_DATA),
    (501, "NotImplemented", EXIT_USAGE),
    (403, "NotSignedUp", EXIT_USAGE),
    (409, "OperationAborted", RETRY),
    (301, "PermanentRedirect", EXIT_USAGE),
    (403, "QuotaExceeded", RETRY),
    (400, "RequestTimeout", RETRY),
    (403, "RequestTimeTooSkewed", EXIT_USAGE),
    (503, "ServiceUnavailable", RETRY),
    (403, "SignatureDoesNotMatch", EXIT_USAGE),
    (503, "SlowDown", RETRY),
    (400, "ThrottlingException", RETRY),
    (429, "TooManyRequests", RETRY),
    (400, "TokenRefreshRequired", EXIT_USAGE),
    (400, "XAmzContentSHA256Mismatch", RETRY),
    (507, "XMinioStorageFull", RETRY),
    (400, "SomethingNew", RETRY),
    (401, "SomethingNew", EXIT_USAGE),
    (403, "SomethingNew", EXIT_USAGE),
    (500, "SomethingNew", RETRY),
]
# HTTP status of an answer to HEAD, which has no code, and the exit code
HEAD_ANSWERS = [
    (301, EXIT_USAGE),
    (400, EXIT_USAGE),
    (403, EXIT_USAGE),
    (404, EXIT_DATA),
    (405, EXIT_USAGE),
    (500, RETRY),
    (503, RETRY),
]
TLS = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"
EXCEPTIONS: list[tuple[Exception, int]] = [
    (exceptions.NoCredentialsError(), EXIT_USAGE),
    (exceptions.PartialCredentialsError(provider="env", cred_var="x"), EXIT_USAGE),
    (exceptions.NoAuthTokenError(), EXIT_USAGE),
    (exceptions.ProfileNotFound(profile="x"), EXIT_USAGE),
    (exceptions.ConfigParseError(path="x"), EXIT_USAGE),
    (exceptions.ConfigNotFound(path="x"), EXIT_USAGE),
    (exceptions.InvalidConfigError(error_msg="x"), EXIT_USAGE),
    (exceptions.NoRegionError(), EXIT_USAGE),
    (exceptions.InvalidRegionError(region_name="x y"), EXIT_USAGE),
    (exceptions.ParamValidationError(report="Invalid bucket name"), EXIT_USAGE),
    (exceptions.EndpointProviderError(msg="x"), EXIT_USAGE),
    (exceptions.InvalidProxiesConfigError(), EXIT_USAGE),
    (exceptions.TokenRetrievalError(provider="sso", error_msg="Token has expired"), EXIT_USAGE),
    (exceptions.UnauthorizedSSOTokenError(), EXIT_USAGE),
    (exceptions.SSOTokenLoadError(error_msg="x"), EXIT_USAGE),
    (exceptions.SSLError(endpoint_url="x", error=TLS), EXIT_USAGE),
    (exceptions.SSLError(endpoint_url="x", error="[SSL: UNEXPECTED_EOF_WHILE_READING]"), RETRY),
    (exceptions.CredentialRetrievalError(provider="container-role", error_msg="x"), RETRY),
    (exceptions.MetadataRetrievalError(error_msg="x"), RETRY),
    (exceptions.EndpointConnectionError(endpoint_url="x"), RETRY),
    (exceptions.ConnectTimeoutError(endpoint_url="x"), RETRY),
    (exceptions.ReadTimeoutError(endpoint_url="x"), RETRY),
    (exceptions.ProxyConnectionError(proxy_url="x"), RETRY),
    (exceptions.ConnectionClosedError(endpoint_url="x"), RETRY),
    (exceptions.HTTPClientError(error=OSError("reset")), RETRY),
    (exceptions.HTTPClientError(error=ValueError("not a valid host or port")), EXIT_USAGE),
    (exceptions.HTTPClientError(error=RecursionError("maximum recursion depth exceeded")), EXIT_USAGE),
    (exceptions.ResponseStreamingError(error="x"), RETRY),
    (exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), RETRY),
    (exceptions.FlexibleChecksumError(error_msg="x"), RETRY),
    (ResponseParserError("not XML"), EXIT_USAGE),
]


@pytest.fixture(scope="module")
def refusing() -> Iterator[S3Proxy]:
    """A server that refuses every request, as its rule says."""
    proxy = S3Proxy("http://127.0.0.1:9", pass_all)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def client(refusing: S3Proxy) -> Any:
    """A client of that server, which sends each request once."""
    return boto3.client(
        "s3",
        endpoint_url=refusing.url,
        region_name="us-east-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",
        config=Config(retries={"total_max_attempts": 1}),
    )


@pytest.mark.parametrize(("status", "code", "exit_code"), ANSWERS)
def test_exit_codes_of_answers(refusing: S3Proxy, client: Any, status: int, code: str, exit_code: int) -> None:
    refusing.rule = lambda request: Refusal(status, code, "the reason\nin two lines.")
    with pytest.raises(UserError) as caught, s3_errors("s3://bucket/key"):
        client.get_object(Bucket="bucket", Key="key")
    assert caught.value.exit_code == exit_code
    message = str(caught.value)
    assert message.startswith("s3://bucket/key: ")
    assert f"({code}: the reason in two lines); " in message or status == 301
    assert "\n" not in message


@pytest.mark.parametrize(("status", "exit_code"), HEAD_ANSWERS)
def test_exit_codes_of_answers_without_a_code(refusing: S3Proxy, client: Any, status: int, exit_code: int) -> None:
    refusing.rule = lambda request: Refusal(status)
    with pytest.raises(UserError, match="s3://bucket/key: ") as caught, s3_errors("s3://bucket/key"):
        client.head_object(Bucket="bucket", Key="key")
    assert caught.value.exit_code == exit_code


def test_an_upload_that_is_refused_is_mapped_like_other_requests(refusing: S3Proxy, client: Any) -> None:
    """`upload_file` wraps the error in one of its own."""
    refusing.rule = lambda request: Refusal(403, "AccessDenied")
    with pytest.raises(UsageError, match="the credentials need the right s3:PutObject"), s3_errors("s3://bucket/key"):
        client.upload_file(__file__, "bucket", "key")


@pytest.mark.parametrize(("error", "exit_code"), EXCEPTIONS, ids=lambda value: type(value).__name__)
def test_exit_codes_of_exceptions(error: Exception, exit_code: int) -> None:
    converted = user_error("s3://bucket/key", error)
    assert converted.exit_code == exit_code
    assert "\n" not in str(converted)


PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\nConnection: close\r\n\r\n<html></html>"


@pytest.mark.parametrize(
    ("variables", "exit_code", "says"),
    [
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, EXIT_USAGE, "Invalid endpoint"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:abc"}, EXIT_USAGE, "not a valid URI"),
        ({"AWS_ENDPOINT_URL": "https://127.0.0.1:{page}"}, EXIT_USAGE, "check AWS_ENDPOINT_URL, AWS_CA_BUNDLE"),
        ({"AWS_ENDPOINT_URL": "https://127.0.0.1:{page}", "AWS_CA_BUNDLE": "/no/file"}, EXIT_USAGE, "AWS_CA_BUNDLE"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:{page}"}, EXIT_USAGE, "not from an S3 server"),
        ({"HTTP_PROXY": "http://127.0.0.1:abc", "AWS_ENDPOINT_URL": "http://10.0.0.1"}, EXIT_USAGE, "HTTPS_PROXY"),
        ({"AWS_PROFILE": "nobody"}, EXIT_USAGE, "nobody"),
        ({"AWS_DEFAULT_REGION": "eu west"}, EXIT_USAGE, "eu west"),
        ({"AWS_SECRET_ACCESS_KEY": "secret\n"}, EXIT_USAGE, "a line break; remove it"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_ROLE_ARN": "arn:x", "AWS_WEB_IDENTITY_TOKEN_FILE": "/no/token"},
            EXIT_USAGE,
            "/no/token",
        ),
        ({"BABYBERT_S3_TIMEOUT": "soon"}, EXIT_USAGE, "BABYBERT_S3_TIMEOUT is 'soon'"),
        ({"BABYBERT_S3_TIMEOUT": "0"}, EXIT_USAGE, "BABYBERT_S3_TIMEOUT is '0'"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, RETRY, "check the endpoint and try again"),
    ],
)
def test_wrong_settings_say_what_to_change(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], exit_code: int, says: str
) -> None:
    given = {**aws_variables("http://127.0.0.1:9"), "AWS_SHARED_CREDENTIALS_FILE": os.devnull, **variables}
    with answering(PAGE) as (port, _):
        for name, value in given.items():
            monkeypatch.setenv(name, value.format(page=port))
        with pytest.raises(UserError, match=says) as caught, s3_errors("s3://bucket/key"):
            list(list_keys(make_client(), "bucket", "key"))
    assert caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["s3://my bucket/x", "s3://*/x", "s3:///x", "s3://", "s3://arn:aws:s3:::x/y", "x/y"]
)
def test_bad_bucket_names_are_usage_errors(address: str) -> None:
    with pytest.raises(UserError, match="bucket") as caught:
        split_address(address)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "--store=s3://my bucket/x"],
        ["pretrain", "--no-metrics", "--resume=s3://my bucket/x"],
        ["prepare", "--corpus=text", "--source=s3://my bucket/x"],
        ["archive", "s3://my bucket/x"],
        ["serve", "s3://my bucket/x"],
        ["playground", "--checkpoint=s3://my bucket/x"],
        ["playground", "--endpoint=http://127.0.0.1", "--run=s3://my bucket/x"],
    ],
)
def test_every_command_refuses_a_bad_bucket_name(
    command: list[str],
    small: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    if command[0] == "pretrain":
        command = [*command, f"--data={small().data}", "--device=cpu", "--preset=tiny"]
    assert main(command) == EXIT_USAGE
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "'my bucket' is not a bucket name" in line


def test_conditional_requests_of_a_real_server(s3: S3) -> None:
    assert get_if_exists(s3.client, s3.bucket, "key") is None
    etag = put_if(s3.client, s3.bucket, "key", b"1", IfNoneMatch="*")
    assert etag
    assert put_if(s3.client, s3.bucket, "key", b"2", IfNoneMatch="*") is None
    assert get_if_exists(s3.client, s3.bucket, "key") == (etag, b"1")
    assert put_if(s3.client, s3.bucket, "key", b"2", IfMatch=etag)
    assert put_if(s3.client, s3.bucket, "key", b"3", IfMatch=etag) is None
