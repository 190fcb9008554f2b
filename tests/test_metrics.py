"""The metrics log survives restarts and torn lines."""

from pathlib import Path

import pytest

from babybert.checkpoint.metrics_log import MetricsLog, read_metrics
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


def test_an_unreachable_pushgateway_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    RunMetrics().push("127.0.0.1:9", "run")
    assert "could not be pushed" in caplog.text
