"""`babybert finetune`: what it learns, exact resume, its data, its scores, and the errors of bad labels."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import S3, SMALL, imdb_review_folder
from labelled_texts import decidable_texts, write_csv, write_jsonl
from processes import COMMAND_SECONDS, babybert_command
from test_distributed import TORCHRUN

from babybert.checkpoint.format import find_checkpoint, load_classifier, load_encoder, load_model, read_state
from babybert.checkpoint.metrics_log import MetricsLog, read_metrics
from babybert.cli import main
from babybert.config import ClassifierConfig, FinetuneConfig, InfoConfig, ModelConfig, PretrainConfig
from babybert.data.classifier_input import classifier_input
from babybert.data.digest import sha256
from babybert.data.labelled_examples import read_labelled_data
from babybert.data.loader import ordered_batches
from babybert.data.tokenizer import CLS, SEP, Tokenizer
from babybert.errors import DataError, UsageError, UserError
from babybert.evaluation.class_baselines import format_comparison
from babybert.evaluation.classification import class_report, class_scores
from babybert.evaluation.curves import plot_curves
from babybert.info import describe, format_description
from babybert.model.classifier import ClassificationModel, ClassSums, TextClassifier
from babybert.training import train as train_module
from babybert.training.distributed import DistributedContext
from babybert.training.finetuning import FinetuneResult, finetune, open_task
from babybert.training.lr_schedule import learning_rate
from babybert.training.metrics import RunMetrics
from babybert.training.setup import set_up
from babybert.training.step import forward_backward
from babybert.training.train import pretrain

Finetune = Callable[..., FinetuneConfig]
CPU = DistributedContext("single", torch.device("cpu"), False)


@pytest.fixture(scope="module")
def pretrained(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps. Tests must not change it."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    sizes: dict[str, Any] = {"width": 16, "feed_forward": 32, "dropout": 0.0}
    assert pretrain(PretrainConfig(**{**SMALL, **sizes, "data": demo_folder, "out": out, "max_steps": 2}))
    return out


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "x.csv", decidable_texts(240))


@pytest.fixture
def settings(pretrained: Path, texts: Path, tmp_path: Path) -> Finetune:
    """A function that returns the settings of a small run."""

    def make(**changes: Any) -> FinetuneConfig:
        defaults: dict[str, Any] = {
            **{"checkpoint": str(pretrained), "corpus": "csv", "source": (str(texts),), "out": tmp_path / "run"},
            **{"metrics": False, "device": "cpu", "log_every": 5, "batch_size": 8, "lr": 1e-2, "epochs": 2},
        }
        return FinetuneConfig(**{**defaults, **changes})

    return make


def ending_of(config: FinetuneConfig) -> tuple[FinetuneResult, dict[str, Any]]:
    ending = finetune(config)
    assert ending is not None
    return ending


def test_words_that_decide_the_class_are_learned(settings: Finetune, tmp_path: Path) -> None:
    test = write_csv(tmp_path / "test.csv", decidable_texts(60, seed=1))
    config = settings(test_source=(str(test),), epochs=4)
    result, report = ending_of(config)
    assert report["test"]["texts"] == len(decidable_texts(60, seed=1))
    assert report["test"]["accuracy"]["value"] > 0.9 > 0.6 > report["test"]["majority_accuracy"]["value"]
    assert json.loads((config.out / "summary.json").read_text())["report"] == report
    model, _ = load_classifier(result.checkpoint)
    assert model.classifier == ClassifierConfig(("neg", "pos"), False, 256, 0.25)
    state = read_state(result.checkpoint)
    assert state.scores is not None and state.held_out_loss() == state.scores["class_loss"]
    assert plot_curves([config.out], tmp_path / "plot")
    description = describe(config.out, InfoConfig())
    assert description["classifier"]["classes"] == ["neg", "pos"]
    assert "positions" in format_description(description)


def test_the_run_starts_from_the_encoder_of_the_checkpoint(settings: Finetune, pretrained: Path) -> None:
    before, _ = load_encoder(find_checkpoint(pretrained))
    model = open_task(settings()).new_model()
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in before.state_dict().items() if name in own)
    assert not [name for name in own if name.startswith(("mlm_", "nsp_"))]
    scratch = open_task(settings(from_scratch=True)).new_model().state_dict()
    assert not torch.equal(scratch["encoder.layers.0.linear1.weight"], own["encoder.layers.0.linear1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(("cuts", "changes"), [([1, 30], {}), ([27], {"accumulate": 2, "balance_classes": True})])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(
    settings: Finetune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cuts: list[int],
    changes: dict[str, Any],
) -> None:
    """With dropout, so that random numbers matter. The stops are within epochs and at their ends."""
    complete = ending_of(settings(out=tmp_path / "complete", log_every=1, **changes))[0].checkpoint
    stop_at = -1

    def learning_rate_and_stop(step: float, *rest: Any) -> float:
        if step + 1 == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(step, *rest)

    monkeypatch.setattr(train_module, "learning_rate", learning_rate_and_stop)
    for stop_at in cuts:
        result, report = ending_of(settings(log_every=1, **changes))
        assert result.stopped_by == signal.SIGTERM and not report
        assert read_state(result.checkpoint).step == stop_at
    stop_at = -1
    result, _ = ending_of(settings(log_every=1, **changes))
    for name in ("model.safetensors", "training.pt"):
        assert sha256(result.checkpoint / name) == sha256(complete / name)
    losses = [
        [line["class_loss"] for line in read_metrics(run / "metrics.jsonl") if line["split"] != "resume"]
        for run in (tmp_path / "run", tmp_path / "complete")
    ]
    assert losses[0] == losses[1]
    assert "not bit-identical" not in caplog.text


@pytest.mark.slow
def test_a_run_in_s3_continues_elsewhere(settings: Finetune, tmp_path: Path, s3: S3, demo_folder: Path) -> None:
    """The pretrained run and the classifier's run are both in S3."""
    store = f"s3://{s3.bucket}/pretrained"
    small: dict[str, Any] = {
        **SMALL,
        "width": 16,
        "feed_forward": 32,
        "data": demo_folder,
        "out": tmp_path / "pre",
        "max_steps": 2,
    }
    assert pretrain(PretrainConfig(**small, store=store))
    changes: dict[str, Any] = {"checkpoint": store, "store": f"s3://{s3.bucket}/classifier"}
    first, _ = ending_of(settings(**changes, out=tmp_path / "one", max_steps=3))
    second, _ = ending_of(settings(**changes, out=tmp_path / "two", max_steps=5))
    assert first.checkpoint.name == "step-00000003"
    assert read_state(second.checkpoint).restarts == 1
    again, report = ending_of(settings(**changes, out=tmp_path / "three", max_steps=5))  # complete: scored again
    assert again.checkpoint.name == second.checkpoint.name
    assert json.loads((tmp_path / "three" / "summary.json").read_text())["report"] == report


@pytest.mark.slow
def test_two_processes_train_what_one_does(settings: Finetune, texts: Path, pretrained: Path, tmp_path: Path) -> None:
    """Without dropout, which differs by rank."""
    single, _ = ending_of(settings(dropout=0.0, batch_size=16, max_steps=6, lr=1e-3))
    flags = ["--corpus=csv", f"--source={texts}", f"--checkpoint={pretrained}", f"--out={tmp_path / 'two'}"]
    flags += ["--dropout=0", "--batch-size=16", "--max-steps=6", "--lr=1e-3", "--device=cpu", "--no-metrics", "--json"]
    command = [*TORCHRUN, *babybert_command("finetune", *flags)[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert job.returncode == 0, job.stderr
    assert "in 2 processes" in job.stderr
    assert json.loads(job.stdout)["validation"]["texts"] > 0  # only rank 0 prints
    one, two = (load_encoder(find_checkpoint(run))[0].state_dict() for run in (tmp_path / "run", tmp_path / "two"))
    assert single.checkpoint.name == find_checkpoint(tmp_path / "two").name
    for name in (
        "class_head.0.weight",
        "encoder.layers.0.linear1.weight",
        "embedding.token_embedding.embedding.weight",
    ):
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


def test_curves_of_both_kinds_are_two_figures(settings: Finetune, pretrained: Path, tmp_path: Path) -> None:
    ending_of(settings(max_steps=5))
    MetricsLog(tmp_path / "other").run.mkdir()
    MetricsLog(tmp_path / "other").write("train", step=5, mlm_loss=1.0)
    with pytest.raises(DataError, match="draw them in two figures"):
        plot_curves([settings().out, tmp_path / "other"], tmp_path / "plot")


def test_a_fine_tuned_model_can_be_fine_tuned_again(settings: Finetune, tmp_path: Path) -> None:
    first, _ = ending_of(settings(max_steps=1))
    before = load_encoder(first.checkpoint)[0].state_dict()
    after = open_task(settings(checkpoint=str(settings().out), out=tmp_path / "again")).new_model().state_dict()
    assert torch.equal(before["encoder_norm.weight"], after["encoder_norm.weight"])
    assert not torch.equal(before["class_head.0.weight"], after["class_head.0.weight"])


def test_runs_of_another_kind_or_other_settings_are_refused(settings: Finetune, pretrained: Path, small: Any) -> None:
    config = settings(max_steps=1)
    result, _ = ending_of(config)
    with pytest.raises(UsageError, match="is a checkpoint of pretraining; choose another --out"):
        finetune(settings(resume=str(pretrained), out=config.out.parent / "other"))
    with pytest.raises(UsageError, match="is fine-tuned to classify texts"):
        pretrain(small(out=config.out))
    with pytest.raises(UsageError, match="is fine-tuned to classify texts"):
        load_model(result.checkpoint)
    with pytest.raises(UsageError, match="is not fine-tuned to classify texts"):
        load_classifier(find_checkpoint(pretrained))
    with pytest.raises(UsageError, match="choose another --out"):
        finetune(settings(positions=20))
    with pytest.raises(UsageError, match="was trained with seed 0"):
        finetune(settings(seed=1))
    with pytest.raises(UsageError, match="was trained on other data"):
        finetune(settings(train_texts=100))


def test_micro_batches_give_the_gradient_of_the_whole_batch(settings: Finetune) -> None:
    config = settings(dropout=0.0)
    task = open_task(config)
    model = task.new_model()
    batch = next(ordered_batches(task.data.train, 7))
    gradients = []
    for parts in (1, 3):
        model.zero_grad()
        sums = forward_backward(ClassificationModel(model), batch, CPU, parts, ClassSums)
        gradients.append(model.embedding.token_embedding.embedding.weight.grad)
        assert sums.class_count == 7
        logits = model.class_logits(batch.ids_BT, batch.segments_BT)
        expected = torch.nn.functional.cross_entropy(logits, batch.is_next_B, reduction="sum")
        torch.testing.assert_close(sums.class_sum, expected.detach())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_balanced_classes_weight_the_loss_by_the_inverse_share(settings: Finetune, tmp_path: Path) -> None:
    rare = [row for row in decidable_texts(200) if row[1] == "neg" or row[0] < "boring"]
    source = (str(write_csv(tmp_path / "rare.csv", rare)),)
    task = open_task(settings(source=source, balance_classes=True))
    model = task.with_loss(task.new_model())
    assert isinstance(model, ClassificationModel)
    count_C = np.bincount(task.data.train.is_next)
    assert count_C[1] < count_C[0] / 3
    weighted = model.weight_C.numpy() * count_C
    assert weighted == pytest.approx([count_C.sum() / 2] * 2)


def test_metrics_are_those_of_pretraining_with_the_objective_class(settings: Finetune) -> None:
    task = open_task(settings())
    run = set_up(settings(), CPU, task, None)
    metrics = RunMetrics()
    sums = forward_backward(run.model, next(run.loader.epoch(0)), CPU, 1, ClassSums)
    metrics.record_training(sums, with_nsp=False)
    metrics.record_validation(task.evaluate(run.bert, CPU.device, lambda: False))
    for split in ("train", "validation"):
        loss = metrics.registry.get_sample_value("babybert_pretrain_loss", {"objective": "class", "split": split})
        assert loss == pytest.approx(math.log(2), abs=0.2)  # all classes start nearly equally likely
    assert metrics.registry.get_sample_value("babybert_pretrain_pairs_total") == 8
    assert metrics.registry.get_sample_value("babybert_pretrain_loss", {"objective": "mlm", "split": "train"}) is None


# What is read


def data_of(config: FinetuneConfig, tokenizer: Tokenizer) -> Any:
    return read_labelled_data(config, tokenizer, 512)


def texts_of(examples: Any, tokenizer: Tokenizer) -> list[str]:
    bounds = zip(examples.offsets[:-1], examples.offsets[1:], strict=True)
    return [tokenizer.join(tokenizer.tokens(examples.ids[start + 1 : end - 1])) for start, end in bounds]


@pytest.fixture
def tokenizer(pretrained: Path) -> Tokenizer:
    return load_encoder(find_checkpoint(pretrained))[1]


def test_csv_json_and_parquet_give_the_same_examples(settings: Finetune, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [(text, str(index % 2)) for index, (text, _) in enumerate(decidable_texts(40))]
    columns = {"text": [text for text, _ in rows], "label": [int(label) for _, label in rows]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    write_csv(tmp_path / "y.csv", rows)
    write_jsonl(tmp_path / "x.jsonl", [{"label": int(label), "text": text} for text, label in reversed(rows)])
    files = {"csv": "y.csv", "jsonl": "x.jsonl", "parquet": "x.parquet"}
    data = {
        corpus: data_of(settings(corpus=corpus, source=(str(tmp_path / file),)), tokenizer)
        for corpus, file in files.items()
    }
    assert data["csv"].classifier.classes == ("0", "1")
    assert data["csv"].digest == data["jsonl"].digest == data["parquet"].digest  # whatever the order of rows is
    assert len(data["csv"].validation)


def test_texts_are_held_out_by_digest_and_never_trained_on(
    settings: Finetune, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = decidable_texts(200)
    source = (str(write_csv(tmp_path / "twice.csv", [*rows, *reversed(rows)])),)
    data = data_of(settings(source=source, validation_fraction=0.3), tokenizer)
    train, held_out = (texts_of(examples, tokenizer) for examples in (data.train, data.validation))
    assert len(train) + len(held_out) == len(rows) == len({*train, *held_out})
    assert "left out: 200 copies of training texts" in caplog.text
    few = data_of(settings(source=source, validation_fraction=0.3, train_texts=20), tokenizer)
    assert texts_of(few.train, tokenizer) == train[:20]
    assert texts_of(few.validation, tokenizer) == held_out
    other = (str(write_csv(tmp_path / "validation.csv", rows[:30])),)
    data = data_of(settings(source=source, validation_source=other), tokenizer)
    assert len(data.validation) == 30 and len(data.train) == len(rows) - 30
    assert "left out: 30 training texts that are also validation or test texts" in caplog.text


def test_the_first_texts_of_a_sorted_file_are_a_fair_sample(
    settings: Finetune, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    sorted_rows = sorted(decidable_texts(200, seed=5), key=lambda row: row[1])
    source = (str(write_csv(tmp_path / "sorted.csv", sorted_rows)),)
    for name in ("validation", "test"):
        data = data_of(settings(**{f"{name}_source": source, f"{name}_texts": 60}), tokenizer)
        share = getattr(data, name).is_next.mean()
        assert len(getattr(data, name)) == 60 and 0.3 < share < 0.7


def test_imdb_is_tested_on_its_own_half(settings: Finetune, tokenizer: Tokenizer, tmp_path: Path) -> None:
    imdb_review_folder(tmp_path / "imdb", [text for text, _ in decidable_texts(80)])
    config = settings(corpus="imdb", source=(str(tmp_path / "imdb"),), test_texts=15)
    data = data_of(config, tokenizer)
    assert len(data.train) + len(data.validation) == 40 and len(data.test) == 15


def test_a_long_text_keeps_its_start_and_end_and_a_pair_the_start_of_both() -> None:
    a, b = np.arange(100, 120), np.arange(200, 230)
    single, pair = ClassifierConfig((), False, 14, 0.25), ClassifierConfig((), True, 14, 0.25)
    ids, length = classifier_input(a, None, single)
    assert ids.tolist() == [CLS, 100, 101, 102, *range(111, 120), SEP] and length == len(ids) == 14
    ids, length = classifier_input(a[:5], None, single)
    assert ids.tolist() == [CLS, *range(100, 105), SEP]
    ids, length = classifier_input(a, b, pair)
    assert ids.tolist() == [CLS, *range(100, 106), SEP, *range(200, 205), SEP] and length == 8


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a film", "x"), ("a ship", "x")], "all 2 training texts have the class 'x'; a classifier needs two or more"),
        ([("a film", "x"), ("", "y")], "x.csv: row 2: the text has no words in it"),
        ([("a film", "x"), ('"', "y")], "x.csv: row 2: the text has no words in it"),
        ([("a film", "x"), ("a ship", " ")], "x.csv: row 2: 'label' is empty"),
        ([], "no labelled text to train on"),
        ([("a film", "x"), ("a ship", "y")], "no text is left to hold out"),
        ([(f"film {i}", str(i)) for i in range(1002)], "'label' has 1,002 different values, such as 0, 1, 10"),
    ],
)
def test_texts_that_cannot_be_learned_from_are_one_line(
    settings: Finetune, tokenizer: Tokenizer, tmp_path: Path, rows: list[tuple[str, ...]], message: str
) -> None:
    source = (str(write_csv(tmp_path / "x.csv", rows)),)
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        data_of(settings(source=source, validation_fraction=1e-9), tokenizer)


def test_a_class_without_training_texts_names_its_row(settings: Finetune, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "validation.csv", [("a film", "neg"), ("a ship", "fine")])
    for name in ("validation_source", "test_source"):
        with pytest.raises(DataError, match=r"row 2: class 'fine' has no training text; those have neg, pos"):
            data_of(settings(**{name: (str(path),)}), tokenizer)


def test_bad_rows_can_be_skipped(
    settings: Finetune, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"text": text, "label": label} for text, label in decidable_texts(40)]
    bad: list[dict[str, Any]] = [
        {"text": "", "label": "neg"},
        {"text": 1, "label": "neg"},
        {"text": "a"},
        {"text": "\ud800", "label": "x"},
    ]
    source = (str(write_jsonl(tmp_path / "x.jsonl", [*bad, *good])),)
    with pytest.raises(DataError, match="line 2: 'text' is not a string"):
        data_of(settings(corpus="jsonl", source=source), tokenizer)
    data = data_of(settings(corpus="jsonl", source=source, skip_bad_rows=True), tokenizer)
    assert len(data.train) + len(data.validation) == len(good)
    for line, problem in enumerate(["no words", "not a string", "no key 'label'", "surrogate"], 1):
        assert f"line {line}: " in caplog.text and problem in caplog.text


def test_pairs_are_read_as_two_segments(settings: Finetune, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label, "second": "the ship"} for text, label in decidable_texts(40)]
    source = (str(write_jsonl(tmp_path / "x.jsonl", rows)),)
    config = settings(corpus="jsonl", source=source, pair_column="second", max_steps=2)
    data = data_of(config, tokenizer)
    assert data.classifier.pairs
    assert (np.bincount(data.train.segments)[2] == 3 * len(data.train)).all()
    assert ending_of(config)[1]["validation"]["texts"] == len(data.validation)


# Scores


def test_scores_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    probability_PC = rng.dirichlet([1, 1, 1], 90)
    class_P = rng.integers(0, 3, 90)
    predicted_P = probability_PC.argmax(1)
    scores = class_scores(probability_PC, class_P, majority=1)
    assert scores.class_loss == pytest.approx(metrics.log_loss(class_P, probability_PC))
    assert scores.class_accuracy == pytest.approx((predicted_P == class_P).mean())
    assert scores.macro_f1 == pytest.approx(metrics.f1_score(class_P, predicted_P, average="macro"))
    assert scores.majority_accuracy == pytest.approx((class_P == 1).mean())
    report = class_report(probability_PC, class_P, ("a", "b", "c"), 1, seed=0)
    f1 = [report["classes"][name]["f1"]["value"] for name in "abc"]
    assert f1 == pytest.approx(metrics.f1_score(class_P, predicted_P, average=None))
    for score in (report["accuracy"], report["macro_f1"], report["calibration_error"]):
        assert score["interval"][0] <= score["value"] <= score["interval"][1]


def test_a_class_that_no_text_has_is_null_in_the_report() -> None:
    probability_PC = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    report = class_report(probability_PC, np.array([0, 1]), ("a", "b", "c"), 0, seed=0)
    assert report["classes"]["c"] == {"texts": 0, "f1": {"value": None, "interval": [None, None]}}
    assert report["macro_f1"]["value"] == 1
    json.dumps(report, allow_nan=False)


@pytest.mark.slow
def test_other_classifiers_are_compared_on_the_same_texts(
    settings: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    test = (str(write_csv(tmp_path / "test.csv", decidable_texts(60, seed=1))),)
    _, report = ending_of(settings(test_source=test, compare=True, epochs=4))
    accuracy = {name: scores["accuracy"]["value"] for name, scores in report["compared"].items()}
    assert accuracy["fine-tuned"] == report["test"]["accuracy"]["value"]
    assert accuracy["bag of words"] > 0.9 and accuracy["majority"] < 0.6
    ahead = report["compared"]["bag of words"]["fine_tuned_is_ahead"]["value"]
    assert ahead == pytest.approx(accuracy["fine-tuned"] - accuracy["bag of words"])
    assert "fine-tuned is ahead by" in format_comparison(report["compared"])
    _, scratch = ending_of(settings(test_source=test, from_scratch=True, epochs=4, out=tmp_path / "scratch"))
    assert accuracy["from scratch"] == scratch["test"]["accuracy"]["value"]


def test_a_missing_library_of_the_comparison_is_named_before_the_work(
    settings: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UsageError, match=r"pip install 'babybert-pretrain\[evaluate\]'"):
        finetune(settings(compare=True))
    assert not settings().out.exists()


# The command


def test_the_command_prints_scores_as_a_table_or_json(
    settings: Finetune, pretrained: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["finetune", "--checkpoint", str(pretrained), "--corpus", "csv", "--source", str(texts), "--no-metrics"]
    flags += ["--device", "cpu", "--max-steps", "2"]
    assert main([*flags, "--out", str(tmp_path / "one")]) == 0
    assert "macro F1" in capsys.readouterr().out
    assert main([*flags, "--out", str(tmp_path / "two"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["test"] is None and set(report["validation"]["classes"]) == {"neg", "pos"}
    for wrong, message in (
        (["--source", str(tmp_path / "no.csv")], "no such file"),
        (["--label-column", "class"], "no column 'class'; it has text, label; choose one with --label-column"),
        (["--checkpoint", str(tmp_path / "none")], "no valid checkpoint"),
    ):
        assert main([*flags, "--out", str(tmp_path / "three"), *wrong]) == 3
        assert message in capsys.readouterr().err
        assert not (tmp_path / "three").exists()
    assert main([*flags, "--text-column", "label"]) == 2
    assert main([*flags, "--corpus", "imdb", "--pair-column", "b"]) == 2


def test_a_batch_without_padding_is_classified_as_with_padding(demo: Any) -> None:
    torch.manual_seed(0)
    sizes = ModelConfig(demo.tokenizer.size, width=16, heads=2, layers=2, feed_forward=16, dropout=0.0)
    model = TextClassifier(sizes, ClassifierConfig(("a", "b", "c"), False, 40, 0.25)).eval()
    ids_1T, padded_2T = torch.tensor([[CLS, 9, 8, SEP]]), torch.tensor([[CLS, 9, 8, SEP, 0, 0], [CLS, 5, 6, 7, 8, SEP]])
    alone = model.class_logits(ids_1T, torch.ones_like(ids_1T))
    for kernels in ("auto", "plain"):
        together = model.set_kernels(kernels).class_logits(padded_2T, (padded_2T > 0).long())
        torch.testing.assert_close(together[:1], alone)


def test_settings_that_cannot_work_are_refused() -> None:
    wrong: dict[str, Any]
    for wrong in (
        {"dropout": 1.0},
        {"lr": 0.0},
        {"positions": 3},
        {"head_share": 1.5},
        {"validation_fraction": 0.0},
        {"train_texts": 1},
        {"source": ()},
        {"source": ("",)},
        {"epochs": 0},
        {"seed": -1},
        {"checkpoint": "s3://"},
    ):
        with pytest.raises(UserError):
            FinetuneConfig(**wrong)
