"""Exit codes and messages: one line on standard error and no traceback."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from babybert.cli import COMMANDS, main
from babybert.config import PretrainConfig
from babybert.training.train import pretrain


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Run a command that must end with exit code `code`. Returns the line with its error."""
    result: str | int | None
    try:
        result = main(arguments)
    except SystemExit as exit_:
        result = exit_.code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert result == code, error
    assert "error:" in error
    return error


def test_bad_usage_is_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "unknown preset 'huge'" in fails(capsys, 2, "pretrain", "--preset", "huge")
    assert "lr is -0.1" in fails(capsys, 2, "pretrain", "--lr", "-0.1")
    assert "--lr is 'fast'; it must be a number" in fails(capsys, 2, "pretrain", "--lr", "fast")
    assert "--max" in fails(capsys, 2, "pretrain", "--max", "3")  # no abbreviations
    assert "--corpus is 'books'; choose one of demo, imdb" in fails(capsys, 2, "prepare", "--corpus", "books")
    assert "COMMAND" in fails(capsys, 2)
    assert "--source" in fails(capsys, 2, "prepare", "--corpus", "csv")


def test_an_error_is_one_line_whatever_a_file_is_called(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "line\nbreak \x1b[31m \u2028.csv"
    path.write_text("a\nb\n")
    error = fails(capsys, 3, "prepare", "--corpus", "csv", "--source", str(path), "--out", str(tmp_path / "out"))
    assert error.startswith("babybert prepare: error: ")
    assert r"line\nbreak \x1b[31m \u2028.csv: no column 'text'" in error


def test_bad_data_is_3(capsys: pytest.CaptureFixture[str], tmp_path: Path, demo_folder: Path) -> None:
    assert "no such file" in fails(
        capsys,
        3,
        "prepare",
        "--corpus",
        "imdb",
        "--source",
        str(tmp_path / "x.tar.gz"),
        "--out",
        str(tmp_path / "data"),
    )
    assert not (tmp_path / "data").exists()
    assert "no files that end in .txt" in fails(
        capsys, 3, "prepare", "--corpus", "imdb", "--source", str(tmp_path), "--out", str(tmp_path / "data")
    )
    assert "no dataset.json" in fails(
        capsys, 3, "pretrain", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--no-metrics"
    )
    assert "no valid checkpoint" in fails(
        capsys, 3, "evaluate", "--checkpoint", str(tmp_path), "--data", str(demo_folder)
    )
    assert "no valid checkpoint" in fails(capsys, 3, "fill-mask", "a [MASK]", "--checkpoint", str(tmp_path))
    assert "no such file" in fails(capsys, 3, "serve", str(tmp_path / "x.mar"))


@pytest.mark.slow
def test_questions_and_scores(
    capsys: pytest.CaptureFixture[str], small: Callable[..., PretrainConfig], demo_folder: Path
) -> None:
    result = pretrain(small(max_steps=3))
    assert result is not None
    run = str(result.checkpoint.parent)
    assert main(["fill-mask", "Mary is [MASK].", "--checkpoint", run, "--top-k", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["fill-mask", "Mary is [MASK].", "--checkpoint", run, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["masks"][0]["candidates"]) == 5
    assert main(["fill-mask", "Mary is [MASK].", "--checkpoint", run, "--targets", "the", "Mary"]) == 0
    assert {line.split()[1] for line in capsys.readouterr().out.splitlines()} == {"the", "mary"}
    assert "not one word of the vocabulary: 'xyzzy'" in fails(
        capsys, 2, "fill-mask", "Mary is [MASK].", "--checkpoint", run, "--targets", "xyzzy"
    )
    assert main(["next-sentence", "Mary rides.", "She trains.", "--checkpoint", run]) == 0
    assert "follow A" in capsys.readouterr().out
    assert main(["evaluate", "--checkpoint", run, "--data", str(demo_folder), "--json", "--max-pairs", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 5
    assert "no [MASK]" in fails(capsys, 2, "fill-mask", "Mary is.", "--checkpoint", run)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_default(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.count("[default:") == text.count("\n  --") - text.count("--config FILE") // 2


def test_preparing_data_does_not_import_torch() -> None:
    code = "import sys, babybert.cli, babybert.data.prepare; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_messages_are_logged_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A library may give the root logger a handler, as TorchServe's archiver does when it is imported."""
    (tmp_path / "step-00000001").mkdir()
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        assert main(["evaluate", f"--checkpoint={tmp_path}"]) == 3
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err.count("skipping") == 1
