"""`babybert explain`: the worked example agrees with training's losses and with the tokens, and is printed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from babybert.cli import main
from babybert.config import ModelConfig
from babybert.data.dataset import Dataset
from babybert.errors import UsageError
from babybert.evaluation.explain import explain, format_explanation, make_example, untrained
from babybert.model.bert import BabyBert
from babybert.model.loss import LossSums, PretrainingModel

A = "The movie was wonderful, and Mary is superb as the pilot!"
B = "She launches near the planet with a laser."


@pytest.fixture(scope="module")
def bert(demo: Dataset) -> BabyBert:
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=8, heads=2, layers=2, feed_forward=16)).eval()


@pytest.mark.parametrize("is_next", [True, False])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_losses_are_those_of_training(bert: BabyBert, demo: Dataset, is_next: bool, seed: int) -> None:
    explanation = explain(bert, demo.tokenizer, A, B, is_next, seed)
    example = make_example(demo.tokenizer, A, B, 512, seed)
    arrays = (example.ids, example.labels, example.segments)
    tensors = (torch.from_numpy(np.asarray(array, np.int64))[None] for array in arrays)
    with torch.no_grad():
        sums = LossSums.of(PretrainingModel(bert)(*tensors, torch.tensor([int(is_next)])))
    assert explanation["mlm_loss"] == pytest.approx(sums.mlm_loss.item(), rel=1e-5)
    assert explanation["nsp_loss"] == pytest.approx(sums.nsp_loss.item(), rel=1e-5)
    assert explanation["loss"] == pytest.approx(sums.loss.item(), rel=1e-5)
    assert len(explanation["targets"]) == sums.mlm_count.item() > 0


def test_the_example_is_explained_token_by_token(bert: BabyBert, demo: Dataset) -> None:
    explanation = explain(bert, demo.tokenizer, A, B, True, 3)
    tokens = explanation["tokens"]
    words_a = demo.tokenizer.tokens(demo.tokenizer.encode(A))
    words_b = demo.tokenizer.tokens(demo.tokenizer.encode(B))
    assert [token["token"] for token in tokens] == ["[CLS]", *words_a, "[SEP]", *words_b, "[SEP]"]
    assert [token["segment"] for token in tokens] == [1] * (len(words_a) + 2) + [2] * (len(words_b) + 1)
    assert [token["position"] for token in tokens] == list(range(len(tokens)))
    for token in tokens:
        if not token["chosen"]:
            assert token["input"] == token["token"] and token["label"] == 0 and not token["fate"]
        else:
            assert token["label"] == token["id"]
            assert token["input"] == {"masked": "[MASK]", "kept": token["token"]}.get(token["fate"], token["input"])
    for target in explanation["targets"]:
        assert target["log_probability"] == pytest.approx(target["logit"] - target["log_sum_exp"])
        assert (target["rank"] == 1) == (target["likeliest"][0] == target["target"])
    assert sum(explanation["next_sentence"]["probabilities"]) == pytest.approx(1)


def test_the_text_has_every_number(bert: BabyBert, demo: Dataset) -> None:
    explanation = explain(bert, demo.tokenizer, A, B, True, 0)
    text = format_explanation(explanation, "a model", width=100)
    for target in explanation["targets"]:
        assert f"{target['log_probability']:.4f}" in text
    assert f"= {explanation['mlm_loss']:.4f}" in text
    assert f"= {explanation['nsp_loss']:.4f}" in text
    assert f"= {explanation['loss']:.4f} nats" in text
    masked = [token for token in explanation["tokens"] if token["fate"] == "masked"]
    assert sum("masked" in line for line in text.splitlines()) == len(masked)


def test_wide_words_wrap_and_no_column_is_lost() -> None:
    sentence = f"{'w' * 100} is {'長い' * 15}"
    model, tokenizer = untrained(sentence, "so", 0)
    text = format_explanation(explain(model, tokenizer, sentence, "so", True, 0), "untrained", width=40)
    assert all(len(line) <= 78 for line in text.splitlines())
    assert text.count("w") >= 200  # as a token and as what the model is shown
    assert "likeliest" in text and "its id" in text


def test_a_long_pair_is_cut_as_prepare_does(demo: Dataset) -> None:
    assert len(make_example(demo.tokenizer, A * 60, B, 64, 0).ids) == 64


def test_without_a_known_word_there_is_no_target(bert: BabyBert, demo: Dataset) -> None:
    explanation = explain(bert, demo.tokenizer, "Xylophones quack", "Zebras yodel", True, 0)
    assert explanation["targets"] == [] and explanation["mlm_loss"] == 0
    assert "no word is chosen" in format_explanation(explanation, "a model")


def test_empty_sentences_are_refused(bert: BabyBert, demo: Dataset) -> None:
    for a, b in (("", B), (A, "  "), ('"', B)):
        with pytest.raises(UsageError):
            explain(bert, demo.tokenizer, a, b, True, 0)
        with pytest.raises(UsageError):
            model, tokenizer = untrained(a, b, 0)
            explain(model, tokenizer, a, b, True, 0)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["explain", A, B, "--no-is-next", "--json"]) == 0
    explanation = json.loads(capsys.readouterr().out)
    assert explanation["next_sentence"]["is_next"] == 0 and "untrained" in explanation["model"]
    assert main(["explain", A, B]) == 0
    assert "MLM loss" in capsys.readouterr().out
    assert main(["explain", A, B, "--checkpoint", str(tmp_path)]) == 3
    assert "no valid checkpoint" in capsys.readouterr().err
    assert main(["explain", "", B]) == 2
