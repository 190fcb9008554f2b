"""The metrics log survives restarts and torn lines. A Pushgateway never makes a run fail."""

from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_proxy import answering

from babybert.checkpoint.metrics_log import MetricsLog, read_metrics
from babybert.cli import main
from babybert.config import PretrainConfig
from babybert.errors import UsageError
from babybert.training.metrics import RunMetrics


def test_steps_that_a_resume_repeats_count_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step=step, run=1)
    log.write("resume", step=2)
    log.write("train", step=3, run=2)
    assert [(line["step"], line["split"], line.get("run")) for line in read_metrics(log.path)] == [
        (1, "train", 1),
        (2, "train", 1),
        (2, "resume", None),
        (3, "train", 2),
    ]
    assert len(log.path.read_text().splitlines()) == 5  # nothing was removed


def test_a_torn_line_breaks_neither_writer_nor_reader(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("train", step=1)
    with log.path.open("ab") as file:
        file.write(b'{"split": "train", "step": 2, "mlm_lo\xff')
    log.write("train", step=3)
    assert [line["step"] for line in read_metrics(log.path)] == [1, 3]
    assert all(line == b"" or line.startswith(b"{") for line in log.path.read_bytes().split(b"\n"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH-2.0"),
        (b"\x15\x03\x01\x00\x02\x02\x0a", "\x15"),
        (b"", "closed connection"),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "400"),
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", "500"),
        (b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n", "307"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200, "headers"),
        (None, "timed out"),
    ],
)
def test_whatever_a_pushgateway_answers_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, content: bytes | None, reason: str
) -> None:
    monkeypatch.setattr("babybert.training.metrics.PUSH_SECONDS", 0.5)
    with answering(content) as (port, _):
        RunMetrics().push(f"http://127.0.0.1:{port}", "run")
    assert f"http://127.0.0.1:{port}: the last metrics could not be pushed (" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("gateway", "reason"),
    [
        ("http://127.0.0.1:9", "refused"),
        ("http://no-such-host.invalid:9091", "pushed"),
        ("https://127.0.0.1:{port}", "SSL"),
        ("http://127.0.0.1:abc", "abc"),
    ],
)
def test_a_pushgateway_that_cannot_be_reached_is_a_warning(
    caplog: pytest.LogCaptureFixture, gateway: str, reason: str
) -> None:
    with answering(b"HTTP/1.1 200 OK\r\n\r\n") as (port, _):
        RunMetrics().push(gateway.format(port=port), "run")
    assert "could not be pushed" in caplog.text
    assert reason in caplog.text


def test_metrics_are_pushed_below_the_path_of_the_address(small: Callable[..., PretrainConfig]) -> None:
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as (port, received):
        url = small(pushgateway=f"127.0.0.1:{port}/path/").pushgateway_url
        assert url is not None
        RunMetrics().push(url, "run")
    assert received[0].startswith(b"PUT /path/metrics/job/babybert_pretrain/run/run HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "gateway",
    [
        "",
        " ",
        "http://",
        "127.0.0.1:abc",
        "127.0.0.1:99999",
        "127.0.0.1:0",
        "127.0.0.1 :9091",
        "127.0.0.1:9091\n",
        "::1:9091",
        "[::1:9091",
        "user:password@host:9091",
        "ftp://host:9091",
        "a..b:9091",
        "host:9091/ä",
        "host:9091/path?query=1",
        "host:9091#part",
        ":9091",
    ],
)
def test_a_bad_pushgateway_address_is_refused_at_the_start(small: Callable[..., PretrainConfig], gateway: str) -> None:
    with pytest.raises(UsageError, match="pushgateway is "):
        small(pushgateway=gateway)


@pytest.mark.parametrize("gateway", ["127.0.0.1:9091", "[::1]:9091", "host", "https://host/path", "HTTP://host:80/"])
def test_a_good_pushgateway_address_is_accepted(small: Callable[..., PretrainConfig], gateway: str) -> None:
    assert str(small(pushgateway=gateway).pushgateway_url).lower().endswith(gateway.lower())


def test_a_run_is_complete_without_its_pushgateway(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--preset=tiny", "--width=8", "--heads=2", "--layers=1", "--feed-forward=16", "--batch-size=8"]
    flags = [*sizes, f"--data={demo_folder}", f"--out={tmp_path / 'run'}", "--epochs=1", "--no-metrics"]
    with answering(b"SSH-2.0-OpenSSH_9.6\r\n") as (port, _):
        assert main(["pretrain", "--device=cpu", *flags, f"--pushgateway=127.0.0.1:{port}"]) == 0
    output = capsys.readouterr()
    assert "held out" in output.out
    assert "could not be pushed (SSH-2.0-OpenSSH_9.6)" in output.err.splitlines()[-1]


def test_a_bad_metrics_host_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"metrics: cannot listen on a\.\.b"):
        RunMetrics().serve("a..b", 0)
