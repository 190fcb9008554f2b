import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from babybert.cli import main
from babybert.config import ModelConfig
from babybert.data.masking import MASKED_SHARE
from babybert.data.tokenizer import FIRST_ORDINARY, MASK
from babybert.evaluation.report import report, with_fixed_masks
from babybert.evaluation.report_table import show
from babybert.evaluation.scores import as_dict, evaluate
from babybert.model.bert import BabyBert
from babybert.training.train import pretrain

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bert(demo):
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=8, heads=2, layers=1, feed_forward=16))


@pytest.fixture(scope="module")
def found(bert, demo):
    return report(bert, demo, None, 16, CPU)


def test_what_training_reports_too_is_the_same(bert, demo, found):
    scores = as_dict(evaluate(bert, demo.examples("validation"), demo.token_counts(), 16, CPU))
    assert {name: found[name] for name in scores} == pytest.approx(scores, rel=1e-4)


def test_intervals_hold_their_values(found):
    assert found["masks"] == "the table's" and found["intervals_resample"] == "pairs"
    for name, (low, high) in found["intervals"].items():
        assert low <= high
        if not name.endswith("calibration_error"):  # resampling can only add to it
            assert low <= found[name] <= high, name
    assert found["mlm_perplexity"] == pytest.approx(np.exp(found["mlm_loss"]), rel=1e-4)
    assert found["mlm_loss_below_bigram"] == pytest.approx(found["mlm_bigram_loss"] - found["mlm_loss"], abs=1e-5)


def test_the_bigram_knows_the_demos_grammar(found):
    assert found["mlm_bigram_loss"] < found["mlm_unigram_loss"] - 1 < found["mlm_chance_loss"]
    assert found["mlm_bigram_top1"] > 2 * found["mlm_unigram_top1"] > found["mlm_chance_top1"]


def test_slices_add_up_to_the_whole(demo, found):
    for parts in (found["by_frequency"], found["by_position"], found["by_shown"]):
        tokens = [part["tokens"] for part in parts]
        assert sum(tokens) == found["masked_tokens"]
        for name in ("mlm_loss", "mlm_bigram_loss", "mlm_top5"):
            assert np.average([part[name] for part in parts], weights=tokens) == pytest.approx(found[name], abs=1e-4)
    held_out, counts = demo.examples("validation"), demo.token_counts()
    target = held_out.labels[held_out.labels > 0]
    for part in found["by_frequency"]:
        assert (
            part["tokens"]
            == (
                (counts[target] >= part["from"]) & (counts[target] <= (np.inf if part["to"] is None else part["to"]))
            ).sum()
        )
    assert sum(part["pairs"] for part in found["calibration"]) == found["pairs"]


def test_tables_for_people(found):
    text = show(found)
    for word in (
        "held out: ",
        "bigram",
        "overlap",
        "format",
        "loss below unigram",
        "calibration error",
        "[MASK]",
        "a random word",
        "95% intervals",
    ):
        assert word in text
    assert "left out" not in text
    assert max(map(len, text.splitlines())) < 110


def test_a_model_that_has_diverged_is_reported_too(bert, demo):
    lost = BabyBert(bert.config)
    lost.load_state_dict(bert.state_dict())
    lost.mlm_decoder.weight.data *= 1e4
    found = report(lost, demo, 5, 5, CPU)
    assert found["mlm_loss"] > 1000 and found["mlm_perplexity"] is None
    assert "perplexity" in show(found)


def test_masks_of_another_rate_are_drawn_anew_and_always_the_same(demo):
    held_out = demo.examples("validation")
    assert with_fixed_masks(held_out, demo.tokenizer.size) == (held_out, "the table's")
    original = held_out.original_ids()
    labels = np.where((original >= FIRST_ORDINARY) & (np.arange(len(original)) % 2 == 0), original, 0)
    thick = dataclasses.replace(held_out, ids=np.where(labels > 0, MASK, original), labels=labels)
    again, whose = with_fixed_masks(thick, demo.tokenizer.size)
    assert "drawn anew at 15%" in whose
    assert (again.original_ids() == original).all()
    assert (again.labels > 0).sum() / (original >= FIRST_ORDINARY).sum() == pytest.approx(MASKED_SHARE, abs=0.03)
    assert (with_fixed_masks(thick, demo.tokenizer.size)[0].ids == again.ids).all()


@pytest.fixture(scope="module")
def run(demo_folder, tmp_path_factory):
    from conftest import SMALL

    from babybert.config import PretrainConfig

    return str(
        pretrain(PretrainConfig(**SMALL, data=demo_folder, out=tmp_path_factory.mktemp("run"), max_steps=3)).checkpoint
    )


@pytest.mark.slow
def test_the_command_prints_and_draws(capsys, run, demo_folder, tmp_path):
    command = ["evaluate", "--checkpoint", run, "--data", str(demo_folder), "--max-pairs", "20", "--device", "cpu"]
    assert main([*command, "--plot", str(tmp_path / "a" / "picture.v1")]) == 0
    assert "masked words" in capsys.readouterr().out
    assert (tmp_path / "a" / "picture.v1.png").stat().st_size > 10_000
    assert (tmp_path / "a" / "picture.v1.svg").read_text().startswith("<?xml")
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 20


def test_without_scikit_learn_it_says_what_it_left_out(capsys, run, demo_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert main(["evaluate", "--checkpoint", run, "--data", str(demo_folder), "--max-pairs", "20"]) == 0
    out = capsys.readouterr().out
    assert "left out: next sentence by word overlap" in out and "pip install 'babybert-pretrain[evaluate]'" in out


def test_without_matplotlib_it_ends_before_the_work(capsys, run, demo_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["evaluate", "--checkpoint", run, "--data", str(demo_folder), "--plot", str(tmp_path / "x")]) == 2
    assert "pip install 'babybert-pretrain[plot]'" in capsys.readouterr().err


def test_another_vocabulary_is_refused(capsys, run, tmp_path):
    other = tmp_path / "other"
    assert main(["prepare", "--out", str(other), "--demo-documents", "40", "--min-frequency", "3"]) == 0
    assert main(["evaluate", "--checkpoint", run, "--data", str(other)]) == 3
    assert "another vocabulary" in capsys.readouterr().err
