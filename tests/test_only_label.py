"""Where all pairs of a split have one label, next sentence prediction is left out of all that is reported.

A constant answer would be right for each of these pairs, so an accuracy of 100 % says nothing.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL

from babybert.checkpoint.format import read_state
from babybert.checkpoint.metrics_log import read_metrics
from babybert.cli import main
from babybert.config import InfoConfig, ModelConfig, PrepareConfig, PretrainConfig
from babybert.data.dataset import Dataset, open_dataset, unigram_entropy
from babybert.data.prepare import prepare
from babybert.evaluation.curves import plot_curves, read_run
from babybert.evaluation.explain import explain, format_explanation
from babybert.evaluation.report import json_number, report
from babybert.evaluation.report_table import format_number, format_report
from babybert.evaluation.scores import evaluate_held_out, format_scores
from babybert.info import describe, format_description
from babybert.model.bert import BabyBert
from babybert.model.loss import LossSums
from babybert.playground.run_history import RunHistory
from babybert.training.metrics import RunMetrics
from babybert.training.train import TrainingResult, pretrain

CPU = torch.device("cpu")
NSP_SCORES = ("loss", "accuracy", "auc", "calibration_error", "chance_loss", "chance_accuracy", "chance_auc")


def prepare_equal_sentences(folder: Path) -> dict[str, Any]:
    """Data of documents that all continue with the same sentence, so that no pair can become a negative."""
    texts = [f"Document {i} starts here. The same second sentence." for i in range(40)]
    source = folder / "equal.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare(PrepareConfig(corpus="jsonl", source=(str(source),), out=folder / "data", validation_fraction=0.3))


def import_labels(demo: Dataset, folder: Path, labels: dict[str, list[int]]) -> Dataset:
    """The demo's first pairs with these labels, as an externally prepared table."""
    for split, split_labels in labels.items():
        table = pd.read_csv(demo.folder / f"{split}-00000.csv").head(len(split_labels))
        table.assign(is_next=split_labels).to_csv(folder / f"{split}.csv", index=False)
    config = PrepareConfig(
        corpus="table",
        source=(str(folder / "train.csv"),),
        validation_source=(str(folder / "validation.csv"),),
        tokenizer=demo.folder / "tokenizer.json",
        out=folder / "data",
    )
    prepare(config)
    return open_dataset(folder / "data")


def train(data: Path, out: Path, **settings: Any) -> TrainingResult:
    result = pretrain(PretrainConfig(**{**SMALL, "data": data, "out": out, "max_steps": 4, "log_every": 2, **settings}))
    assert result is not None
    return result


def test_prepare_and_info_say_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = prepare_equal_sentences(tmp_path)
    description = describe(tmp_path / "data", InfoConfig())
    for split in ("train", "validation"):
        statistics = facts[split]
        assert statistics["is_next_share"] == 1
        assert statistics["pairs_without_negative"] == statistics["documents"] // 2
        assert statistics["pairs"] + statistics["pairs_without_negative"] == statistics["documents"]
        assert f"{split}: pairs left out" in caplog.text
        assert f"makes them negatives: {statistics['documents'] // 2}\n" in caplog.text
        assert f"all {split} pairs have is_next 1: " in caplog.text
        assert description[split]["pairs_without_negative"] == statistics["pairs_without_negative"]
    text = format_description(description)
    assert text.count("all pairs have one label, so NSP can be neither learned nor scored") == 2
    assert f"sentence makes them negatives: {facts['train']['pairs_without_negative']}\n" in text


def test_data_with_both_labels_is_described_as_before(demo: Dataset) -> None:
    assert "pairs_without_negative" not in demo.facts["train"]
    text = format_description(describe(demo.folder, InfoConfig()))
    assert "one label" not in text
    assert "left out" not in text


@pytest.fixture(scope="module")
def one_label(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data without negatives and a run on it."""
    folder = tmp_path_factory.mktemp("one_label")
    prepare_equal_sentences(folder)
    train(folder / "data", folder / "run")
    return folder


def test_training_reports_no_nsp(tmp_path: Path, one_label: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = train(one_label / "data", tmp_path / "run")
    assert "warning" in {record.levelname.lower() for record in caplog.records}
    assert "all train pairs have is_next 1: the model cannot learn NSP" in caplog.text
    assert "all validation pairs have is_next 1: NSP cannot be scored" in caplog.text
    assert "NSP not scored" in caplog.text
    assert "100.0%" not in caplog.text
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["split"] != "resume"]
    assert {line["split"] for line in lines} == {"train", "validation"}
    for line in lines:
        assert line["nsp_loss"] is None
        assert line["nsp_accuracy"] is None
        assert line["mlm_loss"] > 0
    assert result.scores is not None
    assert "NSP is not scored" in format_scores(result.scores)
    assert "-0.000" not in format_scores(result.scores)
    state = read_state(result.checkpoint)
    assert state.held_out_loss() == pytest.approx(result.scores.mlm_loss, abs=1e-6)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["scores"]["nsp_chance_loss"] is None


def test_prometheus_has_no_series_of_nsp() -> None:
    sums = LossSums(*(torch.ones(()) for _ in range(6)))
    for with_nsp in (False, True):
        metrics = RunMetrics()
        metrics.record_training(sums, with_nsp)
        for name, labels in (("loss", {"objective": "nsp"}), ("nsp_accuracy", {})):
            value = metrics.registry.get_sample_value(f"babybert_pretrain_{name}", {**labels, "split": "train"})
            assert value == (1 if with_nsp else None)


@pytest.mark.slow
def test_evaluate_reports_no_nsp(one_label: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--checkpoint", str(one_label / "run"), "--data", str(one_label / "data"), "--device", "cpu"]
    assert main([*command, "--plot", str(tmp_path / "figure")]) == 0
    output = capsys.readouterr()
    assert "next sentence  " not in output.out
    assert "left out: next sentence: all validation pairs have is_next 1" in output.out
    assert "-0.000" not in output.out
    assert "warning: all train pairs have is_next 1" in output.err
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [results[f"nsp_{score}"] for score in NSP_SCORES] == [None] * len(NSP_SCORES)
    assert results["intervals"]["nsp_loss"] == [None, None]
    assert results["calibration"] == []
    assert results["mlm_loss"] > 0


@pytest.mark.slow
def test_curves_are_drawn_without_nsp(one_label: Path, tmp_path: Path) -> None:
    png, _ = plot_curves([one_label / "run"], tmp_path / "curves")
    assert png.stat().st_size > 10_000
    curves = RunHistory(str(one_label / "run")).curves()["curves"]
    assert list(curves) == ["mlm_loss"]
    assert len(curves["mlm_loss"]["train"]) == len([line for line in read_run(one_label / "run") if "lr" in line])


def test_a_table_of_negatives_only(demo: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = import_labels(demo, tmp_path, {"train": [0] * 9, "validation": [0] * 5})
    assert "all train pairs have is_next 0: " in caplog.text
    assert "all validation pairs have is_next 0: " in caplog.text
    assert "pairs_without_negative" not in dataset.facts["train"]


def test_a_table_without_labels_is_refused(demo: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.read_csv(demo.folder / "train-00000.csv").head(5)
    table.drop(columns="is_next").to_csv(tmp_path / "no_column.csv", index=False)
    table.assign(is_next="").to_csv(tmp_path / "empty.csv", index=False)
    for name, problem in (("no_column", "no column 'is_next'"), ("empty", "row 1: is_next is ''; it must be 0 or 1")):
        source = str(tmp_path / f"{name}.csv")
        tokenizer = str(demo.folder / "tokenizer.json")
        command = ["prepare", "--corpus", "table", "--source", source, "--validation-source", source]
        assert main([*command, "--tokenizer", tokenizer, "--out", str(tmp_path / "data")]) == 3
        assert f"{source}: {problem}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def bert(demo: Dataset) -> BabyBert:
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=8, heads=2, layers=1, feed_forward=16))


def test_a_single_held_out_pair_is_not_scored(demo: Dataset, bert: BabyBert, tmp_path: Path) -> None:
    dataset = import_labels(demo, tmp_path, {"train": [0, 1] * 4, "validation": [1]})
    train(dataset.folder, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all((line["nsp_loss"] is None) == (line["split"] == "validation") for line in lines)
    one_of_several = report(bert, demo, 1, 8, CPU)
    assert one_of_several["pairs"] == 1
    assert one_of_several["nsp_accuracy"] is None


def test_training_pairs_of_one_label_leave_the_held_out_scores(
    demo: Dataset, bert: BabyBert, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = import_labels(demo, tmp_path, {"train": [1] * 8, "validation": [0, 1] * 4})
    results = report(bert, dataset, None, 8, CPU)
    assert "all train pairs have is_next 1" in caplog.text
    assert results["nsp_chance_accuracy"] == 0.5
    assert results["nsp_loss"] is not None
    assert "nsp_overlap_loss" not in results
    assert results["left_out"] == ["next sentence by word overlap, style and format: all training pairs have is_next 1"]
    assert "next sentence  " in format_report(results)
    scores = evaluate_held_out(bert, dataset.examples("validation"), dataset.token_counts(), 8, CPU)
    assert scores.nsp_chance_loss == pytest.approx(math.log(2))


def test_no_number_is_minus_zero(demo: Dataset, bert: BabyBert) -> None:
    assert math.copysign(1, unigram_entropy(np.array([0, 7]))) == 1
    assert str(json_number(-1e-9)) == "0.0"
    assert format_number(-0.0004, ".3f") == "0.000"
    explanation = explain(bert, demo.tokenizer, "Zyx zyx", "zyx", True, 0)  # no word is in the vocabulary
    assert str(explanation["mlm_loss"]) == "0.0"
    assert "-0.0000 " not in format_explanation(explanation, "model")
