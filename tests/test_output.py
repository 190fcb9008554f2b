"""What commands print: texts that an encoding lacks, names that are not text, readers that are gone, full disks."""

import codecs
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import COMMAND_SECONDS, babybert_command

from babybert.cli import main
from babybert.commands import print_json
from babybert.config import PrepareConfig, PretrainConfig
from babybert.data.prepare import prepare
from babybert.encoding import HANDLER, decode_path, escape_unencodable_output, printable
from babybert.errors import UsageError
from babybert.figures import figure_paths
from babybert.training.train import pretrain

WORDS = ("ä", "—", "$x$", "日本", "_base", "a_{$")
NOT_UTF_8 = os.fsdecode(b"d\xe9")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a folder whose name is not UTF-8, with tokens outside ASCII and with dollar signs."""
    folder = tmp_path_factory.mktemp("names") / NOT_UTF_8
    folder.mkdir()
    reviews = [{"text": f"{' '.join(WORDS)} {i} . {' '.join(WORDS[::-1])} {i} ."} for i in range(40)]
    source = folder / "ä.jsonl"
    source.write_text("\n".join(map(json.dumps, reviews)), encoding="utf-8")
    data = folder / "data"
    prepare(PrepareConfig(corpus="jsonl", source=(str(source),), out=data, format="parquet", validation_fraction=0.3))
    sizes: dict[str, Any] = {"width": 8, "heads": 2, "layers": 1, "feed_forward": 16}
    result = pretrain(
        PretrainConfig(data=data, out=folder / "run", max_steps=2, metrics=False, device="cpu", log_every=1, **sizes)
    )
    assert result is not None
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_every_word_can_be_printed(run: Path, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        babybert_command("fill-mask", "ä [MASK] .", f"--checkpoint={run}", "--top-k=6", "--targets", *WORDS),
        capture_output=True,
        env={**os.environ, **environment},
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"%") == len(WORDS)
    assert rb"\u2014" in done.stdout
    assert (b"\xe4" if environment.get("PYTHONIOENCODING") == "latin-1" else rb"\xe4") in done.stdout


def test_a_report_with_a_name_that_is_not_utf_8_can_be_sent(request: pytest.FixtureRequest) -> None:
    """pytest-xdist sends the reports of its processes as UTF-8."""
    report = pytest.TestReport("name", ("", 0, ""), {}, "passed", None, "call", sections=[("log", NOT_UTF_8)])
    data = request.config.hook.pytest_report_to_serializable(config=request.config, report=report)
    assert rb"d\\udce9" in json.dumps(data, ensure_ascii=False).encode("utf-8")


def run_commands(*commands: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run several commands in one process, which saves the imports; it prints their exit codes on its last line."""
    script = f"from babybert.cli import main; print([main(command) for command in {list(commands)!a}])"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=COMMAND_SECONDS)


@pytest.mark.slow
def test_a_folder_that_is_not_utf_8_works_in_each_command(run: Path) -> None:
    data, figures = run.parent / "data", run.parent / "figures"
    done = run_commands(
        ["info", str(run)],
        ["info", str(data), "--json"],
        ["evaluate", f"--checkpoint={run}", f"--data={data}", f"--plot={figures / 'report'}"],
        ["look", f"--checkpoint={run}", f"--plot={figures / 'look'}", "--words", *WORDS],
        ["explain", "ä", "—", f"--checkpoint={run}"],
        ["plot", str(run), f"--out={figures / 'curves'}"],
        ["archive", str(run), f"--out={run.parent / 'store'}"],
        ["next-sentence", "ä", "—", f"--checkpoint={run}", "--json"],
    )
    assert done.stdout.splitlines()[-1:] == [b"[0, 0, 0, 0, 0, 0, 0, 0]"], done.stderr
    assert len(list(figures.iterdir())) == 6
    assert os.fsencode(figures / "curves.png") + b"\n" in done.stdout  # a path is printed as it is


def test_json_is_valid_in_every_encoding(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    content = {"token": "ä—", "path": NOT_UTF_8}
    for encoding in ("utf-8", "ascii"):
        script = f"import babybert.commands as c; c.print_json({content!r})"
        subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONIOENCODING": encoding}, check=True)
        assert json.loads(capfdbinary.readouterr().out.decode("ascii")) == content
    print_json({"token": "ä"})
    assert json.loads(capfdbinary.readouterr().out) == {"token": "ä"}


def test_a_stream_that_others_read_shows_undecodable_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    escape_unencodable_output()
    assert stream.read() == "caf\\xe9"


def test_what_cannot_be_encoded_is_escaped() -> None:
    escape_unencodable_output()
    assert "aä—b".encode("latin-1", HANDLER) == b"a\xe4\\u2014b"
    assert NOT_UTF_8.encode("utf-8", HANDLER) == b"d\xe9"
    assert "\ud800".encode("utf-8", HANDLER) == b"\\ud800"
    assert codecs.decode(b"\xe9", "utf-8", HANDLER) == r"\xe9"
    assert printable(NOT_UTF_8) == r"d\xe9"
    assert decode_path("dä") == "dä"


def test_a_sentence_that_is_not_utf_8_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", NOT_UTF_8, "b"]) == 2
    assert "the first sentence is not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("explain", "a", "b"), ("--help",), ("--version",)])
@pytest.mark.slow
def test_a_reader_that_is_gone_is_no_error(arguments: tuple[str, ...], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            babybert_command(*arguments),
            stdout=writer,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            timeout=COMMAND_SECONDS,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_to_a_full_disk_is_one_line(tmp_path: Path, unbuffered: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('bert_input,bert_label,segment_label,is_next\n"[1,5,2]","[0,0,0]","[1,1,1]",1\n')
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            babybert_command("info", str(path)),
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            timeout=COMMAND_SECONDS,
        )
    assert done.returncode == 1
    message = b"babybert info: error: standard output: cannot be written: No space left on device; make room\n"
    assert done.stderr == message


def test_a_closed_output_is_no_error() -> None:
    command = " ".join(babybert_command("--version"))
    done = subprocess.run(f"{command} >&-", shell=True, stderr=subprocess.PIPE, timeout=COMMAND_SECONDS)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_a_path_that_is_too_long_is_a_usage_error(capsys: pytest.CaptureFixture[str], demo_folder: Path) -> None:
    for arguments in (["info", "x" * 300], ["evaluate", f"--checkpoint={'x' * 300}", f"--data={demo_folder}"]):
        assert main(arguments) == 2
        assert ": File name too long; choose another path" in capsys.readouterr().err


@pytest.mark.slow
def test_no_place_for_results_is_a_usage_error_before_the_work(run: Path, tmp_path: Path) -> None:
    """One rule for all commands: another folder has to be chosen."""
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    data = run.parent / "data"
    flags = {
        "prepare": ["--out"],
        "pretrain": [f"--data={data}", "--no-metrics", "--out"],
        "archive": [str(run), "--out"],
        "plot": [str(run), "--out"],
        "evaluate": [f"--checkpoint={run}", f"--data={data}", "--plot"],
        "look": [f"--checkpoint={run}", "--plot"],
    }
    done = run_commands(*([name, *arguments, str(below / "x")] for name, arguments in flags.items()))
    assert done.stdout == b"[2, 2, 2, 2, 2, 2]\n", done.stderr
    errors = [line for line in done.stderr.splitlines() if b": error: " in line]
    for (name, arguments), error in zip(flags.items(), errors, strict=True):
        message = f"cannot be written: Not a directory; choose another {arguments[-1]}"
        assert error.startswith(f"babybert {name}: error: ".encode()) and error.endswith(message.encode())


@pytest.mark.parametrize("name", ["..", ".", "/"])
def test_a_figure_needs_a_name(name: str) -> None:
    with pytest.raises(UsageError, match="is not the name of a figure; choose another --out"):
        figure_paths(Path(name), "--out")


@pytest.mark.slow
def test_no_place_for_temporary_files_is_a_usage_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    archive, labels = tmp_path / "babybert.mar", tmp_path / "labels.csv"
    archive.touch()
    labels.write_text("text,label\nx,a\n")
    for arguments in (
        ["archive", str(run), f"--out={tmp_path / 'store'}"],
        ["serve", str(archive)],
        ["playground", f"--checkpoint={run}"],
        ["probe", f"--checkpoint={run}", "--corpus=csv", f"--source={labels}"],
    ):
        assert main(arguments) == 2, arguments
        assert "no temporary folder can be made" in capsys.readouterr().err


def test_matplotlib_without_a_folder_for_its_fonts_is_a_usage_error(run: Path) -> None:
    script = "import sys, tempfile; tempfile.tempdir = '/proc/none'; from babybert.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "plot", str(run)],
        capture_output=True,
        text=True,
        env={**os.environ, "MPLCONFIGDIR": "/proc/none"},
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == 2, done.stderr
    assert "set MPLCONFIGDIR to a folder that can be written" in done.stderr.splitlines()[-1]


def test_progress_in_ascii() -> None:
    """A bar has no characters that the terminal lacks."""
    script = (
        "from babybert.progress import Progress\n"
        "with Progress('fetch s3://b/[/a-z]*', 2, 'bytes') as progress: progress.advance()"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, timeout=COMMAND_SECONDS)
    assert done.returncode == 0, done.stderr
    assert b"fetch s3://b/[/a-z]* " in done.stderr
    assert done.stderr.isascii() and rb"\u" not in done.stderr


@pytest.mark.slow
@pytest.mark.serial
def test_an_interrupt_is_one_line(tmp_path: Path) -> None:
    """Ctrl-C while a command works: the test sends the signal from within, so that it always arrives there."""
    for function in ("babybert.data.shards:Shard.close", "babybert.corpus.demo:generate_reviews"):
        module, _, name = function.partition(":")
        script = (
            f"import os, signal, sys, {module} as module\n"
            "from babybert.cli import main\n"
            f"holder = eval('module.{name}'.rpartition('.')[0])\n"
            f"setattr(holder, {name.rpartition('.')[2]!r}, lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
            f"sys.exit(main(['prepare', '--demo-documents=40', '--out={tmp_path / 'data'}']))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=COMMAND_SECONDS)
        assert done.returncode == 130, done.stderr
        assert done.stderr.splitlines()[-1] == "babybert prepare: interrupted"
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "data").exists()
