"""Exports: what Transformers and ONNX Runtime compute equals what the checkpoint's model computes; and the way back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from babybert.checkpoint.format import CheckpointState, find_checkpoint, save_checkpoint
from babybert.checkpoint.model_files import load_encoder
from babybert.cli import main
from babybert.config import ClassifierConfig, ModelConfig
from babybert.data.dataset import open_dataset
from babybert.data.tokenizer import CLS, MASK, PAD, SEP, Tokenizer
from babybert.errors import DataError, UsageError
from babybert.evaluation.scores import evaluate_held_out
from babybert.export.import_checkpoint import import_checkpoint
from babybert.export.transformers_folder import transformers_tokenizer
from babybert.model.bert import BabyBert, BertEncoder
from babybert.model.classifier import TextClassifier

WORDS = ("the", "movie", "was", "good", "bad", ".", "!", "'", "é")
PIECES = (*WORDS, *"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"))
TOKENIZERS = {"basic-english": Tokenizer.of_words(WORDS), "wordpiece": Tokenizer.of_pieces(PIECES)}
SHAPES: dict[str, dict[str, Any]] = {
    "post": {},
    "pre": {"norm": "pre", "activation": "gelu", "layers": 3},
    "tied": {"tie_decoder": True},
}
CLASSES = ("neg", "neutral", "pos")


def make_model(tokenizer: Tokenizer, is_classifier: bool = False, **shape: Any) -> BertEncoder:
    sizes = {"width": 16, "layers": 2, "heads": 2, "feed_forward": 24, "max_positions": 32, **shape}
    config = ModelConfig(vocab_size=tokenizer.size, **sizes)
    torch.manual_seed(0)
    model: BertEncoder = BabyBert(config)
    if is_classifier:
        model = TextClassifier(config, ClassifierConfig(CLASSES, pairs=True, positions=32, head_share=0.25))
    for parameter in model.parameters():  # biases and norms are not at their initial values after training
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.set_kernels("plain").eval()


def make_run(folder: Path, model: BertEncoder, tokenizer: Tokenizer, step: int = 7) -> Path:
    facts: dict[str, Any] = {
        "settings": {"seed": 0, "preset": "tiny"},
        "tokenizer_digest": tokenizer.digest,
        "data_digest": "",
    }
    scores = {"mlm_loss": 1.5, "nsp_loss": 0.5}
    state = CheckpointState(step=step, epoch=0, batch=step, seconds=1.0, restarts=0, scores=scores, **facts)
    save_checkpoint(folder, state, model, tokenizer, torch.optim.SGD(model.parameters()))
    return folder


def make_batch(vocab_size: int, pairs: int, positions: int) -> tuple[Tensor, Tensor]:
    """Ids with padding, and token types 0 and 1."""
    generator = torch.Generator().manual_seed(pairs)
    ids_BT = torch.randint(PAD + 1, vocab_size, (pairs, positions), generator=generator)
    lengths_B = torch.randint(3, positions + 1, (pairs,), generator=generator)
    lengths_B[0] = positions
    ids_BT[torch.arange(positions) >= lengths_B[:, None]] = PAD
    types_BT = (torch.arange(positions) >= lengths_B[:, None] // 2).long() * (ids_BT != PAD)
    return ids_BT, types_BT


def segments(ids_BT: Tensor, types_BT: Tensor) -> Tensor:
    return (types_BT + 1) * (ids_BT != PAD)


@pytest.fixture(scope="module", params=list(SHAPES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = TOKENIZERS["basic-english"]
    run = make_run(folder / "run", make_model(tokenizer, **SHAPES[request.param]), tokenizer)
    assert main(["export", "--checkpoint", str(run), "--out", str(folder / "out")]) == 0
    return run, folder / "out"


@pytest.mark.slow
def test_transformers_computes_the_same_logits(exported: tuple[Path, Path], tmp_path: Path) -> None:
    import transformers

    run, out = exported
    model, _ = load_encoder(find_checkpoint(run))
    assert isinstance(model, BabyBert)
    model.set_kernels("plain").eval()
    names = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForNextSentencePrediction", "AutoModelForPreTraining")
    loaded = {name: getattr(transformers, name).from_pretrained(out, trust_remote_code=True).eval() for name in names}
    loaded["AutoModelForPreTraining"].save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    for pairs, positions in ((1, 4), (5, 32)):
        ids_BT, types_BT = make_batch(model.config.vocab_size, pairs, positions)
        inputs = {"input_ids": ids_BT, "token_type_ids": types_BT, "attention_mask": (ids_BT != PAD).long()}
        with torch.no_grad():
            hidden_BTD = model(ids_BT, segments(ids_BT, types_BT))
            mlm_BTV, nsp_B2 = model.mlm_logits(hidden_BTD), model.nsp_logits(hidden_BTD).flip(1)
            answers = {name: network(**inputs) for name, network in loaded.items()}
            second = again(input_ids=ids_BT, token_type_ids=types_BT)  # without the mask, which the ids imply
        is_token_BT = ids_BT != PAD
        for answer, wanted in (
            (answers["AutoModel"].last_hidden_state[is_token_BT], hidden_BTD[is_token_BT]),
            (answers["AutoModelForMaskedLM"].logits[is_token_BT], mlm_BTV[is_token_BT]),
            (answers["AutoModelForNextSentencePrediction"].logits, nsp_B2),
            (answers["AutoModelForPreTraining"].prediction_logits[is_token_BT], mlm_BTV[is_token_BT]),
            (answers["AutoModelForPreTraining"].seq_relationship_logits, nsp_B2),
            (second.prediction_logits[is_token_BT], mlm_BTV[is_token_BT]),
        ):
            torch.testing.assert_close(answer, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_losses_of_transformers_are_those_of_pretraining(exported: tuple[Path, Path]) -> None:
    import transformers

    run, out = exported
    model, _ = load_encoder(find_checkpoint(run))
    assert isinstance(model, BabyBert)
    loaded = transformers.AutoModelForPreTraining.from_pretrained(out, trust_remote_code=True).eval()
    ids_BT, types_BT = make_batch(model.config.vocab_size, 4, 12)
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, 1] = 7
    labels = {"labels": labels_BT, "next_sentence_label": torch.tensor([0, 1, 1, 0])}
    with torch.no_grad():
        answer = loaded(input_ids=ids_BT, token_type_ids=types_BT, **labels)
        hidden_BTD = model.set_kernels("plain").eval()(ids_BT, segments(ids_BT, types_BT))
        mlm_B, nsp_B = model.mlm_logits(hidden_BTD[:, 1]), model.nsp_logits(hidden_BTD)
        wanted = -mlm_B.log_softmax(1)[:, 7].mean()
        wanted = wanted - nsp_B.log_softmax(1)[torch.arange(4), 1 - labels["next_sentence_label"]].mean()
    torch.testing.assert_close(answer.loss, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_pipeline_fills_masks_and_a_new_classification_head_is_added(exported: tuple[Path, Path]) -> None:
    import transformers

    _, out = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True)
    fill = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    assert len(fill("the movie was [MASK].", top_k=3)) == 3
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, trust_remote_code=True, num_labels=4
    )
    assert classifier(**tokenizer(["the movie", "bad"], padding=True, return_tensors="pt")).logits.shape == (2, 4)
    texts = tokenizer("the movie was good " * 20, truncation=True)
    assert len(texts["input_ids"]) == model.config.max_position_embeddings
    assert (out / "README.md").read_text().count("1.5") == 1  # its held-out loss


@pytest.mark.slow
def test_a_classifier_keeps_its_classes(tmp_path: Path) -> None:
    import transformers

    tokenizer = TOKENIZERS["wordpiece"]
    model = make_model(tokenizer, is_classifier=True)
    assert isinstance(model, TextClassifier)
    run = make_run(tmp_path / "run", model, tokenizer)
    out = tmp_path / "out"
    assert main(["export", "--checkpoint", str(run), "--out", str(out)]) == 0
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True).eval()
    ids_BT, types_BT = make_batch(tokenizer.size, 3, 9)
    with torch.no_grad():
        wanted_BC = model.class_logits(ids_BT, segments(ids_BT, types_BT))
        logits_BC = loaded(input_ids=ids_BT, token_type_ids=types_BT).logits
    torch.testing.assert_close(logits_BC, wanted_BC, atol=1e-5, rtol=1e-5)
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    imported, _ = load_encoder(import_checkpoint(out, tmp_path / "imported"))
    assert isinstance(imported, TextClassifier)
    assert imported.classifier == model.classifier
    assert all(torch.equal(tensor, imported.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@settings(deadline=None, max_examples=60)
@given(st.text(), st.text(), st.integers(8, 20))
def test_the_tokenizers_agree(kind: str, a: str, b: str, longest: int) -> None:
    tokenizer = TOKENIZERS[kind]
    exported = transformers_tokenizer(tokenizer.json)
    ids_a, ids_b = tokenizer.encode(a), tokenizer.encode(b)
    assert exported.encode(a).ids == [CLS, *ids_a, SEP]
    pair = exported.encode(a, b)
    assert pair.ids == [CLS, *ids_a, SEP, *ids_b, SEP]
    assert pair.type_ids == [0] * (len(ids_a) + 2) + [1] * (len(ids_b) + 1)
    exported.enable_truncation(longest)
    assert exported.encode(a).ids == [CLS, *ids_a[: longest - 2], SEP]


@pytest.mark.slow
def test_int8_is_scored_beside_fp32(demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.load(demo_folder / "tokenizer.json")
    model = make_model(tokenizer, max_positions=128)
    run = make_run(tmp_path / "run", model, tokenizer)
    onnx = ["export", "--checkpoint", str(run), "--format", "onnx", "--int8", "--out"]
    data = ["--data", str(demo_folder), "--validation-pairs", "50"]
    assert main([*onnx, str(tmp_path / "onnx"), *data]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("model")]
    assert [row[0] for row in rows] == ["model.onnx", "model-int8.onnx"]
    assert isinstance(model, BabyBert)
    dataset = open_dataset(demo_folder)
    held_out = dataset.examples("validation").first(50)
    scores = evaluate_held_out(model, held_out, dataset.token_counts(), 32, torch.device("cpu"))
    assert float(rows[0][2]) == pytest.approx(scores.mlm_loss, abs=1e-3)
    assert float(rows[0][4].rstrip("%")) / 100 == pytest.approx(scores.nsp_accuracy, abs=1e-3)
    other = make_run(tmp_path / "other", make_model(TOKENIZERS["wordpiece"]), TOKENIZERS["wordpiece"])
    assert main(["export", "--checkpoint", str(other), *onnx[3:], str(tmp_path / "refused"), *data]) == 3
    assert "another vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_special_tokens_in_a_text_are_special(exported: tuple[Path, Path]) -> None:
    _, out = exported
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    assert tokenizer.encode("the [MASK] movie") == [5, MASK, 6]


def test_an_import_has_the_exported_bits(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run, out = exported
    checkpoint = import_checkpoint(out, tmp_path / "imported")
    original = find_checkpoint(run)
    for name in ("model.safetensors", "model.json", "tokenizer.json"):
        assert (checkpoint / name).read_bytes() == (original / name).read_bytes(), name
    assert find_checkpoint(tmp_path / "imported") == checkpoint
    with pytest.raises(UsageError, match="has checkpoints already"):
        import_checkpoint(out, tmp_path / "imported")


@pytest.mark.slow
def test_what_transformers_saves_can_be_imported(exported: tuple[Path, Path], tmp_path: Path) -> None:
    import transformers

    run, out = exported
    transformers.AutoModelForPreTraining.from_pretrained(out, trust_remote_code=True).save_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokenizer(["the movie", "bad"], padding=True, truncation=True)
    tokenizer.save_pretrained(tmp_path / "hf")
    checkpoint = import_checkpoint(tmp_path / "hf", tmp_path / "imported")
    (model, ids), (original, original_ids) = load_encoder(checkpoint), load_encoder(find_checkpoint(run))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in original.state_dict().items())
    assert ids.digest == original_ids.digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model_type": "bert"}', "only 'babybert' can be imported"),
        ("config.json", "[]", "not the configuration"),
        ("config.json", '{"model_type": "babybert"}', "vocab_size is None"),
        ("model.safetensors", "damaged", "not the weights"),
        ("tokenizer.json", "{}", "not a tokenizer file"),
    ],
)
def test_other_folders_are_refused_in_one_line(
    exported: tuple[Path, Path], tmp_path: Path, name: str, content: str, message: str
) -> None:
    _, out = exported
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / file).write_bytes((out / file).read_bytes())
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        import_checkpoint(folder, tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 65_536, r"shape of embedding.token_embedding.embedding.weight is .*, and the configuration's"),
        ("num_hidden_layers", 1_000, "the configuration has 1000"),
        ("intermediate_size", 65_536, "shape of encoder.layers.0.linear1.weight"),
        ("max_position_embeddings", 10**12, "max_positions is 1000000000000; it must be from 8 to 65,536"),
        ("hidden_size", 10**12, "width is 1000000000000; it must be from 1 to 65,536"),
    ],
)
def test_sizes_by_mistake_are_refused_before_a_model_is_made(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: int, message: str
) -> None:
    """A model of such sizes would fill the memory."""
    folder = tmp_path / "folder"
    shutil.copytree(exported[1], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    monkeypatch.setattr("babybert.model.bert.BertEncoder.__init__", lambda *arguments: pytest.fail("it was made"))
    with pytest.raises(DataError, match=message):
        import_checkpoint(folder, tmp_path / "run")


def test_an_export_replaces_an_export_alone(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = exported
    command = ["export", "--checkpoint", str(run), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "out" / "old").write_text("")
    assert main([*command, "--overwrite"]) == 0
    assert not (tmp_path / "out" / "old").exists()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "link"), "--overwrite"]) == 2
    assert "symbolic link" in capsys.readouterr().err
    (tmp_path / "link").unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "mine"), "--overwrite"]) == 2
    assert main(["export", "--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_an_interrupt_of_the_onnx_exporter_is_one_line(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while PyTorch imports its compiler: the exporter fails with an error whose cause's context it is."""

    def interrupted(*arguments: Any, **keywords: Any) -> None:
        try:
            try:
                raise KeyboardInterrupt
            except torch.missing.exc:  # type: ignore[attr-defined]
                pass
        except AttributeError as error:
            raise RuntimeError("Failed to export the model") from error

    monkeypatch.setattr(torch.onnx, "export", interrupted)
    command = ["export", "--checkpoint", str(exported[0]), "--out", str(tmp_path / "onnx"), "--format", "onnx"]
    assert main(command) == 130
    assert capsys.readouterr().err == "babybert export: interrupted\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_onnx_runtime_computes_the_same_logits(exported: tuple[Path, Path], tmp_path: Path) -> None:
    import onnxruntime

    run, _ = exported
    command = ["export", "--checkpoint", str(run), "--out", str(tmp_path / "onnx"), "--format", "onnx", "--int8"]
    assert main(command) == 0
    model, _ = load_encoder(find_checkpoint(run))
    assert isinstance(model, BabyBert)
    model.set_kernels("plain").eval()
    sessions = [onnxruntime.InferenceSession(tmp_path / "onnx" / name) for name in ("model.onnx", "model-int8.onnx")]
    for pairs, positions in ((1, 3), (4, 32), (7, 11)):
        ids_BT, types_BT = make_batch(model.config.vocab_size, pairs, positions)
        query_M = (ids_BT != PAD).flatten().nonzero().squeeze(1)[::2]
        with torch.no_grad():
            hidden_BTD = model(ids_BT, segments(ids_BT, types_BT))
            mlm_MV = model.mlm_logits(hidden_BTD.flatten(0, 1)[query_M])
            nsp_B2 = model.nsp_logits(hidden_BTD).flip(1)
        inputs = {"input_ids": ids_BT, "token_type_ids": types_BT, "query_positions": query_M}
        for session, tolerance in zip(sessions, (1e-4, 0.5), strict=True):
            answer = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
            np.testing.assert_allclose(answer[0], mlm_MV, atol=tolerance, rtol=1e-4)
            np.testing.assert_allclose(answer[1], nsp_B2, atol=tolerance, rtol=1e-4)
            is_token_BT = ids_BT != PAD
            np.testing.assert_allclose(answer[2][is_token_BT], hidden_BTD[is_token_BT], atol=tolerance, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("is_classifier", [False, True])
def test_the_example_of_an_onnx_readme_runs(tmp_path: Path, is_classifier: bool) -> None:
    import onnxruntime

    tokenizer = TOKENIZERS["wordpiece"]
    model = make_model(tokenizer, is_classifier)
    run = make_run(tmp_path / "run", model, tokenizer)
    out = tmp_path / "onnx"
    assert main(["export", "--checkpoint", str(run), "--out", str(out), "--format", "onnx"]) == 0
    example = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", example], cwd=out, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    if isinstance(model, TextClassifier):
        ids_BT, types_BT = make_batch(tokenizer.size, 3, 9)
        with torch.no_grad():
            wanted_BC = model.class_logits(ids_BT, segments(ids_BT, types_BT))
        session = onnxruntime.InferenceSession(out / "model.onnx")
        (logits_BC,) = session.run(None, {"input_ids": ids_BT.numpy(), "token_type_ids": types_BT.numpy()})
        np.testing.assert_allclose(logits_BC, wanted_BC, atol=1e-4)
        assert json.loads((out / "babybert.json").read_text())["classes"] == list(CLASSES)
        assert done.stdout.strip() in CLASSES


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "16"),
        ("hidden_size", -16),
        ("hidden_size", 16.0),
        ("tie_word_embeddings", "no"),
        ("classifier", {"pairs": 1, "positions": "x", "head_share": 0.25}),
        ("id2label", [1]),
        ("id2label", {"0": 1, "1": 2, "2": 3}),
        ("id2label", {"0": "a", "1": "a", "2": "a"}),
    ],
)
def test_wrong_values_of_a_configuration_are_refused(
    key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, out = TOKENIZERS["basic-english"], tmp_path / "out"
    run = make_run(tmp_path / "run", make_model(tokenizer, is_classifier=True), tokenizer)
    assert main(["export", "--checkpoint", str(run), "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    capsys.readouterr()
    assert main(["import", str(out), "--out", str(tmp_path / "imported")]) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"babybert import: error: {out / 'config.json'}: ") and error.count("\n") == 1
    assert not (tmp_path / "imported").exists()
