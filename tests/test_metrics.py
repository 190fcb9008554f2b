"""The metrics log survives restarts and torn lines; curves and the summary are drawn from it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from babybert.checkpoint.metrics_log import MetricsLog, read_metrics
from babybert.config import PretrainConfig
from babybert.evaluation.curves import plot
from babybert.training.metrics import RunMetrics
from babybert.training.train import pretrain


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


@pytest.mark.slow
def test_plots_and_summary(small: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        result = pretrain(small(out=tmp_path / name, tensorboard=False))
        assert result is not None and result.scores is not None
        runs.append(tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["ended_by"] == "done"
        assert summary["step"] == 56
        assert summary["scores"]["mlm_loss"] == pytest.approx(result.scores.mlm_loss, abs=1e-5)
    png, svg = plot(runs, tmp_path / "pictures" / "plot")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg.read_bytes()
    assert len(set(svg.read_bytes().split(b"#1f77b4"))) > 3  # the first run's color is used
    assert b"#ff7f0e" in svg.read_bytes()  # and the second's
