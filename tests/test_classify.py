"""A fine-tuned classifier answers requests: in our format and Hugging Face's, with its errors, and in an archive."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from babybert.checkpoint.format import save_model
from babybert.cli import main
from babybert.config import ClassifierConfig, ModelConfig
from babybert.data.classifier_input import classifier_input
from babybert.data.dataset import Dataset
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, UsageError
from babybert.model.bert import BabyBert
from babybert.model.classifier import TextClassifier
from babybert.playground.app import PlaygroundSources, about
from babybert.playground.backends import LocalBackend, respond
from babybert.serving.predictor import Predictor
from babybert.serving.request_schema import (
    NO_CLASSES,
    NOT_PRETRAINED,
    Classify,
    FillMask,
    NextSentence,
    parse_object,
)

SIZES = {"width": 16, "heads": 2, "layers": 1, "feed_forward": 16}
CLASSES = ("neg", "so so", "pos")
TEXT, LONG = "The sheriff is superb.", "superb " * 50


def make_classifier(tokenizer: Tokenizer, pairs: bool = False, positions: int = 20) -> TextClassifier:
    torch.manual_seed(3)
    classifier = ClassifierConfig(CLASSES, pairs, positions, 0.25)
    model = TextClassifier(ModelConfig(tokenizer.size, **SIZES), classifier)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.class_head[-1].weight)  # type: ignore[arg-type]
    return model.eval()


@pytest.fixture(scope="module")
def texts(demo: Dataset) -> Predictor:
    return Predictor(make_classifier(demo.tokenizer), demo.tokenizer)


@pytest.fixture(scope="module")
def pairs(demo: Dataset) -> Predictor:
    return Predictor(make_classifier(demo.tokenizer, pairs=True), demo.tokenizer)


@pytest.fixture(scope="module")
def pretrained(demo: Dataset) -> Predictor:
    torch.manual_seed(0)
    return Predictor(BabyBert(ModelConfig(demo.tokenizer.size, **SIZES)), demo.tokenizer)  # type: ignore[arg-type]


def ask(predictor: Predictor, body: Any) -> tuple[int, Any]:
    response = respond(predictor, json.dumps(body).encode())
    return response.status, response.body


def expected_probabilities(predictor: Predictor, a: str, b: str | None = None) -> list[float]:
    """From the model alone, as it is scored in training."""
    model = predictor.encoder
    assert isinstance(model, TextClassifier)
    encoded = predictor.tokenizer.encode_documents([a, b or ""])
    ids, length_a = classifier_input(encoded[0], None if b is None else encoded[1], model.classifier)
    segments = np.where(np.arange(len(ids)) < length_a, 1, 2)
    with torch.inference_mode():
        logits_1C = model.class_logits(torch.from_numpy(ids).long()[None], torch.from_numpy(segments).long()[None])
    probabilities: list[float] = logits_1C.softmax(-1)[0].tolist()
    return probabilities


def test_a_text_is_answered_with_all_classes(texts: Predictor) -> None:
    status, answer = ask(texts, {"classify": TEXT})
    assert status == 200
    assert list(answer["probabilities"]) == list(CLASSES)
    assert list(answer["probabilities"].values()) == pytest.approx(expected_probabilities(texts, TEXT), abs=1e-6)
    assert answer["probability"] == answer["probabilities"][answer["label"]] == max(answer["probabilities"].values())
    status, answers = ask(texts, {"classify": [TEXT, "A dull film", TEXT]})
    assert status == 200 and len(answers) == 3
    assert answers[0]["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-6)


def test_pairs_are_answered(pairs: Predictor) -> None:
    status, answer = ask(pairs, {"classify": [TEXT, "It is dull."]})
    expected = expected_probabilities(pairs, TEXT, "It is dull.")
    assert status == 200 and list(answer["probabilities"].values()) == pytest.approx(expected, abs=1e-6)
    status, answers = ask(pairs, {"classify": [["a", "b"], [TEXT, "It is dull."]]})
    assert [*answers[1]["probabilities"].values()] == pytest.approx(expected, abs=1e-6)


def test_special_tokens_in_a_text_are_ordinary_text_as_in_training(texts: Predictor) -> None:
    encoded = texts.encode(Classify("a [SEP] [MASK] b"))
    assert encoded.ids.count(2) == 1 and 3 not in encoded.ids


def test_a_long_text_is_refused_or_cut_as_in_training(texts: Predictor) -> None:
    status, answer = ask(texts, {"classify": ["a", LONG]})
    assert status == 400
    assert answer["error"].startswith("'classify[1]' is 52 tokens long, [CLS] and [SEP] included; the model takes at")
    assert "at most 20" in answer["error"]
    status, answer = ask(texts, {"classify": LONG, "truncate": True})
    assert list(answer["probabilities"].values()) == pytest.approx(expected_probabilities(texts, LONG), abs=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"classify": ""}, "'classify' is empty"),
        ({"classify": '"'}, "'classify' has no words in it"),
        ({"classify": []}, "'classify' is an empty list"),
        ({"classify": 5}, "'classify' must be a string or a list, not a number"),
        ({"classify": ["a", 5]}, "'classify[1]' must be a string, not a number"),
        ({"classify": [["a", "b"]]}, "'classify[0]' is a list; this model was trained on single texts"),
        ({"classify": ["a"] * 33}, "'classify' is a list of 33; at most 32 are answered"),
        ({"classify": "a" * 10_001}, "'classify' is 10,001 characters long; at most 10,000 are read"),
        ({"classify": "a", "truncate": 1}, "'truncate' must be true or false, not a number"),
        ({"classify": "a", "top_k": 1}, "unknown key 'top_k'; this task takes classify, truncate"),
        ({"inputs": "a", "parameters": {"top_k": 0}}, "'top_k' is 0; it must be a whole number from 1 on"),
        ({"inputs": {"text": "a", "text_pair": "b"}}, "'inputs' is a list; this model was trained on single texts"),
        ({"inputs": {"text_pair": "b"}}, "'text' is missing; 'inputs' takes text, text_pair"),
        ({"text": "a [MASK]"}, NOT_PRETRAINED),
        ({"sentence_a": "a", "sentence_b": "b"}, NOT_PRETRAINED),
        ({}, "the body has none of 'classify' and 'inputs'"),
    ],
)
def test_what_a_classifier_of_texts_refuses(texts: Predictor, body: Any, message: str) -> None:
    status, answer = ask(texts, body)
    assert status == 400 and message in answer["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"classify": "a"}, "'classify' is a string; this model was trained on pairs, so it must be two strings"),
        ({"classify": ["a"]}, "'classify' is a list of 1; this model was trained on pairs"),
        ({"classify": [["a", "b"], "c"]}, "'classify[1]' is a string; this model was trained on pairs"),
        ({"classify": ["a", ""]}, "'classify[1]' is empty"),
        ({"inputs": "a"}, "'inputs' is a string; this model was trained on pairs"),
    ],
)
def test_what_a_classifier_of_pairs_refuses(pairs: Predictor, body: Any, message: str) -> None:
    status, answer = ask(pairs, body)
    assert status == 400 and message in answer["error"]


def test_each_kind_of_model_refuses_the_tasks_of_the_other(texts: Predictor, pretrained: Predictor) -> None:
    assert ask(pretrained, {"classify": "a"}) == (400, {"error": NO_CLASSES})
    for item in (FillMask("[MASK]"), NextSentence("a", "b")):
        (error,) = texts.predict([item])
        assert isinstance(error, UsageError) and str(error) == NOT_PRETRAINED
    with pytest.raises(UsageError, match="is not fine-tuned"):
        pretrained.classify([("a", None)])
    with pytest.raises(UsageError, match="trained on single texts"):
        texts.classify([("a", "b")])
    assert pretrained.classifier is None
    for predictor in (texts, pretrained):
        assert not [answer for answer in predictor.predict(predictor.warm_up_items()) if isinstance(answer, Exception)]


LEAF = st.none() | st.booleans() | st.integers(-2, 40) | st.text(max_size=5)
KEYS = st.sampled_from(["classify", "inputs", "parameters", "truncate", "top_k", "text", "text_pair", "pairs"])
VALUE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(KEYS, VALUE, min_size=1, max_size=3), st.booleans())
def test_any_body_is_a_request_of_the_model_or_a_usage_error(body: dict[str, Any], reads_pairs: bool) -> None:
    try:
        request = parse_object(body, ClassifierConfig(CLASSES, reads_pairs, 20, 0.25))
    except UsageError:
        return
    assert request.items and all(isinstance(item, Classify) for item in request.items)
    assert {item.pair is not None for item in request.items if isinstance(item, Classify)} == {reads_pairs}


def test_damaged_weights_are_an_error_of_the_text(demo: Dataset) -> None:
    model = make_classifier(demo.tokenizer)
    torch.nn.init.constant_(model.class_head[-1].bias, float("nan"))  # type: ignore[arg-type]
    (answer,) = Predictor(model, demo.tokenizer).predict([Classify("a")])
    assert isinstance(answer, DataError) and "no finite score" in str(answer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs", [TEXT, [TEXT], [TEXT, "dull", "a b"], {"text": TEXT}, [{"text": TEXT}, {"text": "dull"}]]
)
@pytest.mark.parametrize("parameters", [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}])
def test_the_pipeline_format_is_that_of_transformers(
    texts: Predictor, demo: Dataset, inputs: Any, parameters: dict[str, Any]
) -> None:
    """The same model behind transformers' own TextClassificationPipeline gives the same answers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing
    from transformers.modeling_outputs import SequenceClassifierOutput

    class WrappedModel(transformers.BertPreTrainedModel):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            labels = dict(enumerate(CLASSES))
            super().__init__(transformers.BertConfig(vocab_size=demo.tokenizer.size, id2label=labels))
            self.ours: Any = texts.encoder

        def forward(self, input_ids: Tensor, **ignored: Any) -> Any:
            return SequenceClassifierOutput(logits=self.ours.class_logits(input_ids, torch.ones_like(input_ids)))

    backend = Backend.from_str(demo.tokenizer._backend.to_str())
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk")}
    wrapped_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    pipeline = transformers.TextClassificationPipeline(model=WrappedModel(), tokenizer=wrapped_tokenizer, device="cpu")
    expected = pipeline(inputs, **parameters)
    status, answer = ask(texts, {"inputs": inputs, "parameters": parameters})
    assert status == 200
    assert json.dumps(rounded(answer)) == json.dumps(rounded(expected))


def rounded(answer: Any) -> Any:
    """The same nested lists and dicts, with scores of four digits."""
    if isinstance(answer, list):
        return [rounded(entry) for entry in answer]
    return {**answer, "score": round(answer["score"], 4)}


def test_pairs_in_the_pipeline_format(pairs: Predictor) -> None:
    status, answer = ask(pairs, {"inputs": {"text": TEXT, "text_pair": "dull"}, "parameters": {"top_k": None}})
    expected = sorted(expected_probabilities(pairs, TEXT, "dull"), reverse=True)
    assert status == 200 and [entry["score"] for entry in answer] == pytest.approx(expected, abs=1e-6)
    assert not parse_object({"inputs": [{"text": "a", "text_pair": "b"}]}, pairs.classifier).single


def test_the_command_and_the_wrong_commands(
    texts: Predictor, demo: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("babybert.checkpoint.format.find_checkpoint", lambda path: path)
    save_model(tmp_path, texts.encoder, demo.tokenizer)
    flags = ["--checkpoint", str(tmp_path)]
    assert main(["classify", TEXT, *flags, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer["probabilities"].values()) == pytest.approx(expected_probabilities(texts, TEXT), abs=1e-6)
    assert main(["classify", TEXT, *flags]) == 0
    assert answer["label"] in capsys.readouterr().out.splitlines()[0]
    assert main(["classify", LONG, *flags]) == 2
    assert "the text' is 52 tokens long" in capsys.readouterr().err
    assert main(["classify", LONG, *flags, "--truncate"]) == 0
    assert main(["classify", "a", "b", *flags]) == 2
    for command in (["fill-mask", "[MASK]"], ["next-sentence", "a", "b"]):
        assert main([*command, *flags]) == 2
        assert "fine-tuned to classify" in capsys.readouterr().err


def test_the_playground_shows_the_classes(texts: Predictor, pretrained: Predictor) -> None:
    facts = about(PlaygroundSources(LocalBackend(texts), "a model", None))
    assert facts["classifier"] == {"classes": list(CLASSES), "pairs": False}
    assert facts["inside"] is None and "fine-tuned" in facts["no_inside"] and not facts["no_classifier"]
    facts = about(PlaygroundSources(LocalBackend(pretrained), "a model", None))
    assert facts["classifier"] is None and facts["no_classifier"] and facts["inside"] and not facts["no_pretrained"]
