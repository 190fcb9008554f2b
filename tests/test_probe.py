import csv
import json
import random
import sys

import numpy as np
import pytest
import torch
from conftest import imdb_review_folder

from babybert.cli import main
from babybert.config import ModelConfig
from babybert.corpus.labelled import Labelled
from babybert.data.tokenizer import CLS, SEP
from babybert.evaluation.probe import _bag_of_words, _encode, _states, probe, show
from babybert.model.bert import BabyBert
from babybert.training.train import pretrain

CPU = torch.device("cpu")


def decidable(count, seed):
    """Reviews whose label is told by their words alone."""
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
def bert(demo):
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=16, heads=2, layers=1, feed_forward=16)).eval()


@pytest.mark.slow
def test_states_are_those_of_one_document_at_a_time(bert, demo):
    documents = _encode(demo.tokenizer, [*decidable(7, 0), Labelled("mary " * 50, "pos", None)], 20)
    assert max(map(len, documents)) == 20 and all(ids[0] == CLS and ids[-1] == SEP for ids in documents)
    cls, mean = _states(bert, documents, 3, CPU, "test")
    for row, ids in enumerate(documents):
        with torch.no_grad():
            hidden_TD = bert(torch.from_numpy(ids)[None], torch.ones(1, len(ids), dtype=torch.long))[0].numpy()
        assert cls[row] == pytest.approx(hidden_TD[0], abs=1e-5)
        assert mean[row] == pytest.approx(hidden_TD.mean(0), abs=1e-5)


def test_a_bag_says_which_words_are_there():
    bag = _bag_of_words([np.array([CLS, 7, 9, 7, SEP]), np.array([CLS, 4, SEP])], 12).toarray()
    assert np.flatnonzero(bag[0]).tolist() == [7, 9] and bag.max() == 1
    assert bag[1].sum() == 0


@pytest.mark.slow
def test_what_words_decide_is_found_and_what_is_random_is_not(bert, demo):
    train, test = decidable(100, 1), decidable(100, 2)
    found = probe(bert, demo.tokenizer, train, test, 64, 0, 32, CPU)
    accuracy = {name: own["value"] for name, own in found["accuracy"].items()}
    assert accuracy["bag of words"] > 0.95
    assert accuracy["trained, mean"] > 0.7  # sums of random vectors keep some of the words
    assert accuracy["majority"] == 0.5
    for name, own in found["accuracy"].items():
        assert own["interval"][0] <= own["value"] <= own["interval"][1], name
    assert accuracy["gain of training, mean"] == pytest.approx(accuracy["trained, mean"] - accuracy["untrained, mean"])
    assert "bag of words" in show(found)
    coin = random.Random(0)
    noise = [[Labelled(document.text, coin.choice("ab"), None) for document in part] for part in (train, test)]
    accuracy = probe(bert, demo.tokenizer, *noise, 64, 0, 32, CPU)["accuracy"]
    assert all(
        abs(accuracy[name]["value"] - 0.5) < 0.15 for name in ("bag of words", "trained, mean", "trained, [CLS]")
    )


@pytest.mark.slow
def test_training_gains_nothing_over_itself(bert, demo):
    torch.manual_seed(5)
    fresh = BabyBert(bert.config)
    found = probe(fresh, demo.tokenizer, decidable(40, 1), decidable(40, 2), 64, 5, 32, CPU)["accuracy"]
    assert found["gain of training, mean"]["value"] == found["gain of training, [CLS]"]["value"] == 0


@pytest.mark.slow
def test_the_command(capsys, small, tmp_path):
    run = str(pretrain(small(max_steps=2)).checkpoint)
    imdb_review_folder(
        tmp_path / "imdb", [document.text for document in sorted(decidable(80, 3), key=lambda document: document.text)]
    )
    command = ["probe", "--checkpoint", run, "--device", "cpu", "--documents", "30"]
    assert main([*command, "--source", str(tmp_path / "imdb")]) == 0
    assert "gain of training" in capsys.readouterr().out
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("text", "label"), *((document.text, document.label) for document in decidable(80, 4))]
        )
    assert main([*command, "--corpus", "csv", "--source", str(tmp_path / "x.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents_to_test_with"] == 30


def test_bad_inputs(capsys, small, tmp_path, monkeypatch):
    def fails(code, *flags):
        assert main(["probe", *flags]) == code
        return capsys.readouterr().err.splitlines()[-1]

    run = str(pretrain(small(max_steps=2)).checkpoint)
    assert "no whole checkpoint" in fails(3, "--checkpoint", str(tmp_path))
    assert "no such file" in fails(3, "--checkpoint", run, "--source", str(tmp_path / "x.tar.gz"))
    (tmp_path / "plain.txt").write_text("a text", encoding="utf-8")
    assert "not IMDB's reviews" in fails(3, "--checkpoint", run, "--source", str(tmp_path))
    assert "documents is 1" in fails(2, "--documents", "1")
    imdb_review_folder(tmp_path / "imdb", [document.text for document in decidable(40, 3)])
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert "pip install 'babybert-pretrain[evaluate]'" in fails(
        2, "--checkpoint", run, "--source", str(tmp_path / "imdb")
    )
