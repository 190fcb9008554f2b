"""A run behind `babybert serve --int8 --watch`: it answers with int8 weights, also those of a newer checkpoint."""

import contextlib
import zipfile
from pathlib import Path

import pytest
from served import serving, wait_for
from test_export import make_run
from test_int8_encoder import PRE, make_model

from babybert.checkpoint.format import find_checkpoint
from babybert.data.dataset import Dataset
from babybert.serving.archive import write_archive
from babybert.serving.predictor import Predictor

served_run = contextlib.contextmanager(serving)
TEXT, PAIR = "Mary rides near the [MASK] .", ("Mary is superb.", "She rides.")


def test_a_run_is_served_with_int8_weights(demo: Dataset, tmp_path: Path) -> None:
    model = make_model(demo.tokenizer.size, **PRE)
    checkpoint = find_checkpoint(make_run(tmp_path / "run", model, demo.tokenizer))
    with zipfile.ZipFile(write_archive(checkpoint, tmp_path / "store", int8=True)) as archive:
        archive.extractall(tmp_path / "unpacked")
    predictor = Predictor.load(tmp_path / "unpacked")
    with served_run(tmp_path, "run", "--int8", "--watch", "--watch-seconds=0.5") as server:
        response = server.ask({"text": TEXT})
        assert response.status == 200
        version = response.headers["x-babybert-version"]
        assert version.startswith("7-") and version.endswith("-int8")
        (mask,), (expected,) = response.body["masks"], predictor.fill_mask([TEXT])[0]["masks"]
        for candidate, other in zip(mask["candidates"], expected["candidates"], strict=True):
            assert candidate["token"] == other["token"]
            assert candidate["score"] == pytest.approx(other["score"], rel=1e-4)
        (probability,) = (answer["probability"] for answer in predictor.next_sentence([PAIR]))
        answer = server.ask({"sentence_a": PAIR[0], "sentence_b": PAIR[1]}).body
        assert answer["probability"] == pytest.approx(probability, rel=1e-4)
        make_run(tmp_path / "run", model, demo.tokenizer, step=9)
        wait_for(lambda: server.ask({"text": TEXT}).headers["x-babybert-version"].startswith("9-"), seconds=60)
        assert server.ask({"text": TEXT}).headers["x-babybert-version"] == version.replace("7-", "9-", 1)
