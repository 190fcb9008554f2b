"""`babybert probe`: features against one document at a time, and accuracies where the answer is known."""

import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import imdb_review_folder

from babybert.cli import main
from babybert.config import ModelConfig
from babybert.corpus.labelled import Labelled
from babybert.data.dataset import Dataset
from babybert.data.tokenizer import CLS, SEP
from babybert.evaluation.probe import bag_of_words, encode_documents, format_probe, pooled_states, probe
from babybert.model.bert import BabyBert
from babybert.training.train import pretrain

CPU = torch.device("cpu")


def decidable(count: int, seed: int) -> list[Labelled]:
    """Reviews whose words alone decide their label."""
    choose = random.Random(seed)
    documents = []
    for number in range(count):
        label = ("neg", "pos")[number % 2]
        judge = {"pos": ("wonderful", "superb", "brilliant"), "neg": ("terrible", "boring", "awful")}[label]
        words = [
            choose.choice(("the", "film", "movie", "mary", "is", "and", "in")) for _ in range(choose.randint(3, 9))
        ]
        words[choose.randrange(len(words))] = choose.choice(judge)
        documents.append(Labelled(f"{' '.join(words)} number {seed} {number}", label, None))
    return documents


@pytest.fixture(scope="module")
def bert(demo: Dataset) -> BabyBert:
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=16, heads=2, layers=1, feed_forward=16)).eval()


@pytest.mark.slow
def test_states_are_those_of_one_document_at_a_time(bert: BabyBert, demo: Dataset) -> None:
    documents = encode_documents(demo.tokenizer, [*decidable(7, 0), Labelled("mary " * 50, "pos", None)], 20)
    assert max(map(len, documents)) == 20 and all(ids[0] == CLS and ids[-1] == SEP for ids in documents)
    cls, mean = pooled_states(bert, documents, 3, CPU, "test")
    for row, ids in enumerate(documents):
        with torch.no_grad():
            hidden_TD = bert(torch.from_numpy(ids)[None], torch.ones(1, len(ids), dtype=torch.long))[0].numpy()
        assert cls[row] == pytest.approx(hidden_TD[0], abs=1e-5)
        assert mean[row] == pytest.approx(hidden_TD.mean(0), abs=1e-5)


def test_a_bag_of_words_has_a_one_for_each_word_of_a_document() -> None:
    bag = bag_of_words([np.array([CLS, 7, 9, 7, SEP]), np.array([CLS, 4, SEP])], 12).toarray()
    assert np.flatnonzero(bag[0]).tolist() == [7, 9] and bag.max() == 1
    assert bag[1].sum() == 0


@pytest.mark.slow
def test_labels_that_words_decide_are_learned_and_random_ones_are_not(bert: BabyBert, demo: Dataset) -> None:
    train, test = decidable(100, 1), decidable(100, 2)
    results = probe(bert, demo.tokenizer, train, test, 64, 0, 32, CPU)
    accuracy = {name: entry["value"] for name, entry in results["accuracy"].items()}
    assert accuracy["bag of words"] > 0.95
    assert accuracy["trained, mean"] > 0.7  # sums of random vectors keep some of the words
    assert accuracy["majority"] == 0.5
    for name, entry in results["accuracy"].items():
        low, high = entry["interval"]
        assert low <= entry["value"] <= high, name
    assert accuracy["gain of training, mean"] == pytest.approx(accuracy["trained, mean"] - accuracy["untrained, mean"])
    assert "bag of words" in format_probe(results)
    coin = random.Random(0)
    random_train = [Labelled(document.text, coin.choice("ab"), None) for document in train]
    random_test = [Labelled(document.text, coin.choice("ab"), None) for document in test]
    noise_results = probe(bert, demo.tokenizer, random_train, random_test, 64, 0, 32, CPU)
    for name in ("bag of words", "trained, mean", "trained, [CLS]"):
        assert abs(noise_results["accuracy"][name]["value"] - 0.5) < 0.15


def test_an_untrained_model_gains_nothing(bert: BabyBert, demo: Dataset) -> None:
    torch.manual_seed(5)
    untrained = BabyBert(bert.config)
    accuracy = probe(untrained, demo.tokenizer, decidable(40, 1), decidable(40, 2), 64, 5, 32, CPU)["accuracy"]
    assert accuracy["gain of training, mean"]["value"] == accuracy["gain of training, [CLS]"]["value"] == 0


@pytest.fixture
def run(small: Any) -> str:
    result = pretrain(small(max_steps=2))
    assert result is not None
    return str(result.checkpoint)


def test_the_command(capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path) -> None:
    imdb_review_folder(tmp_path / "imdb", sorted(document.text for document in decidable(80, 3)))
    command = ["probe", "--checkpoint", run, "--device", "cpu", "--documents", "30"]
    assert main([*command, "--source", str(tmp_path / "imdb")]) == 0
    assert "gain of training" in capsys.readouterr().out
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("text", "label"), *((document.text, document.label) for document in decidable(80, 4))]
        )
    assert main([*command, "--corpus", "csv", "--source", str(tmp_path / "x.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents_to_test_with"] == 30


def test_bad_inputs(
    capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(code: int, *flags: str) -> str:
        assert main(["probe", *flags]) == code
        return capsys.readouterr().err.splitlines()[-1]

    assert "no valid checkpoint" in fails(3, "--checkpoint", str(tmp_path))
    assert "no such file" in fails(3, "--checkpoint", run, "--source", str(tmp_path / "x.tar.gz"))
    (tmp_path / "plain.txt").write_text("a text", encoding="utf-8")
    assert "not IMDB's reviews" in fails(3, "--checkpoint", run, "--source", str(tmp_path))
    assert "documents is 1" in fails(2, "--documents", "1")
    imdb_review_folder(tmp_path / "imdb", [document.text for document in decidable(40, 3)])
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert "pip install 'babybert-pretrain[evaluate]'" in fails(
        2, "--checkpoint", run, "--source", str(tmp_path / "imdb")
    )
