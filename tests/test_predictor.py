import pytest
import torch

from babybert.config import ModelConfig
from babybert.errors import UsageError
from babybert.inference.predictor import FillMask, NextSentence, Predictor, parse_request
from babybert.model.bert import BabyBert


@pytest.fixture(scope="module")
def predictor(demo):
    torch.manual_seed(0)
    return Predictor(BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=16, heads=2, layers=2, feed_forward=16, max_positions=40)), demo.tokenizer)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "must be a JSON object, not null"),
        ([], "must be a JSON object, not a list"),
        ("text", "must be a JSON object, not a string"),
        ({}, "neither 'text'"),
        ({"txt": "[MASK]"}, "neither 'text'"),
        ({"text": 5}, "'text' must be a string, not a number"),
        ({"text": "  "}, "'text' is empty"),
        ({"text": "no mask"}, r"no \[MASK\]"),
        ({"text": "[MASK]", "top_k": 0}, "'top_k' is 0; it must be a whole number from 1 to 100"),
        ({"text": "[MASK]", "top_k": 101}, "'top_k' is 101"),
        ({"text": "[MASK]", "top_k": True}, "'top_k' is True"),
        ({"text": "[MASK]", "top_k": 2.0}, "'top_k' is 2.0"),
        ({"text": "[MASK]", "sentence_a": "a"}, "unknown key 'sentence_a'; this task takes text, top_k"),
        ({"sentence_a": "a"}, "'sentence_b' is missing"),
        ({"sentence_b": "a"}, "'sentence_a' is missing"),
        ({"sentence_a": "a", "sentence_b": None}, "'sentence_b' must be a string, not null"),
        ({"text": "[MASK] \ud800"}, "surrogate"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(body, message):
    with pytest.raises(UsageError, match=message):
        parse_request(body)


def test_good_requests():
    assert parse_request({"text": "a [MASK]", "top_k": 3}) == FillMask("a [MASK]", 3)
    assert parse_request({"sentence_a": "a", "sentence_b": "b"}) == NextSentence("a", "b")


def test_candidates_are_the_models_softmax(predictor):
    tokenizer = predictor.tokenizer
    (answer,) = predictor.fill_mask(["Mary is [MASK] in the [MASK]."], top_k=4)
    assert [mask["position"] for mask in answer["masks"]] == [2, 5]
    ids = [1, *tokenizer.encode("mary is [MASK] in the [MASK] ."), 2]
    with torch.no_grad():
        hidden = predictor.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        expected = torch.softmax(predictor.model.mlm_logits(hidden[0, [3, 6]]).double(), -1)
    for mask, probability in zip(answer["masks"], expected, strict=True):
        best = probability.sort(descending=True)
        assert [c["id"] for c in mask["candidates"]] == best.indices[:4].tolist()
        assert [c["score"] for c in mask["candidates"]] == pytest.approx(best.values[:4].tolist(), rel=1e-4)
        for candidate in mask["candidates"]:
            assert tokenizer.token(candidate["id"]) == candidate["token"]
    assert answer["masks"][0]["candidates"][0]["sequence"] == f"mary is {answer['masks'][0]['candidates'][0]['token']} in the [MASK] ."


def test_next_sentence_is_class_one(predictor):
    (answer,) = predictor.next_sentence([("Mary is superb.", "She rides.")])
    encode = predictor.tokenizer.encode
    a, b = encode("Mary is superb."), encode("She rides.")
    ids, segments = [1, *a, 2, *b, 2], [1] * (len(a) + 2) + [2] * (len(b) + 1)
    with torch.no_grad():
        logits = predictor.model.nsp_logits(predictor.model(torch.tensor([ids]), torch.tensor([segments])))
    assert answer["probability"] == pytest.approx(torch.softmax(logits.double(), -1)[0, 1].item(), rel=1e-5)
    assert answer["is_next"] == (answer["probability"] >= 0.5)


def test_answers_do_not_depend_on_the_batch_and_a_bad_one_harms_none(predictor):
    requests = [
        FillMask("The [MASK]."),
        NextSentence("Mary is superb. " * 4, "She rides."),
        FillMask("word " * 60 + "[MASK]"),
        NextSentence('"', "b"),
        NextSentence("Mary.", "She."),
    ]
    together = predictor.answer(requests)
    assert "'sentence_a' has no words" in str(together[3])
    assert "63 tokens long" in str(together[2])
    assert "at most 40" in str(together[2])
    for index in (0, 1, 4):
        (alone,) = predictor.answer([requests[index]])
        assert isinstance(alone, dict)
        if "probability" in alone:
            assert together[index]["probability"] == pytest.approx(alone["probability"], abs=1e-6)
        else:
            found, expected = together[index]["masks"][0]["candidates"], alone["masks"][0]["candidates"]
            assert [c["token"] for c in found] == [c["token"] for c in expected]
            assert [c["score"] for c in found] == pytest.approx([c["score"] for c in expected], abs=1e-6)
    with pytest.raises(UsageError):
        predictor.fill_mask(["word " * 60 + "[MASK]"])
