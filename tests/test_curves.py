"""`babybert plot`: the curves that are drawn, and the figure of two runs."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import S3

from babybert.checkpoint.metrics_log import MetricsLog
from babybert.errors import DataError
from babybert.evaluation import curves
from babybert.evaluation.curves import plot_curves, read_run, running_mean, series
from babybert.figures import save_figure
from babybert.training.train import pretrain


@pytest.mark.slow
def test_two_runs_are_drawn_and_summarized(small: Any, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        result = pretrain(small(out=tmp_path / name, tensorboard=False))
        assert result is not None and result.scores is not None
        runs.append(tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["ended_by"] == "done"
        assert summary["step"] == 56
        assert summary["scores"]["mlm_loss"] == pytest.approx(result.scores.mlm_loss, abs=1e-5)
    png, svg = plot_curves(runs, tmp_path / "figures" / "plot")
    assert png.read_bytes().startswith(b"\x89PNG")
    picture = svg.read_bytes()
    assert b"<svg" in picture
    assert len(set(picture.split(b"#1f77b4"))) > 3  # the first run's color is drawn with
    assert b"#ff7f0e" in picture  # and the second's


def test_names_are_drawn_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib reads $...$ as a formula, and leaves names with a leading underscore out of a legend."""
    names = ["lr$1e-3_$b", "a$x_{$", "_base", os.fsdecode(b"d\xe9")]
    for name in names:
        (tmp_path / name).mkdir()
        MetricsLog(tmp_path / name).write("train", step=1, mlm_loss=4.5)
    drawn: list[str] = []

    def save_and_note(pyplot: Any, figure: Any, *arguments: Any) -> list[Path]:
        drawn.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
        return save_figure(pyplot, figure, *arguments)

    monkeypatch.setattr(curves, "save_figure", save_and_note)
    png, _ = plot_curves([tmp_path / name for name in names], tmp_path / "plot")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert drawn == [r"lr\$1e-3_\$b", r"a\$x_{\$", " _base", r"d\xe9"]
    assert sorted(path.name for path in tmp_path.glob("plot*")) == ["plot.png", "plot.svg"]


def test_a_run_in_s3_is_read(s3: S3, tmp_path: Path) -> None:
    MetricsLog(tmp_path).write("train", step=1, mlm_loss=4.5)
    s3.client.upload_file(str(tmp_path / "metrics.jsonl"), s3.bucket, "runs/one/metrics.jsonl")
    assert read_run(f"s3://{s3.bucket}/runs/one/") == read_run(tmp_path)
    png, _ = plot_curves([f"s3://{s3.bucket}/runs/one", tmp_path], tmp_path / "plot")
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match=r"has no metrics\.jsonl yet; a run uploads it with its first checkpoint"):
        read_run(f"s3://{s3.bucket}/runs/none")


def test_a_series_has_the_points_of_one_key_and_split() -> None:
    lines = [
        {"split": "train", "step": 5, "lr": 1, "mlm_loss": 4.5},
        {"split": "resume", "step": 5},
        {"split": "train", "step": 10, "lr": 2},
        {"split": "validation", "step": 10, "mlm_loss": 4.25},
    ]
    points = series(lines, "mlm_loss", "train")
    assert points["step"].tolist() == [5] and points["value"].tolist() == [4.5]
    assert series(lines, "mlm_loss", "validation")["value"].tolist() == [4.25]
    assert series(lines, "nsp_loss", "train").empty


def test_the_running_mean_has_a_shorter_window_on_a_short_curve() -> None:
    assert running_mean(pd.Series([1.0, 2.0, 3.0])).tolist() == [1, 2, 3]
    mean = running_mean(pd.Series(np.arange(100.0)))
    assert mean.isna().sum() == 14
    assert mean.iloc[-1] == np.arange(85, 100).mean()


def test_a_run_without_a_curve_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_run(tmp_path)
    MetricsLog(tmp_path).path.touch()
    with pytest.raises(DataError, match="has no lines yet"):
        read_run(tmp_path)
