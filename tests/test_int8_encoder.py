"""int8 weights: close to fp32, the same answer in any batch, and archives that have them."""

import importlib.util
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from test_export import make_run
from torch import Tensor

from babybert.checkpoint.format import find_checkpoint, save_model
from babybert.cli import main
from babybert.config import ClassifierConfig, ModelConfig
from babybert.data.dataset import Dataset, open_dataset
from babybert.data.tokenizer import PAD, Tokenizer
from babybert.errors import DataError, UsageError
from babybert.export.onnx_graphs import PretrainedGraph, export_graph, quantize
from babybert.model.bert import BabyBert
from babybert.model.classifier import TextClassifier
from babybert.serving.archive import check_archive, write_archive
from babybert.serving.int8_encoder import INT8_ENCODER, Int8Encoder, write_int8_encoder
from babybert.serving.predictor import Predictor
from babybert.serving.request_schema import Classify, FillMask, Item, NextSentence

pytestmark = pytest.mark.slow  # exporting a graph takes seconds

PRE: dict[str, Any] = {"norm": "pre", "activation": "gelu"}
SHAPES = {"post": {}, "pre": PRE, "one layer": {**PRE, "layers": 1}}
CLOSE = 0.06  # of the standard deviation of the hidden states
LENGTHS = (9, 4, 12, 1)


def make_model(vocab_size: int, **shape: Any) -> BabyBert:
    torch.manual_seed(0)
    sizes = {"width": 64, "layers": 2, "heads": 4, "feed_forward": 256, "max_positions": 64, **shape}
    model = BabyBert(ModelConfig(vocab_size, **sizes))
    return model.set_kernels("plain").eval()


def make_batch(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and segments of sequences of LENGTHS, and query positions in no order."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(PAD + 1, vocab_size, (len(LENGTHS), max(LENGTHS)), generator=generator)
    ids_BT[torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]] = PAD
    segments_BT = (1 + (torch.arange(max(LENGTHS)) >= 3).long()) * (ids_BT != PAD)
    width = max(LENGTHS)
    return ids_BT, segments_BT, torch.tensor([2 * width + 11, 8, 3 * width, width + 3, 0, 2 * width])


@pytest.fixture(scope="module", params=list(SHAPES))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BabyBert, Int8Encoder]:
    model = make_model(200, **SHAPES[request.param])
    folder = tmp_path_factory.mktemp("int8")
    write_int8_encoder(model, folder)
    assert [path.name for path in folder.iterdir()] == [INT8_ENCODER]
    return model, Int8Encoder(folder / INT8_ENCODER, model, threads=2)


@torch.no_grad()
def test_hidden_states_are_close_to_those_in_fp32(encoder: tuple[BabyBert, Int8Encoder]) -> None:
    model, int8 = encoder
    batch = make_batch(200)
    expected_MD, hidden_MD = model.hidden_at(*batch), int8.hidden_at(*batch)
    error = ((hidden_MD - expected_MD).square().mean().sqrt() / expected_MD.std()).item()
    assert 1e-5 < error < CLOSE


@torch.no_grad()
def test_a_sequence_has_the_same_hidden_states_in_any_batch(encoder: tuple[BabyBert, Int8Encoder]) -> None:
    _, int8 = encoder
    ids_BT, segments_BT, query_M = make_batch(200)
    together_MD = int8.hidden_at(ids_BT, segments_BT, query_M)
    for row, length in enumerate(LENGTHS):
        is_own_M = query_M // max(LENGTHS) == row
        own = slice(row, row + 1), slice(0, length)
        alone_MD = int8.hidden_at(ids_BT[own], segments_BT[own], query_M[is_own_M] % max(LENGTHS))
        assert torch.equal(alone_MD, together_MD[is_own_M])


@torch.no_grad()
def test_a_non_finite_embedding_affects_its_own_sequence_only(encoder: tuple[BabyBert, Int8Encoder]) -> None:
    model, int8 = encoder
    ids_BT, segments_BT, query_M = make_batch(200)
    before_MD = int8.hidden_at(ids_BT, segments_BT, query_M)
    weight = model.embedding.token_embedding.embedding.weight
    damaged = ids_BT[1, 1]
    kept = weight[damaged].clone()
    weight[damaged] = torch.inf
    try:
        hidden_MD = int8.hidden_at(ids_BT, segments_BT, query_M)
    finally:
        weight[damaged] = kept
    is_damaged_M = query_M // max(LENGTHS) == 1
    assert hidden_MD[is_damaged_M].isnan().all()
    assert torch.equal(hidden_MD[~is_damaged_M], before_MD[~is_damaged_M])


@torch.no_grad()
def test_an_exported_int8_graph_is_close_to_fp32(tmp_path: Path) -> None:
    """With all 8 bits, hidden states were 10 to 18 % off on x86 processors without VNNI."""
    model = make_model(200, **PRE, width=128, feed_forward=512)
    export_graph(PretrainedGraph(model), tmp_path / "fp32.onnx")
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "int8.onnx"]
    inputs = {
        "input_ids": np.arange(5, 45).reshape(2, 20),
        "token_type_ids": np.zeros((2, 20), np.int64),
        "query_positions": np.arange(40),
    }
    fp32, int8 = (
        onnxruntime.InferenceSession(tmp_path / name).run(["last_hidden_state"], inputs)[0]
        for name in ("fp32.onnx", "int8.onnx")
    )
    assert 1e-5 < np.sqrt(np.square(int8 - fp32).mean()) / fp32.std() < CLOSE


def items() -> list[Item]:
    return [
        FillMask("Mary rides near the [MASK] ."),
        FillMask("the [MASK] and the [MASK]", 3, ("superb", "sheriff")),
        NextSentence("Mary is superb.", "She rides."),
    ]


def test_an_archive_with_int8_weights_answers_with_them(demo: Dataset, tmp_path: Path) -> None:
    model = make_model(demo.tokenizer.size, **PRE)
    checkpoint = find_checkpoint(make_run(tmp_path / "run", model, demo.tokenizer))
    archive = write_archive(checkpoint, tmp_path / "int8", int8=True)
    version = check_archive(write_archive(checkpoint, tmp_path / "fp32"))["version"]
    assert check_archive(archive)["version"] == f"{version}-int8"
    assert write_archive(checkpoint, tmp_path / "again", int8=True).read_bytes() == archive.read_bytes()
    with zipfile.ZipFile(archive) as files:
        files.extractall(tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / INT8_ENCODER).is_file()
    served, fp32 = Predictor.load(tmp_path / "unpacked"), Predictor.load(checkpoint)
    answers, expected = served.predict(items()), fp32.predict(items())
    assert answers != expected
    (alone,) = served.predict(items()[1:2])  # hidden states are equal in any batch, the head in fp32 rounds
    for mask, other_mask in zip(alone["masks"], answers[1]["masks"], strict=True):
        scores = [candidate["score"] for candidate in other_mask["candidates"]]
        assert [candidate["score"] for candidate in mask["candidates"]] == pytest.approx(scores, rel=1e-5)
    for answer, other in zip(answers[:2], expected[:2], strict=True):
        for mask, other_mask in zip(answer["masks"], other["masks"], strict=True):
            scores, other_scores = (
                [candidate["score"] for candidate in one["candidates"]] for one in (mask, other_mask)
            )
            assert scores == pytest.approx(other_scores, rel=0.2)
    assert answers[2]["probability"] == pytest.approx(expected[2]["probability"], abs=0.02)


def test_a_classifier_with_int8_weights(demo: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = make_model(demo.tokenizer.size, **PRE).config
    model = TextClassifier(sizes, ClassifierConfig(("neg", "pos"), pairs=False, positions=32, head_share=0.25))
    torch.nn.init.normal_(model.class_head[-1].weight)  # type: ignore[arg-type]
    checkpoint = find_checkpoint(make_run(tmp_path / "run", model, demo.tokenizer))
    archive = write_archive(checkpoint, tmp_path / "store", int8=True)
    with zipfile.ZipFile(archive) as files:
        files.extractall(tmp_path / "unpacked")
    texts: list[Item] = [Classify("Mary is superb."), Classify("A dull film, and a dull ship.")]
    answers, expected = Predictor.load(tmp_path / "unpacked").predict(texts), Predictor.load(checkpoint).predict(texts)
    for answer, other in zip(answers, expected, strict=True):
        assert answer["probabilities"] == pytest.approx(other["probabilities"], abs=0.1)
        assert answer != other


def test_a_damaged_token_is_an_error_of_its_own_text(demo: Dataset, tmp_path: Path) -> None:
    model = make_model(demo.tokenizer.size, **PRE)
    sheriff = demo.tokenizer.id_of("sheriff")
    with torch.no_grad():
        model.embedding.token_embedding.embedding.weight[sheriff] = torch.nan
    save_model(tmp_path, model, demo.tokenizer)
    write_int8_encoder(model, tmp_path)
    damaged, fine = Predictor.load(tmp_path).predict([FillMask("the sheriff [MASK]"), FillMask("the ship [MASK]")])
    assert isinstance(damaged, DataError) and "weights are damaged" in str(damaged)
    assert fine["masks"]


def test_weights_that_are_not_finite_are_refused(demo: Dataset, tmp_path: Path) -> None:
    model = make_model(demo.tokenizer.size)
    with torch.no_grad():
        model.encoder.layers[1].linear2.weight[3, 5] = torch.nan
    checkpoint = find_checkpoint(make_run(tmp_path / "run", model, demo.tokenizer))
    with pytest.raises(DataError, match=r"encoder\.layers\.1\.linear2\.weight are not finite; choose another"):
        write_archive(checkpoint, tmp_path / "store", int8=True)
    assert not any((tmp_path / "store").iterdir())


def test_archive_scores_int8_beside_fp32(demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = open_dataset(demo_folder).tokenizer
    checkpoint = find_checkpoint(make_run(tmp_path / "run", make_model(tokenizer.size, **PRE), tokenizer))
    command = ["archive", str(checkpoint), "--out", str(tmp_path / "store"), "--int8"]
    assert main([*command, "--data", str(demo_folder), "--validation-pairs", "20"]) == 0
    header, fp32, int8, end = capsys.readouterr().out.splitlines()
    assert header.split() == ["weights", "MB", "MLM", "loss", "top-1", "NSP", "accuracy"]
    assert (fp32.split()[0], int8.split()[0]) == ("fp32", "int8")
    assert float(int8.split()[1]) < float(fp32.split()[1]) / 3
    assert float(int8.split()[2]) == pytest.approx(float(fp32.split()[2]), rel=0.02)
    assert "-int8, " in end
    # Data that cannot be used is an error before an archive is replaced.
    written = (tmp_path / "store" / "babybert.mar").read_bytes()
    other = make_run(tmp_path / "other", make_model(9), Tokenizer.of_words(["a", "b", "c", "d"]))
    for source, data, message in (
        (checkpoint, tmp_path / "none", "dataset.json"),
        (find_checkpoint(other), demo_folder, "has another vocabulary than the model"),
    ):
        assert main(["archive", str(source), *command[2:], "--data", str(data)]) == 3
        assert message in capsys.readouterr().err
    assert (tmp_path / "store" / "babybert.mar").read_bytes() == written


def test_requests_that_cannot_be_met_are_one_line(
    demo: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = find_checkpoint(make_run(tmp_path / "run", make_model(demo.tokenizer.size), demo.tokenizer))
    archive = write_archive(checkpoint, tmp_path / "store")
    out = ["--out", str(tmp_path / "other")]
    for command, message in (
        (["archive", str(checkpoint), *out, "--data", "data/demo"], "--data is for --int8"),
        (["serve", str(archive), "--int8"], "give --int8 to `babybert archive`"),
        (["serve", str(archive.parent), "--int8"], "give --int8 to `babybert archive`"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else name)
    for command in (["archive", "s3://nowhere/run", *out, "--int8"], ["serve", "s3://nowhere/run", "--int8"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.endswith("--int8 needs onnx; pip install 'babybert-pretrain[export]'\n")
    assert not any((tmp_path / "other").iterdir())


def test_a_server_without_onnx_runtime_says_so(
    encoder: tuple[BabyBert, Int8Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match="needs onnxruntime; pip install"):
        Int8Encoder(tmp_path / INT8_ENCODER, encoder[0])
