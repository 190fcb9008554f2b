"""The parts of the handler that need no server; tests/system tests the rest."""

import importlib.util
import json
import socket
import struct
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from babybert.errors import DataError, UsageError
from babybert.serving.archive import handler_folder
from babybert.serving.request_schema import UnsupportedType, parse_object

pytest.importorskip("ts")
from ts.protocol import otf_message_handler


def load_module(path: Path) -> ModuleType:
    """Import a file that is not on the module path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


handler = load_module(handler_folder() / "babybert_handler.py")


def test_a_response_is_json_with_its_status() -> None:
    assert handler.encode_response({"a": 1}) == (200, b'{"a": 1}')
    for error, status in ((UsageError("é"), 400), (UnsupportedType("é"), 415), (DataError("é"), 500)):
        code, text = handler.encode_response(error)
        assert (code, json.loads(text)) == (status, {"error": "é"})
    code, text = handler.encode_response(["a" * handler.MAX_RESPONSE_BYTES])
    assert code == 400
    assert "6,000,004 bytes long" in json.loads(text)["error"]


def test_a_request_is_answered_or_refused_as_a_whole() -> None:
    several = parse_object({"pairs": [{"sentence_a": "a", "sentence_b": "b"}] * 2})
    assert handler.combine(several, iter([1, 2])) == [1, 2]
    error = UsageError("x")
    answers = iter([1, error, 3])
    assert handler.combine(several, answers) is error
    assert list(answers) == [3]  # the next request's
    assert handler.combine(parse_object({"text": "[MASK]"}), iter([1])) == 1


def test_metrics_are_declared_as_they_are_written() -> None:
    """TorchServe drops a metric that is not declared, and matches labels by their position."""
    declared = yaml.safe_load((handler_folder() / "metrics.yaml").read_text())["model_metrics"]
    declared_metrics = {
        metric["name"]: (kind, metric["unit"], metric["dimensions"])
        for kind, metrics in declared.items()
        for metric in metrics
    }
    del declared_metrics["PredictionTime"]  # TorchServe's own
    assert declared_metrics == {
        name: (metric_type.value, unit, [*labels, "ModelName", "Level"])
        for name, (metric_type, unit, labels) in handler.METRICS.items()
    }


def predict_message(bodies: list[bytes]) -> bytes:
    """A batch as TorchServe sends it: a command, and for each request its id, its headers and its inputs."""

    def field(content: bytes) -> bytes:
        return struct.pack("!i", len(content)) + content

    end = struct.pack("!i", -1)
    requests = [
        field(f"id-{index}".encode())
        + field(b"content-type")
        + field(b"application/json")
        + end
        + field(b"body")
        + field(b"application/json")
        + field(body)
        + end
        for index, body in enumerate(bodies)
    ]
    command: bytes = otf_message_handler.PREDICT_MSG
    return command + b"".join(requests) + end


def read_messages(content: bytes, piece: int, count: int) -> list[Any]:
    """What TorchServe's worker reads from a connection that receives `content` in pieces and is closed afterwards."""
    reader, writer = socket.socketpair()

    def send() -> None:
        for start in range(0, len(content), piece):
            writer.sendall(content[start : start + piece])

    with reader, writer:
        reader.settimeout(60)
        sender = threading.Thread(target=send)
        sender.start()
        messages = [otf_message_handler.retrieve_msg(reader) for _ in range(count)]
        sender.join()
        writer.shutdown(socket.SHUT_RDWR)
        with pytest.raises(SystemExit):
            otf_message_handler.retrieve_msg(reader)
    return messages


@pytest.mark.parametrize(
    ("piece", "batches"),
    [
        (1, [[b"{}", b""]]),
        (7, [[b"{}"], [b"x" * 200_000, b"", b"\xff" * 3], [b"{}"] * 32]),
        (10**6, [[b"{}"], [b"x" * 200_000, b"", b"\xff" * 3], [b"{}"] * 32]),
    ],
    ids=["1 byte", "7 bytes", "all"],
)
def test_read_ahead_reads_the_same_messages_as_torchserve(
    monkeypatch: pytest.MonkeyPatch, piece: int, batches: list[list[bytes]]
) -> None:
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")
    content = b"".join(map(predict_message, batches))
    expected = read_messages(content, piece, len(batches))
    for name in ("_retrieve_buffer", "_retrieve_int"):  # so that monkeypatch restores them afterwards
        monkeypatch.setattr(otf_message_handler, name, getattr(otf_message_handler, name))
    handler.install_read_ahead(otf_message_handler)
    messages = read_messages(content, piece, len(batches))
    assert messages == expected
    bodies = [[request["parameters"][0]["value"] for request in batch] for _, batch in messages]
    assert bodies == batches
