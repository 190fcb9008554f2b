"""Predictions compared with the softmax of the model: alone, in batches, and in Hugging Face's pipeline."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import wordpiece_of
from torch import Tensor

from babybert.config import ModelConfig
from babybert.data.dataset import Dataset
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, UsageError
from babybert.model import plain_ops
from babybert.model.bert import BabyBert
from babybert.serving import predictor as predictor_module
from babybert.serving.predictor import BatchStats, Predictor
from babybert.serving.request_schema import FillMask, Item, NextSentence, parse_object


def make_predictor(tokenizer: Tokenizer, seed: int = 0) -> Predictor:
    """An untrained model of 40 positions, with random weights."""
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=tokenizer.size, width=16, feed_forward=16, max_positions=40)
    return Predictor(BabyBert(config), tokenizer)


@pytest.fixture(scope="module")
def predictor(demo: Dataset) -> Predictor:
    return make_predictor(demo.tokenizer)


def candidates(answer: dict[str, Any], key: str, mask: int = 0) -> list[Any]:
    """One key of each candidate for a mask."""
    return [candidate[key] for candidate in answer["masks"][mask]["candidates"]]


def assert_close(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same answer up to the rounding of scores."""
    if "probability" in expected:
        assert answer["probability"] == pytest.approx(expected["probability"], abs=1e-6)
        return
    for mask, expected_mask in zip(answer["masks"], expected["masks"], strict=True):
        assert mask["position"] == expected_mask["position"]
        pairs = list(zip(mask["candidates"], expected_mask["candidates"], strict=True))
        assert [one["sequence"] for one, _ in pairs] == [other["sequence"] for _, other in pairs]
        assert [one["score"] for one, _ in pairs] == pytest.approx([other["score"] for _, other in pairs], abs=1e-6)


def test_candidates_are_the_models_softmax(predictor: Predictor) -> None:
    tokenizer = predictor.tokenizer
    (answer,) = predictor.fill_mask(["Mary is [MASK] in the [MASK]."], top_k=4)
    assert [mask["position"] for mask in answer["masks"]] == [2, 5]
    ids = [1, *tokenizer.encode("mary is [MASK] in the [MASK] ."), 2]
    with torch.no_grad():
        hidden = predictor.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        probabilities = torch.softmax(predictor.model.mlm_logits(hidden[0, [3, 6]]).double(), -1)
    for mask in (0, 1):
        best = probabilities[mask].sort(descending=True)
        assert candidates(answer, "id", mask) == best.indices[:4].tolist()
        assert candidates(answer, "score", mask) == pytest.approx(best.values[:4].tolist(), rel=1e-4)
        tokens = [tokenizer.token(token_id) for token_id in candidates(answer, "id", mask)]
        assert candidates(answer, "token", mask) == tokens
    token = candidates(answer, "token")[0]
    assert candidates(answer, "sequence")[0] == f"mary is {token} in the [MASK] ."


def test_next_sentence_is_class_one(predictor: Predictor) -> None:
    (answer,) = predictor.next_sentence([("Mary is superb.", "She rides.")])
    encode = predictor.tokenizer.encode
    a, b = encode("Mary is superb."), encode("She rides.")
    ids = [1, *a, 2, *b, 2]
    segments = [1] * (len(a) + 2) + [2] * (len(b) + 1)
    with torch.no_grad():
        logits = predictor.model.nsp_logits(predictor.model(torch.tensor([ids]), torch.tensor([segments])))
    assert answer["probability"] == pytest.approx(torch.softmax(logits.double(), -1)[0, 1].item(), rel=1e-5)
    assert answer["is_next"] == (answer["probability"] >= 0.5)


def test_answers_do_not_depend_on_the_batch_and_an_invalid_item_affects_no_other(predictor: Predictor) -> None:
    items: list[Item] = [
        FillMask("The [MASK]."),
        NextSentence("Mary is superb. " * 4, "She rides."),
        FillMask("word " * 60 + "[MASK]"),
        NextSentence('"', "b"),
        NextSentence("Mary.", "She."),
        FillMask("[MASK] rides [MASK] a horse.", top_k=2),
        FillMask("The [MASK].", targets=("sheriff", "pilot")),
        FillMask("The [MASK].", targets=("sheriff", "xyzzy", "two words")),
    ] * 4
    together = predictor.predict(items)
    assert "'sentence_a' has no words" in str(together[3])
    assert "'text' is 63 tokens long, [CLS] and [SEP] included; the model takes at most 40" in str(together[2])
    assert "not one word of the vocabulary: 'xyzzy', 'two words'" in str(together[7])
    for item, answer in zip(items, together, strict=True):
        (alone,) = predictor.predict([item])
        if isinstance(alone, UsageError):
            assert str(alone) == str(answer)
        else:
            assert_close(answer, alone)
    with pytest.raises(UsageError):
        predictor.fill_mask(["word " * 60 + "[MASK]"])


def test_a_large_batch_goes_through_the_model_in_bounded_slices(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [FillMask(f"{'the ' * (i % 7)}[MASK] {'[MASK]' * (i % 3)}", top_k=1 + i % 4) for i in range(30)]
    items: Sequence[Item] = [*texts, *[NextSentence("a " * 9, "b")] * 5]
    expected_answers = predictor.predict(items)
    padded_positions: list[int] = []
    decoded_masks: list[int] = []
    hidden_at = predictor.model.hidden_at
    decode = predictor.model.mlm_decoder.forward

    def record_pass(ids_BT: Tensor, segments_BT: Tensor, query_M: Tensor) -> Tensor:
        padded_positions.append(ids_BT.numel())
        return hidden_at(ids_BT, segments_BT, query_M)

    def record_decoding(hidden_ND: Tensor) -> Tensor:
        decoded_masks.append(len(hidden_ND))
        return decode(hidden_ND)

    monkeypatch.setattr(predictor_module, "MAX_BATCH_POSITIONS", 50)
    monkeypatch.setattr(plain_ops, "MASKS_PER_SLICE", 3)
    monkeypatch.setattr(predictor.model, "hidden_at", record_pass)
    monkeypatch.setattr(predictor.model.mlm_decoder, "forward", record_decoding)
    stats = BatchStats()
    for answer, expected in zip(predictor.predict(items, stats), expected_answers, strict=True):
        assert_close(answer, expected)
    assert len(padded_positions) > 4
    assert max(padded_positions) <= 50
    assert max(decoded_masks) == 3
    assert stats.masks == sum(len(answer.get("masks", ())) for answer in expected_answers)
    text_tokens = sum(len(predictor.tokenizer.encode(item.text)) + 2 for item in texts)
    assert stats.tokens == text_tokens + 5 * (9 + 1 + 3)


def test_targets_have_their_scores_of_the_whole_softmax(predictor: Predictor) -> None:
    (all_words,) = predictor.fill_mask(["The [MASK] rides."], top_k=100)
    scores = dict(zip(candidates(all_words, "token"), candidates(all_words, "score"), strict=True))
    words = list(scores)[3:9:2]
    targets = [*words, words[0].upper()]  # the same word twice, once the tokenizer has lower-cased it
    (answer,) = predictor.fill_mask(["The [MASK] rides."], targets=targets)
    target_scores = dict(zip(candidates(answer, "token"), candidates(answer, "score"), strict=True))
    assert target_scores == pytest.approx({word: scores[word] for word in words})
    assert candidates(answer, "score") == sorted((scores[word] for word in words), reverse=True)
    (first,) = predictor.fill_mask(["The [MASK] rides."], top_k=1, targets=targets)
    assert first["masks"][0]["candidates"] == answer["masks"][0]["candidates"][:1]


def test_what_is_too_long_is_cut_with_truncate(predictor: Predictor) -> None:
    long, cut = "mary " + "the " * 60, "mary " + "the " * 36
    (truncated,) = predictor.predict([FillMask(f"[MASK] {long}", truncate=True)])
    (expected,) = predictor.fill_mask([f"[MASK] {cut}"])
    assert candidates(truncated, "score")[0] == pytest.approx(candidates(expected, "score")[0])
    (lost,) = predictor.predict([FillMask(f"[MASK] {long} [MASK] [MASK]", truncate=True, name="text[3]")])
    assert "'text[3]' cut to 38 tokens loses 2 of its 3 [MASK]s" in str(lost)
    (too_long,) = predictor.predict([NextSentence("a " * 50, "the " * 50, prefix="pairs[1].")])
    assert "'pairs[1].sentence_a' with 'sentence_b' is 103 tokens long" in str(too_long)


@pytest.mark.parametrize(
    ("length_a", "length_b", "kept_a", "kept_b"), [(50, 50, 19, 18), (50, 5, 32, 5), (5, 50, 5, 32)]
)
def test_a_pair_loses_the_end_of_its_longer_sentence(
    predictor: Predictor, length_a: int, length_b: int, kept_a: int, kept_b: int
) -> None:
    (truncated,) = predictor.predict([NextSentence("a " * length_a, "the " * length_b, truncate=True)])
    (expected,) = predictor.next_sentence([("a " * kept_a, "the " * kept_b)])
    assert truncated["probability"] == pytest.approx(expected["probability"], abs=1e-6)


def test_non_finite_scores_are_an_error_of_their_item_alone(demo: Dataset) -> None:
    predictor = make_predictor(demo.tokenizer)
    sheriff = demo.tokenizer.id_of("sheriff")
    assert sheriff is not None
    with torch.no_grad():
        predictor.model.embedding.token_embedding.embedding.weight[sheriff] = float("nan")
    items: list[Item] = [
        FillMask("The [MASK] rides."),
        FillMask("The sheriff [MASK]."),
        NextSentence("The sheriff.", "a"),
        FillMask("The sheriff [MASK].", targets=("the",)),
    ]
    answers = predictor.predict(items)
    (alone,) = predictor.predict(items[:1])
    assert candidates(answers[0], "score")[0] == pytest.approx(candidates(alone, "score")[0], abs=1e-6)
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
@pytest.mark.slow
def test_the_pipeline_format_is_that_of_transformers(
    demo: Dataset, kind: str, text: str | list[str], targets: list[str] | None
) -> None:
    """The same model behind transformers' own FillMaskPipeline gives the same answers."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; pip install 'babybert-pretrain[bench]'"
    )
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing
    from transformers.modeling_outputs import MaskedLMOutput

    documents = ["The sheriff rides a horse, she said.", "The pilot is superb."] * 3
    tokenizer = demo.tokenizer if kind == "basic-english" else wordpiece_of(*documents, vocab_size=60)
    ours = make_predictor(tokenizer, seed=1)

    class WrappedModel(transformers.BertPreTrainedModel):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(transformers.BertConfig(vocab_size=tokenizer.size))
            self.ours = ours.model

        def forward(self, input_ids: Tensor, **ignored: Any) -> Any:
            return MaskedLMOutput(logits=self.ours.mlm_logits(self.ours(input_ids, torch.ones_like(input_ids))))

    backend = Backend.from_str(tokenizer._backend.to_str())
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk")}
    wrapped_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    pipeline = transformers.FillMaskPipeline(model=WrappedModel(), tokenizer=wrapped_tokenizer, device="cpu")
    with_targets = {"targets": targets} if targets else {}
    expected = pipeline(text, top_k=3, **with_targets)
    request = parse_object({"inputs": text, "parameters": {"top_k": 3, **with_targets}})
    answers = ours.predict(request.items)
    assert_same_pipeline(answers[0] if request.single else answers, expected)


def assert_same_pipeline(answer: Any, expected: Any) -> None:
    """The same nested lists, and dicts with the same keys in the same order, up to the rounding of scores."""
    if isinstance(expected, list):
        assert len(answer) == len(expected)
        for one, other in zip(answer, expected, strict=True):
            assert_same_pipeline(one, other)
    else:
        assert list(answer) == list(expected)
        assert answer == {**expected, "score": pytest.approx(expected["score"], abs=1e-6)}
