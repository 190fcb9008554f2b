"""A run that is resumed with another batch size or on other devices: each pair once an epoch, and the log says so."""

import json
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from babybert.checkpoint.format import CheckpointState, read_state
from babybert.checkpoint.metrics_log import read_metrics
from babybert.config import PretrainConfig
from babybert.data.loader import Batch, Loader
from babybert.errors import UserError
from babybert.training import train as train_module
from babybert.training.lr_schedule import learning_rate
from babybert.training.resume import log_changes
from babybert.training.train import TrainingResult, pretrain

Small = Callable[..., PretrainConfig]
PAIRS = 220  # of the demo


class Recorder:
    """Trains, and records the rows of each batch by epoch. A run can be stopped after some steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[int, list[int]] = {}
        self.rates: list[float] = []
        self._steps_left = 0
        make_batch = Loader.batch

        def record_batch(loader: Loader, rows: np.ndarray, epoch: int) -> Batch:
            self.rows.setdefault(epoch, []).extend(rows.tolist())
            return make_batch(loader, rows, epoch)

        def learning_rate_and_stop(*arguments: Any) -> float:
            self._steps_left -= 1
            if self._steps_left == 0:
                signal.raise_signal(signal.SIGTERM)
            self.rates.append(learning_rate(*arguments))
            return self.rates[-1]

        monkeypatch.setattr(Loader, "batch", record_batch)
        monkeypatch.setattr(train_module, "learning_rate", learning_rate_and_stop)

    def train(self, config: PretrainConfig, steps: int = 0) -> TrainingResult:
        """Train to the end, or stop after this many steps."""
        self._steps_left = steps
        result = pretrain(config)
        assert result is not None and bool(result.stopped_by) == bool(steps)
        return result

    def assert_each_pair_once(self, epochs: int) -> None:
        assert self.rows.keys() == set(range(epochs))
        for rows in self.rows.values():
            assert Counter(rows) == Counter(range(PAIRS))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def test_batch_size_accumulation_and_bucketing_may_change(
    small: Small, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice in the first epoch, once in the second, and once at its end."""
    settings: dict[str, Any] = {"epochs": 3, "log_every": 1, "warmup_fraction": 0}
    recorder.train(small(**settings), steps=5)
    state = read_state(recorder.train(small(**settings, batch_size=7, accumulate=3), steps=4).checkpoint)
    assert (state.step, state.epoch, state.batch) == (9, 0, 4)
    assert state.earlier_spans == [{"batch_size": 8, "bucketing": True, "batches": 5}]
    recorder.train(small(**settings, batch_size=50, bucketing=False), steps=5)  # 5 x 8 + 4 x 7 + 4 x 50 > 220
    state = read_state(recorder.train(small(**settings, batch_size=20), steps=9).checkpoint)
    assert (state.epoch, state.batch, state.earlier_spans) == (2, 0, [])
    result = recorder.train(small(**settings, batch_size=100))
    assert read_state(result.checkpoint).step == 5 + 4 + 5 + 9 + 3

    recorder.assert_each_pair_once(epochs=3)
    assert recorder.rates == sorted(recorder.rates, reverse=True)
    lines = [line for line in read_metrics(small().out / "metrics.jsonl") if line["split"] == "train"]
    trained_pairs = [line["trained_pairs"] for line in lines]
    assert trained_pairs[:10] == [8, 16, 24, 32, 40, 47, 54, 61, 68, 118]
    assert trained_pairs[-3:] == [2 * PAIRS + 100, 2 * PAIRS + 200, 3 * PAIRS]
    summary = json.loads((small().out / "summary.json").read_text())
    assert (summary["trained_pairs"], summary["ended_by"]) == (3 * PAIRS, "done")
    changes = re.findall(r"not bit-identical to an uninterrupted run because (.*)", caplog.text)
    rate = "; the learning rate is not scaled with the batch size: its peak is 0.005"
    assert changes == [
        f"batch_size changed from 8 to 7, accumulate changed from 1 to 3{rate}",
        f"batch_size changed from 7 to 50, bucketing changed from True to False, accumulate changed from 3 to 1{rate}",
        f"batch_size changed from 50 to 20, bucketing changed from False to True{rate}",
        f"batch_size changed from 20 to 100{rate}",
    ]


def test_a_change_of_accumulation_alone_keeps_the_batches(
    small: Small, tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.train(small(out=tmp_path / "unchanged", epochs=1))
    expected, recorder.rows = recorder.rows, {}
    recorder.train(small(epochs=1), steps=5)
    recorder.train(small(epochs=1, accumulate=4))
    assert recorder.rows == expected
    assert caplog.text.count("because accumulate changed from 1 to 4\n") == 1


def test_a_run_that_is_complete_stays_complete_with_another_batch_size(
    small: Small, caplog: pytest.LogCaptureFixture
) -> None:
    first = pretrain(small(epochs=1))
    again = pretrain(small(epochs=1, batch_size=16))
    assert first is not None and again is not None
    assert again.checkpoint == first.checkpoint
    assert "bit-identical" not in caplog.text


def test_a_non_finite_loss_after_a_change_names_the_rows_of_its_batch(small: Small, recorder: Recorder) -> None:
    recorder.train(small(), steps=3)
    recorder.rows = {}
    with pytest.raises(UserError, match="non-finite") as error:
        pretrain(small(batch_size=5, lr=1e38, weight_decay=1e30, clip_norm=1e38))
    named = re.search(r"rows ([\d, ]+) of", str(error.value))
    assert named and [int(row) for row in named[1].split(", ")] == recorder.rows[0][-5:]


def test_a_change_of_devices_is_logged(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    config = small()
    devices = {"parallel": "ddp", "world_size": 4, "precision": "bf16", "device": "NVIDIA H100 80GB HBM3"}
    state = CheckpointState(3, 0, 3, 1.0, 0, "", config.as_json(), "", None, devices=devices)
    log_changes(state, config, devices)
    assert not caplog.messages
    now = {"parallel": "single", "world_size": 1, "precision": "fp32", "device": "CPU (AVX2)", "threads": 8}
    log_changes(state, config, now)
    assert caplog.messages == [
        "results are not bit-identical to an uninterrupted run because parallel changed from ddp to single, "
        "world_size changed from 4 to 1, precision changed from bf16 to fp32, "
        "device changed from NVIDIA H100 80GB HBM3 to CPU (AVX2)"
    ]
