"""`babybert evaluate --blimp`: accuracies by hand, baselines, intervals, tables, figure and errors."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tokenizer_of

from babybert.cli import main
from babybert.config import EvaluateConfig, ModelConfig, PretrainConfig
from babybert.corpus.minimal_pairs import MinimalPair
from babybert.data.dataset import Dataset
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, SEP, Tokenizer
from babybert.errors import DataError, UsageError
from babybert.evaluation.bigram_baseline import BigramBaseline
from babybert.evaluation.blimp import evaluate_blimp, sentence_targets, tokenize_pairs
from babybert.evaluation.blimp_report import format_blimp, plot_blimp
from babybert.evaluation.scores import unigram_log_probs
from babybert.model.bert import BabyBert
from babybert.training.train import pretrain

CPU = torch.device("cpu")


def pair(good: str, bad: str, paradigm: str = "p", phenomenon: str = "syntax") -> MinimalPair:
    return MinimalPair(good, bad, paradigm, phenomenon, "", f"{paradigm}.jsonl: line 1")


@pytest.fixture
def frequencies() -> tuple[BabyBert, Tokenizer]:
    """A model that gives each word its share, whatever is around it: a 1/2, b and c 1/8, d 1/4."""
    tokenizer = Tokenizer.of_words(["a", "b", "c", "d"])
    model = BabyBert(ModelConfig(vocab_size=tokenizer.size, width=8, heads=2, layers=1, feed_forward=8))
    with torch.no_grad():
        model.mlm_decoder.weight.zero_()
        model.mlm_decoder.bias.fill_(-20)
        model.mlm_decoder.bias[FIRST_ORDINARY:] = torch.tensor([0.5, 0.125, 0.125, 0.25]).log()
    return model, tokenizer


PAIRS = [
    pair("a b", "c d", "one", "x"),  # 1/16 above 1/32: right
    pair("b c", "b d", "one", "x"),  # 1/64 below 1/32: wrong
    pair("a b d", "d a b", "one", "x"),  # the same words: half
    pair("b", "c", "one", "x"),  # equally frequent: half
    pair("c", "d d", "two", "x"),  # 1/8 above 1/16: right, and shorter
    pair("a a a", "b", "three", "y"),  # 1/8 and 1/8: half, and longer
    pair("zebra a", "a", "three", "y"),  # an unknown word: wrong, and longer
]


def test_accuracies_by_hand(frequencies: tuple[BabyBert, Tokenizer]) -> None:
    report = evaluate_blimp(*frequencies, PAIRS, None, CPU, bf16=False, batch_positions=64)
    by_paradigm = {group["paradigm"]: group for group in report["by_paradigm"]}
    assert {name: group["within_word"] for name, group in by_paradigm.items()} == {"one": 0.5, "two": 1, "three": 0.25}
    assert {name: group["length"] for name, group in by_paradigm.items()} == {"one": 0.5, "two": 1, "three": 0}
    assert {name: group["ties"] for name, group in by_paradigm.items()} == {"one": 2, "two": 0, "three": 1}
    assert [(group["phenomenon"], group["paradigms"], group["plain"]) for group in report["by_phenomenon"]] == [
        ("x", 2, 0.75),  # the mean of paradigms: that of pairs would be 3/5
        ("y", 1, 0.25),
    ]
    overall = report["overall"]
    assert overall["within_word"] == overall["plain"] == pytest.approx((0.5 + 1 + 0.25) / 3, abs=1e-6)
    assert (report["pairs"], overall["pairs"], overall["paradigms"], overall["ties"]) == (7, 7, 3, 3)
    assert report["sentences"] == 12  # "b" and "c" occur twice
    assert overall["unknown_share"] == pytest.approx(1 / 26, abs=1e-6)
    assert by_paradigm["two"]["intervals"]["within_word"] == [1, 1]
    low, high = by_paradigm["one"]["intervals"]["within_word"]
    assert 0 <= low < 0.5 < high <= 1
    assert "bigram" not in overall


def test_the_bootstrap_resamples_the_pairs_of_each_paradigm(frequencies: tuple[BabyBert, Tokenizer]) -> None:
    """A paradigm's interval is that of a binomial share; the mean of two paradigms has a narrower one."""
    pairs = [pair(*(("a", "b") if index % 2 else ("b", "a")), f"p{index % 4 // 2}") for index in range(400)]
    report = evaluate_blimp(*frequencies, pairs, None, CPU, bf16=False, batch_positions=64)
    for group, count in ((report["by_paradigm"][0], 200), (report["overall"], 400)):
        low, high = group["intervals"]["within_word"]
        assert group["within_word"] == 0.5
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / count), rel=0.15)
    assert report == evaluate_blimp(*frequencies, pairs, None, CPU, bf16=False, batch_positions=64)


def test_baselines_on_the_same_pairs(demo: Dataset) -> None:
    torch.manual_seed(0)
    model = BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=8, heads=2, layers=1, feed_forward=8))
    pairs = [pair("She launches near the planet.", "She near planet the launches."), pair("the movie", "the planet")]
    train, counts_V = demo.examples("train"), demo.token_counts()
    report = evaluate_blimp(model, demo.tokenizer, pairs, train, CPU, bf16=False, batch_positions=64)
    baseline = BigramBaseline(train, counts_V)
    bigram, unigram = [], []
    for text in (text for of_pair in pairs for text in (of_pair.good, of_pair.bad)):
        ids = demo.tokenizer.encode(text)
        unigram.append(sum(unigram_log_probs(counts_V)[ids]))
        bigram.append(np.log(baseline.probabilities(sentence_targets([np.array(ids)]))).sum())
    assert report["overall"]["bigram"] == np.mean([bigram[0] > bigram[1], bigram[2] > bigram[3]])
    assert report["overall"]["unigram"] == (0.5 + (unigram[2] > unigram[3])) / 2  # the first has the same words: a tie
    assert len({*bigram, *unigram[1:]}) == 7  # no other ties


def test_the_neighbours_of_a_token_are_those_in_its_sentence() -> None:
    targets = sentence_targets([np.array([7, 8, 9]), np.array([6]), np.array([5, 5])])
    assert targets.word_N.tolist() == [7, 8, 9, 6, 5, 5]
    assert targets.left_N.tolist() == [CLS, 7, 8, CLS, CLS, 5]
    assert targets.right_N.tolist() == [8, 9, SEP, SEP, 5, SEP]
    assert targets.pair_N.tolist() == [0, 0, 0, 1, 2, 2]
    assert targets.position_N.tolist() == [1, 2, 3, 1, 1, 2]


def test_sentences_are_tokenized_as_requests_are_and_checked() -> None:
    tokenizer = tokenizer_of("the cat sleeps . [MASK]")
    tokenized = tokenize_pairs([pair("The CAT sleeps.", "the cat sleeps ."), pair("the", "The cat")], tokenizer, 8)
    assert [ids.tolist() for ids in tokenized.sentences] == [
        tokenizer.encode(text) for text in ("The cat sleeps.", "the", "the cat")
    ]
    assert (tokenized.good_P.tolist(), tokenized.bad_P.tolist()) == ([0, 1], [0, 2])
    with pytest.raises(DataError, match=r"p.jsonl: line 1: a sentence is 9 tokens long.*at most 8"):
        tokenize_pairs([pair("the cat", "the cat the cat the cat .")], tokenizer, 8)
    with pytest.raises(DataError, match=r"p.jsonl: line 1: a sentence has no words in it"):
        tokenize_pairs([pair("the cat", '""')], tokenizer, 8)


def test_tables_and_figure(frequencies: tuple[BabyBert, Tokenizer], tmp_path: Path) -> None:
    report = evaluate_blimp(*frequencies, PAIRS, None, CPU, bf16=False, batch_positions=64)
    report = {**report, "left_out": ["the baselines: no data"]}
    text = format_blimp(report)
    assert "BLiMP: 3 paradigms, 7 pairs, 12 sentences (tokenizer basic-english, fp32)" in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["phenomenon"] == ["phenomenon", "pairs", "model", "95%", "interval", "length", "ties", "unknown"]
    assert rows["y"][:3] == ["y", "2", "25.0%"] and rows["y"][-3:] == ["0.0%", "1", "14.3%"]
    assert rows["two"] == ["two", "1", "100.0%", "[100.0%,", "100.0%]", "100.0%", "0", "0.0%"]
    assert "all (mean of paradigms)" in rows and text.endswith("left out: the baselines: no data")
    for path in plot_blimp(report, tmp_path / "figure"):
        assert path.stat().st_size > 1000
    assert "GPT-2 81.5" in (tmp_path / "figure.svg").read_text()


@pytest.fixture
def blimp_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "blimp"
    folder.mkdir()
    row = {"UID": "order", "linguistics_term": "syntax", "sentence_good": "The movie was good."}
    rows = [{**row, "sentence_bad": text} for text in ("Movie the was good.", "The was movie good.")]
    (folder / "order.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    return folder


def test_the_command(
    small: Callable[..., PretrainConfig],
    blimp_folder: Path,
    demo_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(pretrain(small(epochs=1, max_steps=2)).checkpoint.parent)  # type: ignore[union-attr]
    capsys.readouterr()
    command = ["evaluate", run, "--blimp", str(blimp_folder), "--device", "cpu"]
    plot = ["--plot", str(tmp_path / "plot")]
    assert main([*command, "--data", str(demo_folder), "--json", *plot]) == 0
    captured = capsys.readouterr()
    report: dict[str, Any] = json.loads(captured.out)
    assert report["pairs"] == 2 and report["sentences"] == 3 and report["left_out"] == []
    assert {"within_word", "plain", "bigram", "unigram", "length", "intervals"} <= set(report["overall"])
    assert report["overall"]["length"] == 0.5 and report["overall"]["unigram"] == 0.5
    assert captured.err.splitlines()[-2:] == [str(tmp_path / "plot.png"), str(tmp_path / "plot.svg")]
    assert main([*command, "--data", str(tmp_path / "none")]) == 0
    assert "left out: the unigram and bigram baselines" in capsys.readouterr().out
    (blimp_folder / "order.jsonl").write_text("{}")
    assert main(command) == 3
    assert "no minimal pairs" in capsys.readouterr().err


def test_data_with_another_vocabulary_is_refused(
    small: Callable[..., PretrainConfig], blimp_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = pretrain(small(epochs=1, max_steps=1)).checkpoint  # type: ignore[union-attr]
    other = tmp_path / "other"
    assert main(["prepare", "--out", str(other), "--demo-documents", "40", "--min-frequency", "3"]) == 0
    assert main(["evaluate", str(checkpoint), "--blimp", str(blimp_folder), "--data", str(other)]) == 3
    assert "another vocabulary" in capsys.readouterr().err


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match="max_pairs is for held-out pairs"):
        EvaluateConfig(blimp="blimp.zip", max_pairs=3)
