import json

import numpy as np
import pytest
import torch

from babybert.cli import main
from babybert.config import ModelConfig
from babybert.errors import UsageError
from babybert.evaluation.explain import explain, make_example, show, untrained
from babybert.model.bert import BabyBert
from babybert.model.loss import LossSums, PretrainingModel

A, B = "The movie was wonderful, and Mary is superb as the pilot!", "She launches near the planet with a laser."


@pytest.fixture(scope="module")
def bert(demo):
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=8, heads=2, layers=2, feed_forward=16)).eval()


@pytest.mark.parametrize("is_next", [True, False])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_losses_are_those_of_training(bert, demo, is_next, seed):
    found = explain(bert, demo.tokenizer, A, B, is_next, seed)
    _, segments, masked, labels = make_example(demo.tokenizer, A, B, 512, seed)
    tensors = (torch.from_numpy(np.asarray(x, np.int64))[None] for x in (masked, labels, segments))
    with torch.no_grad():
        totals = LossSums.of(PretrainingModel(bert)(*tensors, torch.tensor([int(is_next)])))
    assert found["mlm_loss"] == pytest.approx(totals.mlm_loss.item(), rel=1e-5)
    assert found["nsp_loss"] == pytest.approx(totals.nsp_loss.item(), rel=1e-5)
    assert found["loss"] == pytest.approx(totals.loss.item(), rel=1e-5)
    assert len(found["targets"]) == totals.mlm_count.item() > 0


def test_the_example_is_followed_token_by_token(bert, demo):
    found = explain(bert, demo.tokenizer, A, B, True, 3)
    tokens = found["tokens"]
    words = demo.tokenizer.tokens([*demo.tokenizer.encode(A)]), demo.tokenizer.tokens(demo.tokenizer.encode(B))
    assert [token["token"] for token in tokens] == ["[CLS]", *words[0], "[SEP]", *words[1], "[SEP]"]
    assert [token["segment"] for token in tokens] == [1] * (len(words[0]) + 2) + [2] * (len(words[1]) + 1)
    assert [token["position"] for token in tokens] == list(range(len(tokens)))
    for token in tokens:
        if not token["chosen"]:
            assert token["input"] == token["token"] and token["label"] == 0 and not token["fate"]
        else:
            assert token["label"] == token["id"]
            assert token["input"] == {"masked": "[MASK]", "kept": token["token"]}.get(token["fate"], token["input"])
    for target in found["targets"]:
        assert target["log_probability"] == pytest.approx(target["logit"] - target["log_sum_exp"])
        assert (target["rank"] == 1) == (target["likeliest"][0] == target["target"])
    assert sum(found["next_sentence"]["probabilities"]) == pytest.approx(1)


def test_the_text_has_every_number(bert, demo):
    found = explain(bert, demo.tokenizer, A, B, True, 0)
    text = show(found, "a model", width=100)
    for target in found["targets"]:
        assert f"{target['log_probability']:.4f}" in text
    assert (
        f"= {found['mlm_loss']:.4f}" in text
        and f"= {found['nsp_loss']:.4f}" in text
        and f"= {found['loss']:.4f} nats" in text
    )
    assert len([line for line in text.splitlines() if "masked" in line]) == sum(
        token["fate"] == "masked" for token in found["tokens"]
    )


def test_wide_words_wrap_and_no_column_is_lost():
    long = "w" * 200
    model, tokenizer = untrained(f"{long} is 長い長い長い長い長い長い長い長い長い長い長い長い長い長い長い", "so", 0)
    text = show(
        explain(
            model, tokenizer, f"{long} is 長い長い長い長い長い長い長い長い長い長い長い長い長い長い長い", "so", True, 0
        ),
        "untrained",
        width=40,
    )
    assert all(len(line) <= 78 for line in text.splitlines())
    assert text.count("w") >= 400  # as a token and as what the model is shown
    assert "likeliest" in text and "its id" in text


def test_a_long_pair_is_cut_as_prepare_does(bert, demo):
    ids, *_ = make_example(demo.tokenizer, A * 60, B, 64, 0)
    assert len(ids) == 64


def test_no_known_word_means_no_target(bert, demo):
    found = explain(bert, demo.tokenizer, "Xylophones quack", "Zebras yodel", True, 0)
    assert found["targets"] == [] and found["mlm_loss"] == 0
    assert "nothing is chosen" in show(found, "a model")


def test_what_is_no_sentence_is_refused(bert, demo):
    for a, b in (("", B), (A, "  "), ('"', B)):
        with pytest.raises(UsageError):
            explain(bert, demo.tokenizer, a, b, True, 0)
        with pytest.raises(UsageError):
            model, tokenizer = untrained(a, b, 0)
            explain(model, tokenizer, a, b, True, 0)


def test_the_command(capsys, tmp_path):
    assert main(["explain", A, B, "--no-is-next", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["next_sentence"]["is_next"] == 0 and "untrained" in found["model"]
    assert main(["explain", A, B]) == 0
    assert "MLM loss" in capsys.readouterr().out
    assert main(["explain", A, B, "--checkpoint", str(tmp_path)]) == 3
    assert "no whole checkpoint" in capsys.readouterr().err
    assert main(["explain", "", B]) == 2
