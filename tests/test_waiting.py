"""Waiting for the first checkpoint: what ends it, what does not, and what clients are told meanwhile."""

import http.client
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import S3
from faulty_proxy import FaultyProxy
from served import wait_for

from babybert.checkpoint.source import CheckpointSource
from babybert.checkpoint.storage import S3Store
from babybert.config import PretrainConfig, ServeConfig
from babybert.errors import DataError, UsageError
from babybert.serving.request_schema import MAX_BODY_BYTES
from babybert.serving.torchserve import free_ports
from babybert.serving.waiting import answering_not_ready, wait_for_checkpoint
from babybert.training.train import pretrain


def settings(**changes: Any) -> ServeConfig:
    """Settings with free ports that look for a checkpoint often."""
    inference, management, metrics = free_ports(3)
    ports = {"inference_port": inference, "management_port": management, "metrics_port": metrics}
    return ServeConfig(**{"watch": True, "watch_seconds": 0.05, **ports, **changes})


@pytest.mark.slow
def test_s3_is_asked_again_until_it_answers_and_has_a_checkpoint(
    small: Callable[..., PretrainConfig],
    s3: S3,
    s3_endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = urlsplit(s3_endpoint)
    assert target.hostname and target.port
    proxy = FaultyProxy((target.hostname, target.port))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("babybert.serving.waiting.LOG_SECONDS", 0.0)
    proxy.mode = "refuse"
    address, found = f"s3://{s3.bucket}/run", []
    source = CheckpointSource(address)
    waiting = threading.Thread(
        target=lambda: found.append(wait_for_checkpoint(source, tmp_path / "fetched", settings())), daemon=True
    )
    waiting.start()
    wait_for(lambda: "check the endpoint and try again" in caplog.text)
    proxy.mode = "pass"
    wait_for(lambda: "no valid checkpoint there" in caplog.text)
    result = pretrain(small(max_steps=2))
    assert result is not None and not found
    S3Store(address).upload(result.checkpoint)
    waiting.join(30)
    assert [path.name for path in found] == ["step-00000002"]
    proxy.close()


def test_what_does_not_come_right_by_itself_is_an_error_at_once(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = ["s3://no-such-bucket/run", f"s3://{s3.bucket}/run/step-00000001", "no-such-folder", "step-00000001"]
    for address in addresses:
        with pytest.raises(DataError, match=address):
            wait_for_checkpoint(CheckpointSource(address), tmp_path, settings())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UsageError, match="access denied"):
        wait_for_checkpoint(CheckpointSource(f"s3://{s3.bucket}/run"), tmp_path, settings())


def test_clients_are_told_that_there_is_no_model_yet() -> None:
    config = settings()
    with answering_not_ready(config):
        assert ask(config, "GET", "/ping") == (200, {"status": "waiting for the first checkpoint"})
        for method, body in (("GET", None), ("POST", b"{}"), ("POST", b"x" * MAX_BODY_BYTES)):
            status, content = ask(config, method, "/predictions/babybert", body)
            assert (status, "waits for the first checkpoint" in content["error"]) == (503, True)
        with (
            pytest.raises(UsageError, match=r"cannot listen on .* another --inference-port"),
            answering_not_ready(config),
        ):
            pytest.fail("the port was taken")
    with answering_not_ready(config):  # the port is free again
        assert ask(config, "GET", "/ping")[0] == 200


def ask(config: ServeConfig, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    """Status and JSON of one response."""
    connection = http.client.HTTPConnection(config.host, config.inference_port, timeout=30)
    connection.request(method, path, body)
    response = connection.getresponse()
    status, content = response.status, json.loads(response.read())
    connection.close()
    return status, content
