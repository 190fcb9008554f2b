"""`babybert evaluate`: the report agrees with training's scores, adds up, and is printed and drawn."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL

from babybert.cli import main
from babybert.config import ModelConfig, PretrainConfig
from babybert.data.dataset import Dataset
from babybert.data.masking import MASKED_SHARE
from babybert.data.tokenizer import FIRST_ORDINARY, MASK
from babybert.evaluation.report import report, with_fixed_masks
from babybert.evaluation.report_table import format_report
from babybert.evaluation.scores import evaluate_held_out
from babybert.model.bert import BabyBert
from babybert.training.train import pretrain

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bert(demo: Dataset) -> BabyBert:
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=8, heads=2, layers=1, feed_forward=16))


@pytest.fixture(scope="module")
def results(bert: BabyBert, demo: Dataset) -> dict[str, Any]:
    return report(bert, demo, None, 16, CPU)


def test_scores_that_training_reports_too_are_the_same(bert: BabyBert, demo: Dataset, results: dict[str, Any]) -> None:
    scores = evaluate_held_out(bert, demo.examples("validation"), demo.token_counts(), 16, CPU).as_dict()
    assert {name: results[name] for name in scores} == pytest.approx(scores, rel=1e-4)


def test_intervals_contain_their_values(results: dict[str, Any]) -> None:
    assert results["masks"] == "the table's" and results["intervals_resample"] == "pairs"
    for name, (low, high) in results["intervals"].items():
        assert low <= high
        if not name.endswith("calibration_error"):  # resampling can only add to it
            assert low <= results[name] <= high, name
    assert results["mlm_perplexity"] == pytest.approx(np.exp(results["mlm_loss"]), rel=1e-4)
    assert results["mlm_loss_below_bigram"] == pytest.approx(results["mlm_bigram_loss"] - results["mlm_loss"], abs=1e-5)


def test_the_bigram_baseline_knows_the_grammar_of_the_demo(results: dict[str, Any]) -> None:
    assert results["mlm_bigram_loss"] < results["mlm_unigram_loss"] - 1 < results["mlm_chance_loss"]
    assert results["mlm_bigram_top1"] > 2 * results["mlm_unigram_top1"] > results["mlm_chance_top1"]


def test_slices_add_up_to_the_total(demo: Dataset, results: dict[str, Any]) -> None:
    for parts in (results["by_frequency"], results["by_position"], results["by_shown"]):
        tokens = [part["tokens"] for part in parts]
        assert sum(tokens) == results["masked_tokens"]
        for name in ("mlm_loss", "mlm_bigram_loss", "mlm_top5"):
            assert np.average([part[name] for part in parts], weights=tokens) == pytest.approx(results[name], abs=1e-4)
    held_out, counts = demo.examples("validation"), demo.token_counts()
    target = held_out.labels[held_out.labels > 0]
    for part in results["by_frequency"]:
        highest = np.inf if part["to"] is None else part["to"]
        assert part["tokens"] == ((counts[target] >= part["from"]) & (counts[target] <= highest)).sum()
    assert sum(part["pairs"] for part in results["calibration"]) == results["pairs"]


def test_the_report_as_text(results: dict[str, Any]) -> None:
    text = format_report(results)
    for word in (
        "held out: ",
        "bigram",
        "overlap",
        "format",
        "loss below unigram",
        "calibration error",
        "[MASK]",
        "a random word",
        "95% interval",
    ):
        assert word in text
    assert "left out" not in text
    assert max(map(len, text.splitlines())) < 110


def test_a_model_that_has_diverged_is_reported_too(bert: BabyBert, demo: Dataset) -> None:
    diverged = BabyBert(bert.config)
    diverged.load_state_dict(bert.state_dict())
    diverged.mlm_decoder.weight.data *= 1e4
    results = report(diverged, demo, 5, 5, CPU)
    assert results["mlm_loss"] > 1000 and results["mlm_perplexity"] is None
    assert "perplexity" in format_report(results)


def test_masks_with_another_share_are_drawn_anew_and_always_the_same(demo: Dataset) -> None:
    held_out = demo.examples("validation")
    assert with_fixed_masks(held_out, demo.tokenizer.size) == (held_out, "the table's")
    original = held_out.original_ids()
    labels = np.where((original >= FIRST_ORDINARY) & (np.arange(len(original)) % 2 == 0), original, 0)
    half_masked = dataclasses.replace(held_out, ids=np.where(labels > 0, MASK, original), labels=labels)
    again, masks = with_fixed_masks(half_masked, demo.tokenizer.size)
    assert "drawn anew at 15%" in masks
    assert (again.original_ids() == original).all()
    assert (again.labels > 0).sum() / (original >= FIRST_ORDINARY).sum() == pytest.approx(MASKED_SHARE, abs=0.03)
    assert (with_fixed_masks(half_masked, demo.tokenizer.size)[0].ids == again.ids).all()


@pytest.fixture(scope="module")
def run(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    settings: dict[str, Any] = {**SMALL, "data": demo_folder, "out": tmp_path_factory.mktemp("run"), "max_steps": 3}
    result = pretrain(PretrainConfig(**settings))
    assert result is not None
    return str(result.checkpoint)


def test_the_command_prints_and_draws(
    capsys: pytest.CaptureFixture[str], run: str, demo_folder: Path, tmp_path: Path
) -> None:
    command = ["evaluate", "--checkpoint", run, "--data", str(demo_folder), "--max-pairs", "20", "--device", "cpu"]
    assert main([*command, "--plot", str(tmp_path / "a" / "figure.v1")]) == 0
    assert "masked words" in capsys.readouterr().out
    assert (tmp_path / "a" / "figure.v1.png").stat().st_size > 10_000
    assert (tmp_path / "a" / "figure.v1.svg").read_text().startswith("<?xml")
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 20


def test_without_scikit_learn_it_says_what_it_left_out(
    capsys: pytest.CaptureFixture[str], run: str, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert main(["evaluate", "--checkpoint", run, "--data", str(demo_folder), "--max-pairs", "20"]) == 0
    out = capsys.readouterr().out
    assert "left out: next sentence by word overlap" in out and "pip install 'babybert-pretrain[evaluate]'" in out


def test_without_matplotlib_it_ends_before_the_work(
    capsys: pytest.CaptureFixture[str], run: str, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["evaluate", "--checkpoint", run, "--data", str(demo_folder), "--plot", str(tmp_path / "x")]) == 2
    assert "pip install 'babybert-pretrain[plot]'" in capsys.readouterr().err


def test_another_vocabulary_is_refused(capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert main(["prepare", "--out", str(other), "--demo-documents", "40", "--min-frequency", "3"]) == 0
    assert main(["evaluate", "--checkpoint", run, "--data", str(other)]) == 3
    assert "another vocabulary" in capsys.readouterr().err
