"""A fine-tuned model behind a real TorchServe: answers, errors, metrics, and the OpenAPI document."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
import torch
from served import ServedModel, serving
from test_abuse import CHECKS

from babybert.checkpoint.format import MODEL_FILES, save_model
from babybert.config import ClassifierConfig, ModelConfig
from babybert.data.dataset import Dataset
from babybert.data.digest import sha256
from babybert.model.classifier import TextClassifier
from babybert.playground.app import PlaygroundSources, about
from babybert.playground.backends import EndpointBackend
from babybert.serving.archive import write_archive
from babybert.serving.predictor import Predictor

OPENAPI = schemathesis.openapi.from_path(Path(__file__).parents[2] / "handler/openapi-classifier.yaml")


@pytest.fixture(scope="module")
def predictor(demo: Dataset) -> Predictor:
    torch.manual_seed(0)
    sizes = ModelConfig(vocab_size=demo.tokenizer.size, width=16, heads=2, layers=2, feed_forward=32)
    classifier = ClassifierConfig(("neg", "pos"), pairs=False, positions=32, head_share=0.25)
    return Predictor(TextClassifier(sizes, classifier), demo.tokenizer)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, predictor: Predictor) -> Iterator[ServedModel]:
    """The model behind `babybert serve`."""
    folder = tmp_path_factory.mktemp("classifier")
    checkpoint = folder / "step-00000007"
    checkpoint.mkdir()
    save_model(checkpoint, predictor.encoder, predictor.tokenizer)
    files = {name: {"sha256": sha256(checkpoint / name)} for name in MODEL_FILES}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 7, "files": files}))
    write_archive(checkpoint, folder / "model-store")
    yield from serving(folder, "model-store/babybert.mar")


def test_the_server_answers_as_the_predictor(classifier: ServedModel, predictor: Predictor) -> None:
    texts = ["Mary is superb.", "A dull film, and a dull ship."]
    expected = predictor.classify([(text, None) for text in texts])
    response = classifier.ask({"classify": texts})
    assert response.status == 200 and response.headers["x-babybert-step"] == "7"
    assert [answer["label"] for answer in response.body] == [answer["label"] for answer in expected]
    for answer, other in zip(response.body, expected, strict=True):
        assert answer["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
    assert set(classifier.ask({"inputs": texts[0]}).body[0]) == {"label", "score"}


def test_errors_and_metrics(classifier: ServedModel) -> None:
    items = classifier.value("babybert_inference_items_total", task="classify")
    assert classifier.ask({"classify": ["a"] * 3}).status == 200
    assert classifier.value("babybert_inference_items_total", task="classify") == items + 3
    for body, message in (
        ({"classify": "superb " * 40}, "at most 32"),
        ({"text": "a [MASK]"}, "fine-tuned to classify"),
        ({"classify": [["a", "b"]]}, "trained on single texts"),
    ):
        response = classifier.ask(body)
        assert response.status == 400 and message in response.body["error"]


@OPENAPI.parametrize()
@hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_every_response_is_as_documented(case: Any, classifier: ServedModel) -> None:
    case.call_and_validate(base_url=f"http://127.0.0.1:{classifier.inference_port}", checks=CHECKS)


def test_the_playground_learns_the_classes_of_an_endpoint(classifier: ServedModel, server: ServedModel) -> None:
    facts = [
        about(PlaygroundSources(EndpointBackend(f"http://127.0.0.1:{model.inference_port}"), "", None))["classifier"]
        for model in (classifier, server)
    ]
    assert facts == [{"classes": ["neg", "pos"], "pairs": False}, None]
