"""`babybert info`: what it counts in each kind of file, and what it refuses."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from babybert.cli import main
from babybert.config import InfoConfig
from babybert.data.dataset import Dataset
from babybert.errors import DataError
from babybert.info import describe, measure
from babybert.model.ops_table import choices
from babybert.training.train import pretrain


def test_a_dataset_is_counted(demo: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    description = describe(demo.folder, InfoConfig())
    for split in ("train", "validation"):
        examples = demo.examples(split)
        assert description[split]["pairs"] == len(examples)
        assert description[split]["masked"] == pytest.approx((examples.labels > 0).mean())
        assert description[split]["is_next"] == examples.is_next.mean()
        assert description[split]["unknown"] == 0
        assert sum(entry["pairs"] for entry in description[split]["lengths"]) == len(examples)
    assert main(["info", str(demo.folder)]) == 0
    text = capsys.readouterr().out
    assert f"{len(demo.examples('train')):,} pairs" in text
    assert "█" in text
    assert main(["info", str(demo.folder), "--json", "--rows", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == description["rows"][:1]


def test_rows_are_decoded_with_their_masks(demo: Dataset) -> None:
    rows = describe(demo.folder, InfoConfig(rows=5))["rows"]
    examples = demo.examples("train")
    for index, row in enumerate(rows):
        pair = examples.rows(index, index + 1)
        assert row.startswith(f"is_next {pair.is_next[0]}: [CLS] ")
        words = row.split(": ", 1)[1].split(" ")
        assert len(words) == len(pair.ids)
        for word, token_id, label in zip(words, pair.ids, pair.labels, strict=True):
            expected = demo.tokenizer.token(token_id)
            if label:
                input_word = "MASK" if expected == "[MASK]" else expected
                expected = f"[{input_word}={demo.tokenizer.token(label)}]"
            assert word == expected


def test_equal_lengths_make_one_bar(demo: Dataset) -> None:
    examples = demo.examples("train")
    length = np.diff(examples.offsets)[0]
    rows = examples.rows(0, 1)
    assert measure(rows, demo.tokenizer.size)["lengths"] == [{"from": length, "to": length, "pairs": 1}]


def test_a_table_a_tokenizer_and_a_run(demo: Dataset, small: Any, capsys: pytest.CaptureFixture[str]) -> None:
    table = demo.folder / "train-00000.csv"
    with_tokenizer = describe(table, InfoConfig(tokenizer=demo.folder / "tokenizer.json"))
    without = describe(table, InfoConfig())
    assert with_tokenizer["pairs"]["pairs"] == without["pairs"]["pairs"] == len(demo.examples("train"))
    assert with_tokenizer["pairs"]["unigram_entropy"] == pytest.approx(without["pairs"]["unigram_entropy"])
    assert with_tokenizer["rows"][0].startswith("is_next")
    assert "1 " in without["rows"][0]
    tokenizer = describe(demo.folder / "tokenizer.json", InfoConfig())
    assert tokenizer["vocabulary"] == demo.tokenizer.size
    run = small().out
    pretrain(small(max_steps=3))
    description = describe(run, InfoConfig())
    assert description["step"] == 3
    assert description["sizes"]["width"] == 8
    assert description["tokenizer_digest"] == demo.tokenizer.digest
    for path in (table, demo.folder / "tokenizer.json", run, run / "step-00000003"):
        assert main(["info", str(path)]) == 0
    assert "step-00000003: checkpoint" in capsys.readouterr().out


def test_it_checks_what_it_shows(demo: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.csv"
    lines = (demo.folder / "train-00000.csv").read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:-1] + "7", lines[4]]))
    assert main(["info", str(path)]) == 3
    assert f"{path}: row 3: is_next is '7'" in capsys.readouterr().err
    assert main(["info", str(path), "--skip-bad-rows"]) == 0
    assert "skipped rows: 1" in capsys.readouterr().out
    assert main(["info", str(path), "--tokenizer", str(path)]) == 3
    assert "not a tokenizer file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "no such file"), ("x.md", "not a dataset, run"), ("", "no valid checkpoint")]
)
def test_other_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "x.md").write_text("hello")
    with pytest.raises(DataError, match=message):
        describe(tmp_path / name, InfoConfig())


def test_ops_shows_what_is_picked_on_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["info", "--ops", "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["device"] == "cpu"
    assert description["operations"] == [asdict(choice) for choice in choices(torch.device("cpu"))]
    assert main(["info", "--ops"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("operations on cpu, with --kernels auto\n")
    for row in description["operations"]:
        assert any(row["sizes"] in line and row["implementation"] in line for line in table.splitlines())


def test_without_a_path_or_ops_there_is_nothing_to_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 2
    assert "give a path, or --ops" in capsys.readouterr().err
