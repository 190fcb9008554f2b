"""Requests to this machine do not go through an HTTP proxy."""

import os
import urllib.request

import pytest
from conftest import S3

from babybert.proxies import bypass_proxies_for_loopback
from babybert.s3 import list_keys, make_client

LOOPBACK = ("localhost", "127.0.0.1:9091", "127.0.0.1", "[::1]:8080", "0.0.0.0:8080")


@pytest.mark.parametrize(
    ("variables", "bypassed", "proxied"),
    [
        ({}, (), ("s3.example.org", "127.0.0.1.example.org")),
        ({"NO_PROXY": "intern, .example.org"}, ("intern", "s3.example.org"), ("example.com",)),
        ({"no_proxy": "intern", "NO_PROXY": "other"}, ("intern",), ("other",)),  # Python prefers lower case
        ({"no_proxy": "*"}, ("example.com",), ()),
    ],
)
def test_loopback_is_bypassed_and_other_hosts_as_before(
    variables: dict[str, str], bypassed: tuple[str, ...], proxied: tuple[str, ...]
) -> None:
    environment = {"http_proxy": "http://proxy:3128", **variables}
    bypass_proxies_for_loopback(environment)
    bypass_proxies_for_loopback(environment)  # a second time changes nothing
    settings = {name.removesuffix("_proxy"): value for name, value in environment.items() if name.islower()}
    for host in (*LOOPBACK, *bypassed):
        assert urllib.request.proxy_bypass_environment(host, settings), host  # type: ignore[attr-defined]
    for host in proxied:
        assert not urllib.request.proxy_bypass_environment(host, settings), host  # type: ignore[attr-defined]
    assert environment["no_proxy"].count("127.0.0.1") <= 1


@pytest.mark.slow
def test_an_s3_server_on_loopback_is_asked_directly(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.client.put_object(Bucket=s3.bucket, Key="a", Body=b"1")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    bypass_proxies_for_loopback(os.environ)
    assert list(list_keys(make_client(), s3.bucket, "")) == [("a", 1)]
