"""`make fuzz`: `prepare` with strange files and all commands with strange settings end in one line, never a traceback.

    python tests/fuzz.py --seed 7 --files 1000 --settings 3000
    python tests/fuzz.py --seed 7 --case files:123     # one case again; its files are kept

A case is a function of the seed and its index. Its command runs in this process, through the function that the
`babybert` command calls. It must end with exit code 0, 2 or 3, with exactly one line with `error:` unless it succeeds,
and within a time limit. A dataset that `prepare` reports as written must be opened by `babybert info`. Settings are
only parsed: no command starts with them.
"""

import argparse
import bz2
import contextlib
import csv
import faulthandler
import gzip
import io
import json
import lzma
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard

from babybert.cli import COMMANDS, main, make_parser
from babybert.config.command_line import load_config
from babybert.corpus.demo import generate_reviews
from babybert.errors import UserError

SECONDS_PER_CASE = 20
ERROR_LINE = re.compile(r"^babybert[ a-z-]*: error: ", re.MULTILINE)
REVIEWS = generate_reviews(40, seed=0)
STRANGE_TEXTS = [
    "", " ", "\n", "\r", "\0", "\x1b[31m", "\ufeff", "\u2028", "\u0085", "\u0130", "\u03a3", "\ufdfa" * 9,
    "\U0001f600" * 30, "a\u0301\u0327" * 50, "\u202eabc", "[MASK]", "[PAD] [CLS].", "<br />", "'", '"', '""', "NaN",
    "null", "=1+1", "0", ".", "!?.", ". . .", "\u3002", "x" * 300, "x" * 150_000, "word " * 3000, "\ud800",
    "\udfff\ud800", "\ufffd", "\ufffe",
]  # fmt: skip
STRANGE_CELLS = [None, True, 7, -1, 1.5, 10**30, float("nan"), [], {}, [[["text"]]], {"text": "inner"}, b"\xff"]
STRANGE_VALUES = [
    "", " ", "0", "-1", "1", "2", "007", "1.5", "-0", "inf", "-inf", "nan", "1e400", "-1e400", "1e-400", "1e3",
    "1_000", "\u00b2", "\u0663", "\u2460", "0x10", "1,5", "1:30", "true", "No", "none", "None", "null", "~", "[]",
    "{}", "\n", "a\nb", "a\tb", "\x1b[31m", "\x7f", "\U0001f600", "\u202e", "\ud800", "\udcff", "9" * 5000, "x" * 5000,
    "99999999999999999999", "--", "-x", "--out", "/", ".", "..", "/dev/null", "s3://", "s3:///x", "s3://b/\x00", "auto",
    "tiny", "'", '"', "%s", "%(x)s",
]  # fmt: skip
STRANGE_YAML = [
    "", "~", "[]", "7", "text", "- 1", "a: b: c", "\t", "{", "&a [*a]", "&a {a: *a}", "*a",
    "!!python/object:os.system {}", "a: 1\na: 2", "? [1]\n: 2", "--- 1\n--- 2", "%YAML 9.9\n---\n", "x: !!binary ====",
    "\ufeffa: 1", "\0", "<<: 1", "<<: [1]", "2024-01-01: 1", "1:30: 1", "~: 1", "!!set {a}", "a: |\n b", "[" * 3000,
    "{a: " * 200, "a: 2024-13-45", "a: 1e", "\x85",
]  # fmt: skip
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": zstandard.ZstdCompressor().compress,
}
ENDINGS = {"text": ".txt", "csv": ".csv", "jsonl": ".jsonl", "parquet": ".parquet", "table": ".csv", "imdb": ".txt"}


class CaseError(Exception):
    """A command that did not end as it must."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, and what it wrote to standard error."""

    exit_code: int
    errors: str


def run(arguments: Sequence[str]) -> tuple[Outcome, str]:
    """Run `babybert ARGUMENTS` in this process. Returns how it ended and its output. Raises CaseError."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        exit_code = _exit_code(lambda: main(arguments))
    outcome = Outcome(exit_code, errors.getvalue())
    check(outcome)
    return outcome, output.getvalue()


def _exit_code(call: Callable[[], Any]) -> int:
    """What a process would exit with after `call`. Raises CaseError for an exception that is not for users."""
    try:
        return int(call() or 0)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except Exception as error:
        raise CaseError(traceback.format_exc()) from error


def check(outcome: Outcome) -> None:
    """Raise CaseError unless a command ended as it must."""
    if outcome.exit_code not in (0, 2, 3):
        raise CaseError(f"exit code {outcome.exit_code}\n{outcome.errors}")
    error_lines = len(ERROR_LINE.findall(outcome.errors))
    if error_lines != (outcome.exit_code != 0):
        raise CaseError(f"{error_lines} error lines with exit code {outcome.exit_code}\n{outcome.errors}")
    if "Traceback" in outcome.errors or "Exception ignored" in outcome.errors:
        raise CaseError(f"a traceback\n{outcome.errors}")
    if error_lines and not ERROR_LINE.match(outcome.errors.rstrip("\n").rpartition("\n")[2]):
        raise CaseError(f"the error is more than one line\n{outcome.errors}")


def files_case(rng: random.Random, folder: Path) -> str:
    """`babybert prepare` with generated files. Returns what happened, for the statistics. Raises CaseError."""
    corpus = rng.choice([*ENDINGS, "jsonl", "parquet", "csv"])
    source = folder / "in"
    source.mkdir()
    for number in range(rng.choice([1, 12]) if corpus in ("text", "imdb") else rng.choice([1, 1, 2, 4])):
        write_file(rng, corpus, source, number)
    out = folder / "out"
    flags = [f"--corpus={corpus}", f"--source={source}", f"--out={out}", "--validation-fraction=0.3"]
    optional = ["--skip-bad-rows", "--documents=blank-lines", "--limit=5", "--format=parquet", "--max-positions=9",
                "--min-frequency=3", "--vocab-size=40", "--delimiter=;", "--delimiter=tab", "--text-column=body",
                "--duplicates=2"]  # fmt: skip
    if corpus != "table" and rng.random() < 0.3:
        flags.append("--segments=runs")
    flags += [flag for flag in optional if rng.random() < (0.6 if flag == "--skip-bad-rows" else 0.08)]
    if rng.random() < 0.15:
        flags += ["--tokenizer-kind=wordpiece", "--vocab-size=300"]
    if corpus == "table":
        good = folder / "good.csv"
        good.write_bytes(table_csv(rng, good=True))
        flags += [f"--validation-source={good}", f"--tokenizer={tokenizer(folder.parent)}"]
    outcome, _ = run(["prepare", *flags])
    if outcome.exit_code == 0:
        outcome, description = run(["info", str(out), "--json"])
        if outcome.exit_code or json.loads(description)["kind"] != "dataset":
            raise CaseError(f"info cannot open what prepare wrote\n{outcome.errors}")
    elif out.exists():
        raise CaseError(f"exit code {outcome.exit_code}, but {out} exists\n{outcome.errors}")
    return f"prepare --corpus {corpus}: {outcome.exit_code}"


def tokenizer(folder: Path) -> Path:
    """The tokenizer.json of a dataset that is made once below `folder`."""
    data = folder / "tokenizer"
    if not (data / "dataset.json").exists():
        run(["prepare", f"--out={data}", "--demo-documents=20", "--validation-fraction=0.3"])
    return data / "tokenizer.json"


def write_file(rng: random.Random, corpus: str, folder: Path, number: int) -> None:
    """Write one source file: good or strange rows, perhaps damaged, in another encoding, or compressed."""
    writers = {
        "text": text_file,
        "csv": csv_file,
        "jsonl": json_file,
        "parquet": parquet_file,
        "table": table_file,
        "imdb": text_file,
    }
    ending = ENDINGS[corpus]
    content = writers[corpus](rng)
    if corpus == "table" and rng.random() < 0.3:
        ending, content = ".parquet", table_parquet(rng)
    if ending != ".parquet" and rng.random() < 0.15:
        encoding = rng.choice(["utf-16", "utf-32", "utf-16-le", "utf-8-sig", "latin-1", "cp037"])
        content = content.decode("utf-8", "replace").encode(encoding, "replace")
    if rng.random() < 0.2:
        content = damage(rng, content)
    compression = rng.choice([*COMPRESSORS, "", "", "", ""]) if ending != ".parquet" or rng.random() < 0.1 else ""
    if compression:
        content = COMPRESSORS[compression](content)
        if rng.random() < 0.3:
            content = damage(rng, content)
        if rng.random() < 0.1:
            compression = rng.choice([*COMPRESSORS, ""])
    name = (
        f"train/pos/{number}_7" if corpus == "imdb" else rng.choice(["a", "B [1]", "\u00fc", "line\nbreak", "x" * 200])
    )
    if rng.random() < 0.05:
        ending = rng.choice(list(ENDINGS.values()))
    path = folder / f"{name}{number}{rng.choice([ending, ending.upper()])}{compression}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def damage(rng: random.Random, content: bytes) -> bytes:
    """Cut, change, insert, repeat or replace bytes."""
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    some_bytes = rng.choice([b"\0", b"\xff", b'"', b"\r", b"\n", b"[", b"{", b"\xef\xbb\xbf", rng.randbytes(8)])
    return rng.choice(
        [
            content[:start],
            content[end:],
            content[:start] + some_bytes + content[start:],
            content[:start] + some_bytes + content[start + len(some_bytes) :],
            content[:start] + content[end:],
            content + content[start:end],
            content[:-1],
            rng.randbytes(rng.randrange(2000)),
            b"",
        ]
    )


def texts(rng: random.Random) -> list[str]:
    """Documents, of which some are strange."""
    strange_share = rng.choice([0.0, 0.0, 0.1, 0.1, 0.5, 1.0])
    return [
        strange_text(rng) if rng.random() < strange_share else rng.choice(REVIEWS)
        for _ in range(rng.choice([0, 1, 30, 30, 30]))
    ]


def strange_text(rng: random.Random) -> str:
    parts = rng.choices([*STRANGE_TEXTS, *REVIEWS[:5]], k=rng.randrange(1, 4))
    return rng.choice(["", " ", ". "]).join([*parts, chr(rng.randrange(0x110000))])


def encode(text: str) -> bytes:
    """A text in UTF-8; half of a surrogate pair gets bytes that are not valid."""
    return text.encode("utf-8", "surrogatepass")


def text_file(rng: random.Random) -> bytes:
    return encode(rng.choice(["\n\n", "\n", "\r\n\r\n"]).join(texts(rng)))


def csv_file(rng: random.Random) -> bytes:
    header = rng.choice(
        [
            ["text"],
            ["n", "text"],
            ["text", "n", "x"],
            ["n", "text"],
            ["text", "n"],
            ["text", "text"],
            ["body"],
            [""],
            ["text", strange_text(rng)],
        ]
    )
    file = io.StringIO()
    writer = csv.writer(
        file,
        delimiter=rng.choice([",", ",", ";", "\t", "|"]),
        quoting=rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
        lineterminator=rng.choice(["\n", "\n", "\r\n", "\r\n", "\r"]),
    )
    writer.writerow(header)
    for text in texts(rng):
        cells = rng.choice([len(header)] * 99 + [len(header) + 1])
        writer.writerow([text if name in ("text", "body") else "1" for name in [*header, "more"][:cells]])
    return encode(file.getvalue())


def json_file(rng: random.Random) -> bytes:
    rows: list[str] = []
    for text in texts(rng):
        value = (
            text if rng.random() < 0.95 else rng.choice([cell for cell in STRANGE_CELLS if not isinstance(cell, bytes)])
        )
        row = json.dumps({"n": 1, "text": value}, ensure_ascii=rng.random() < 0.5)
        rows.append(row if rng.random() < 0.99 else rng.choice([
            '{"text": "a", "text": "b"}', "[]", "7", "{}", '{"text": ' + "9" * 5000 + "}", "[" * 50_000,
            '{"a": ' * 50_000, '{"te\\u0078t": "escaped"}', '{"text": NaN}', "nul", row[: rng.randrange(len(row))],
        ]))  # fmt: skip
    if rng.random() < 0.3:
        return encode("[" + rng.choice([",", ",\n", ", ", "\n"]).join(rows) + "]")
    return encode(rng.choice(["\n", "\n", "\r\n", "\n\n", "\r"]).join(rows))


def parquet_file(rng: random.Random) -> bytes:
    column: pa.Array = pa.array([encode(text) for text in texts(rng)], pa.binary())
    text_type = rng.choice(
        [pa.string()] * 5 + [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    )
    if rng.random() < 0.9:
        column = column.view(pa.string())
        column = column.dictionary_encode() if pa.types.is_dictionary(text_type) else column.cast(text_type, safe=False)
    if rng.random() < 0.1:
        column = rng.choice(
            [pa.array([1, None]), pa.array([["a"]]), pa.array([{"text": "a"}]), pa.nulls(3), pa.array([1.5])]
        )
    names = rng.choice([["text"]] * 8 + [["text", "text"], ["body"], ["text.x"], [""]])
    return parquet_bytes(rng, pa.table([column] * len(names), names=names))


def parquet_bytes(rng: random.Random, table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(
        table, file, row_group_size=rng.choice([5, 1000]), compression=rng.choice(["none", "snappy", "zstd"])
    )
    return file.getvalue()


def table_rows(rng: random.Random, good: bool) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for _ in range(rng.choice([1, 20])):
        length = rng.randrange(4, 9)
        ids = [1, *(rng.randrange(5, 60) for _ in range(length - 2)), 2]
        row: list[Any] = [ids, [0] * length, [1] * length, rng.randrange(2)]
        if not good and rng.random() < 0.03:
            strange = [
                *STRANGE_CELLS,
                [0] * length,
                [10**30],
                [-1] * length,
                [1.5],
                "[" * 5000,
                "[1, 2",
                "\u00b2",
                "1, 2",
            ]
            row[rng.randrange(4)] = rng.choice(strange)
        rows.append(row)
    return rows


def table_csv(rng: random.Random, good: bool) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter="," if good else rng.choice([",", ",", ";", "\t"]))
    columns = ["bert_input", "bert_label", "segment_label", "is_next"]
    course = ["BERT Input", "BERT Label", "Segment Label", "Is Next"]
    writer.writerow(
        columns if good else rng.choice([columns, columns, course, [*columns, "more"], columns[:3], columns * 2])
    )
    writer.writerows(table_rows(rng, good))
    return encode(file.getvalue())


def table_file(rng: random.Random) -> bytes:
    return table_csv(rng, good=False)


def table_parquet(rng: random.Random) -> bytes:
    columns: list[list[Any]] = [list(column) for column in zip(*table_rows(rng, good=True), strict=True)]
    strange: list[Any] = [1.5, None, "1", b"\xff", [None], [], [10**18]]
    if rng.random() < 0.3:
        columns[rng.randrange(4)] = [rng.choice(strange)] * len(columns[0])
    return parquet_bytes(rng, pa.table(columns, names=["bert_input", "bert_label", "segment_label", "is_next"]))


def settings_case(rng: random.Random, folder: Path) -> str:
    """The settings of any command from flags, variables and a file. Raises CaseError."""
    name, command = rng.choice(list(COMMANDS.items()))
    hints = typing.get_type_hints(command.config_class)
    settings = {field.name: hints[field.name] for field in fields(command.config_class)}
    chosen = rng.sample(list(settings), k=min(len(settings), rng.randrange(4)))
    flags: list[str] = []
    environment: dict[str, str] = {}
    file_values: dict[Any, Any] = {}
    for setting in chosen:
        value = strange_value(rng, settings[setting])
        place = rng.choice(["flag", "variable", "file"])
        if place == "flag":
            flags.append(f"--{setting.replace('_', '-')}={value}")
        elif place == "variable":
            environment[f"BABYBERT_{name}_{setting}".upper().replace("-", "_")] = value
        else:
            file_values[setting] = rng.choice(
                [value, value, 10**400, float("inf"), None, [value], {value: 1}, True, b"\xff"]
            )
    if file_values or rng.random() < 0.3:
        path = folder / "settings.yaml"
        path.write_bytes(settings_file(rng, name, file_values))
        flags.append(f"--config={path}")
    positional = [rng.choice(["a", *STRANGE_VALUES]) for argument in command.arguments if argument not in settings]
    arguments = [name, *flags, *(["--", *positional] if positional else [])]

    def parse() -> int:
        try:
            load_config(command.config_class, name, make_parser().parse_args(arguments), environment, COMMANDS)
            return 0
        except UserError as error:
            print(f"babybert {name}: error: {error}", file=sys.stderr)  # as `main` does
            return error.exit_code

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        exit_code = _exit_code(parse)
    try:
        check(Outcome(exit_code, errors.getvalue()))
    except CaseError as error:
        raise CaseError(f"{error}\n{arguments}\n{environment}\n{file_values}") from error
    return f"settings: {exit_code}"


def strange_value(rng: random.Random, value_type: Any) -> str:
    """A value for a setting; often one that is right."""
    choices = typing.get_args(value_type)
    if typing.get_origin(value_type) is typing.Literal and rng.random() < 0.5:
        return str(rng.choice(choices))
    if isinstance(value_type, types.UnionType):
        value_type = choices[0]
    if value_type in (int, float) and rng.random() < 0.3:
        return str(rng.choice([0, 1, 2, 8, 100, 0.5, 1e-3, 1e300, 2**31, 2**63, -5]))
    return rng.choice(STRANGE_VALUES)


def settings_file(rng: random.Random, command: str, values: dict[Any, Any]) -> bytes:
    """A YAML file with these values below the command's name, or a strange one."""
    if not values or rng.random() < 0.15:
        content = rng.choice(STRANGE_YAML)
        content = content if rng.random() < 0.5 else f"{command}:\n  " + content.replace("\n", "\n  ")
    else:
        content = yaml.safe_dump({command: values}, allow_unicode=rng.random() < 0.5)
    encoded = content.encode("utf-8", "surrogatepass")
    return damage(rng, encoded) if rng.random() < 0.1 else encoded


CASES: dict[str, Callable[[random.Random, Path], str]] = {"files": files_case, "settings": settings_case}


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise CaseError in what takes longer."""

    def stop(signal_number: int, frame: Any) -> None:
        raise CaseError(f"takes more than {seconds} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def run_case(kind: str, seed: int, index: int, work: Path, keep: bool = False) -> str:
    """Run one case in a folder of its own. Returns what happened, for the statistics. Raises CaseError."""
    folder = work / f"{kind}-{index}"
    folder.mkdir()
    try:
        with time_limit(SECONDS_PER_CASE):
            return CASES[kind](random.Random(f"babybert {kind} {seed} {index}"), folder)
    finally:
        if not keep:
            shutil.rmtree(folder)


def fuzz(kind: str, count: int, seed: int, deadline: float, work: Path) -> int:
    """Run cases until all are done or the time is over; print failures and statistics. Returns how many failed."""
    statistics: Counter[str] = Counter()
    slowest = (0.0, 0)
    failed = 0
    for index in range(count):
        start = time.monotonic()
        if start > deadline:
            print(f"{kind}: out of time after {index} of {count} cases")
            break
        try:
            statistics[run_case(kind, seed, index, work)] += 1
        except CaseError as error:
            failed += 1
            print(f"\nFAILED --seed {seed} --case {kind}:{index}\n{error}", flush=True)
        slowest = max(slowest, (time.monotonic() - start, index))
    for outcome, cases in sorted(statistics.items()):
        print(f"{cases:6} {outcome}")
    print(f"{kind}: {failed} failed; slowest: {slowest[0]:.1f} s, {kind}:{slowest[1]}", flush=True)
    return failed


def run_fuzz() -> int:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="of all cases; the default is another one each time")
    parser.add_argument("--files", type=int, default=1000, help="how many cases of files")
    parser.add_argument("--settings", type=int, default=3000, help="how many cases of settings")
    parser.add_argument("--seconds", type=float, default=280, help="stop after this time")
    parser.add_argument("--case", metavar="KIND:INDEX", help="run this case only, and keep its folder")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    faulthandler.enable()
    work = Path(tempfile.mkdtemp(prefix="babybert-fuzz-"))
    if options.case:
        kind, _, index = options.case.partition(":")
        print(work / f"{kind}-{index}")
        print(run_case(kind, seed, int(index), work, keep=True))
        return 0
    deadline = time.monotonic() + options.seconds
    failed = fuzz("settings", options.settings, seed, deadline, work) + fuzz(
        "files", options.files, seed, deadline, work
    )
    shutil.rmtree(work)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(run_fuzz())
