import pytest
import torch

from babybert.config import ModelConfig
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, UsageError
from babybert.model import plain_ops
from babybert.model.bert import BabyBert
from babybert.serving import predictor as module
from babybert.serving.predictor import Predictor, Work
from babybert.serving.request_schema import FillMask, NextSentence, parse_object


@pytest.fixture(scope="module")
def predictor(demo):
    torch.manual_seed(0)
    return Predictor(
        BabyBert(
            ModelConfig(vocab_size=demo.tokenizer.size, width=16, heads=2, layers=2, feed_forward=16, max_positions=40)
        ),
        demo.tokenizer,
    )


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
    assert (
        answer["masks"][0]["candidates"][0]["sequence"]
        == f"mary is {answer['masks'][0]['candidates'][0]['token']} in the [MASK] ."
    )


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
    items = [
        FillMask("The [MASK]."),
        NextSentence("Mary is superb. " * 4, "She rides."),
        FillMask("word " * 60 + "[MASK]"),
        NextSentence('"', "b"),
        NextSentence("Mary.", "She."),
        FillMask("[MASK] rides [MASK] a horse.", top_k=2),
        FillMask("The [MASK].", targets=("sheriff", "pilot")),
        FillMask("The [MASK].", targets=("sheriff", "xyzzy", "two words")),
    ] * 4
    together = predictor.answer(items)
    assert "'sentence_a' has no words" in str(together[3])
    assert "'text' is 63 tokens long, [CLS] and [SEP] included; the model takes at most 40" in str(together[2])
    assert "not one word of the vocabulary: 'xyzzy', 'two words'" in str(together[7])
    for item, answer in zip(items, together, strict=True):
        (alone,) = predictor.answer([item])
        if isinstance(alone, UsageError):
            assert str(alone) == str(answer)
        elif "probability" in alone:
            assert answer["probability"] == pytest.approx(alone["probability"], abs=1e-6)
        else:
            for found, expected in zip(answer["masks"], alone["masks"], strict=True):
                assert [c["sequence"] for c in found["candidates"]] == [c["sequence"] for c in expected["candidates"]]
                assert [c["score"] for c in found["candidates"]] == pytest.approx(
                    [c["score"] for c in expected["candidates"]], abs=1e-6
                )
    with pytest.raises(UsageError):
        predictor.fill_mask(["word " * 60 + "[MASK]"])


def test_a_large_batch_goes_through_in_bounded_slices(predictor, monkeypatch):
    items = [FillMask(f"{'the ' * (i % 7)}[MASK] {'[MASK]' * (i % 3)}", top_k=1 + i % 4) for i in range(30)] + [
        NextSentence("a " * 9, "b")
    ] * 5
    whole = predictor.answer(items)
    shapes = []
    monkeypatch.setattr(module, "SLICE_POSITIONS", 50)
    monkeypatch.setattr(plain_ops, "MASKS_PER_SLICE", 3)
    hidden_at, decoder = predictor.model.hidden_at, predictor.model.mlm_decoder
    monkeypatch.setattr(
        predictor.model,
        "hidden_at",
        lambda ids, segments, asked: shapes.append(ids.shape) or hidden_at(ids, segments, asked),
    )
    monkeypatch.setattr(decoder, "forward", lambda h, forward=decoder.forward: shapes.append((len(h), 0)) or forward(h))
    work = Work()
    for found, expected in zip(predictor.answer(items, work), whole, strict=True):
        if "probability" in expected:
            assert found["probability"] == pytest.approx(expected["probability"], abs=1e-6)
        else:
            for one, other in zip(found["masks"], expected["masks"], strict=True):
                assert one["position"] == other["position"]
                assert [c["score"] for c in one["candidates"]] == pytest.approx(
                    [c["score"] for c in other["candidates"]], abs=1e-6
                )
    passes = [shape for shape in shapes if shape[1]]
    assert len(passes) > 4
    assert max(b * t for b, t in passes) <= 50
    assert max(n for n, zero in shapes if not zero) == 3
    assert work.masks == sum(len(answer.get("masks", ())) for answer in whole)
    assert work.tokens == sum(len(predictor.tokenizer.encode(item.text)) + 2 for item in items[:30]) + 5 * (9 + 1 + 3)


def test_targets_have_the_scores_of_the_whole_softmax(predictor):
    (everything,) = predictor.fill_mask(["The [MASK] rides."], top_k=100)
    scores = {c["token"]: c["score"] for c in everything["masks"][0]["candidates"]}
    asked = [*list(scores)[3:9:2], list(scores)[3].upper()]
    (answer,) = predictor.fill_mask(["The [MASK] rides."], targets=asked)
    assert {c["token"]: c["score"] for c in answer["masks"][0]["candidates"]} == pytest.approx(
        {token: scores[token] for token in asked[:3]}
    )
    assert [c["score"] for c in answer["masks"][0]["candidates"]] == sorted(
        (scores[token] for token in asked[:3]), reverse=True
    )
    (first,) = predictor.fill_mask(["The [MASK] rides."], top_k=1, targets=asked)
    assert first["masks"][0]["candidates"] == answer["masks"][0]["candidates"][:1]


def test_what_is_too_long_is_cut_where_it_is_asked(predictor):
    long, cut = "mary " + "the " * 60, "mary " + "the " * 36
    assert predictor.answer([FillMask(f"[MASK] {long}", truncate=True)])[0]["masks"][0]["candidates"][0][
        "score"
    ] == pytest.approx(predictor.fill_mask([f"[MASK] {cut}"])[0]["masks"][0]["candidates"][0]["score"])
    (lost,) = predictor.answer([FillMask(f"[MASK] {long} [MASK] [MASK]", truncate=True, name="text[3]")])
    assert "'text[3]' cut to 38 tokens loses 2 of its 3 [MASK]s" in str(lost)
    for a, b, kept_a, kept_b in (
        ("a " * 50, "the " * 50, 19, 18),
        ("a " * 50, "the " * 5, 32, 5),
        ("a " * 5, "the " * 50, 5, 32),
    ):
        (found,) = predictor.answer([NextSentence(a, b, truncate=True)])
        (expected,) = predictor.next_sentence([("a " * kept_a, "the " * kept_b)])
        assert found["probability"] == pytest.approx(expected["probability"], abs=1e-6)
    assert "'pairs[1].sentence_a' with 'sentence_b' is 103 tokens long" in str(
        predictor.answer([NextSentence("a " * 50, "the " * 50, prefix="pairs[1].")])[0]
    )


def test_weights_that_are_no_numbers_are_an_error_of_their_row_alone(demo):
    torch.manual_seed(0)
    predictor = Predictor(
        BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=16, feed_forward=16, max_positions=40)),
        demo.tokenizer,
    )
    with torch.no_grad():
        predictor.model.embedding.token_embedding.embedding.weight[demo.tokenizer.id_of("sheriff")] = float("nan")
    items = [
        FillMask("The [MASK] rides."),
        FillMask("The sheriff [MASK]."),
        NextSentence("The sheriff.", "a"),
        FillMask("The sheriff [MASK].", targets=("the",)),
    ]
    answers = predictor.answer(items)
    (alone,) = predictor.answer(items[:1])
    assert answers[0]["masks"][0]["candidates"][0]["score"] == pytest.approx(
        alone["masks"][0]["candidates"][0]["score"], abs=1e-6
    )
    assert all(isinstance(answer, DataError) and "no finite score" in str(answer) for answer in answers[1:])


@pytest.mark.parametrize("kind", ["basic-english", "wordpiece"])
@pytest.mark.parametrize(
    "text",
    [
        "The [MASK] rides.",
        "A [MASK] is [MASK], she said.",
        ["The [MASK]."],
        ["The qqq [MASK].", "[MASK] [MASK]", "[PAD] a [MASK]"],
    ],
)
@pytest.mark.parametrize("targets", [None, ["the", "Rides"]])
def test_the_pipeline_form_is_the_pipelines(demo, kind, text, targets):
    """The same weights' logits behind transformers' own FillMaskPipeline."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; pip install 'babybert-pretrain[bench]'"
    )
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing
    from transformers.modeling_outputs import MaskedLMOutput

    documents = ["The sheriff rides a horse, she said.", "The pilot is superb."] * 3
    tokenizer = demo.tokenizer if kind == "basic-english" else Tokenizer.train_wordpiece(documents, 1, 60)
    torch.manual_seed(1)
    mine = Predictor(
        BabyBert(ModelConfig(vocab_size=tokenizer.size, width=16, feed_forward=16, max_positions=40)), tokenizer
    )

    class Model(transformers.BertPreTrainedModel):
        def __init__(self):
            super().__init__(transformers.BertConfig(vocab_size=tokenizer.size))
            self.ours = mine.model

        def forward(self, input_ids, **ignored):
            return MaskedLMOutput(logits=self.ours.mlm_logits(self.ours(input_ids, torch.ones_like(input_ids))))

    backend = Backend.from_str(tokenizer._backend.to_str())
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk")}
    pipeline = transformers.FillMaskPipeline(
        model=Model(), tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names), device="cpu"
    )
    expected = pipeline(text, top_k=3, **({"targets": targets} if targets else {}))
    request = parse_object({"inputs": text, "parameters": {"top_k": 3, **({"targets": targets} if targets else {})}})
    answers = mine.answer(request.items)
    compare(answers[0] if request.single else answers, expected)


def compare(found, expected):
    """The same lists of the same keys in the same order, with the same values but for the last bits of scores."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            compare(one, other)
    else:
        assert list(found) == list(expected)
        assert found == {**expected, "score": pytest.approx(expected["score"], abs=1e-6)}
