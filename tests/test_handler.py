"""The parts of the handler that need no server; tests/system has the rest."""

import importlib.util
import json
import socket
import struct
import threading
from pathlib import Path

import pytest
import yaml

from babybert.errors import DataError, UsageError
from babybert.serving.archive import handler_folder
from babybert.serving.request_schema import UnsupportedType, parse_object

pytest.importorskip("ts")
from ts.protocol import otf_message_handler


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


handler = load(handler_folder() / "babybert_handler.py")


def test_what_is_written_is_json_with_its_status():
    assert handler.write({"a": 1}) == (200, b'{"a": 1}')
    for error, status in ((UsageError("é"), 400), (UnsupportedType("é"), 415), (DataError("é"), 500)):
        code, text = handler.write(error)
        assert (code, json.loads(text)) == (status, {"error": "é"})
    code, text = handler.write(["a" * handler.MAX_RESPONSE_BYTES])
    assert code == 400
    assert "6,000,004 bytes long" in json.loads(text)["error"]


def test_a_request_is_answered_or_refused_as_a_whole():
    several = parse_object({"pairs": [{"sentence_a": "a", "sentence_b": "b"}] * 2})
    assert handler.put_together(several, [1, 2]) == [1, 2]
    error = UsageError("x")
    assert handler.put_together(several, [1, error]) is error
    assert handler.put_together(parse_object({"text": "[MASK]"}), [1]) == 1


def test_metrics_are_declared_as_they_are_written():
    """TorchServe drops what is not, and its labels are matched by their place."""
    declared = yaml.safe_load((handler_folder() / "metrics.yaml").read_text())["model_metrics"]
    found = {
        metric["name"]: (kind, metric["unit"], metric["dimensions"])
        for kind, metrics in declared.items()
        for metric in metrics
    }
    del found["PredictionTime"]  # TorchServe's own
    assert found == {
        name: (kind.value, unit, [*labels, "ModelName", "Level"])
        for name, (kind, unit, labels) in handler.METRICS.items()
    }


def message(bodies):
    """A batch as TorchServe sends it: a command, and for each request its id, its headers, its inputs."""

    def field(content):
        return struct.pack("!i", len(content)) + content

    end = struct.pack("!i", -1)
    requests = [
        field(f"id-{number}".encode())
        + field(b"content-type")
        + field(b"application/json")
        + end
        + field(b"body")
        + field(b"application/json")
        + field(body)
        + end
        for number, body in enumerate(bodies)
    ]
    return otf_message_handler.PREDICT_MSG + b"".join(requests) + end


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_reading_ahead_reads_what_torchserve_reads(monkeypatch, piece):
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")
    batches = [[b"{}"], [b"x" * 200_000, b"", b"\xff" * 3], [b"{}"] * 32] if piece > 1 else [[b"{}", b""]]
    content = b"".join(map(message, batches))

    def read_all():
        here, there = socket.socketpair()
        with here, there:
            sender = threading.Thread(
                target=lambda: [there.sendall(content[at : at + piece]) for at in range(0, len(content), piece)]
            )
            sender.start()
            found = [otf_message_handler.retrieve_msg(here) for _ in batches]
            sender.join()
            there.shutdown(socket.SHUT_RDWR)
            with pytest.raises(SystemExit):
                otf_message_handler.retrieve_msg(here)
        return found

    theirs = read_all()
    for name in ("_retrieve_buffer", "_retrieve_int"):
        monkeypatch.setattr(otf_message_handler, name, getattr(otf_message_handler, name))  # puts it back afterwards
    handler.read_ahead(otf_message_handler)
    ours = read_all()
    assert ours == theirs
    assert [[request["parameters"][0]["value"] for request in batch] for _, batch in ours] == batches
