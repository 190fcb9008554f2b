"""Tables are read and checked: ours, the course's, Parquet files, and every kind of bad row."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from babybert.corpus.files import BadRows
from babybert.data.dataset import Dataset
from babybert.data.table import COLUMNS, Examples, concatenate
from babybert.data.table import read_table as read_chunks
from babybert.errors import DataError

GOOD = ["[1, 3, 6, 2]", "[0, 5, 0, 0]", "[1, 1, 1, 1]", "1"]
COURSE = ("Original Text", "BERT Input", "BERT Label", "Segment Label", "Is Next")


def read_table(path: Path, vocab_size: int, bad_rows: BadRows | None = None) -> Examples:
    return concatenate(read_chunks(path, vocab_size, bad_rows or BadRows()))


def write(path: Path, rows: Sequence[Sequence[Any]], columns: Iterable[str] = COLUMNS) -> Path:
    pd.DataFrame(rows, columns=list(columns)).to_csv(path, index=False)
    return path


def test_pandas_and_json_read_a_shard(demo: Dataset) -> None:
    frame = pd.read_csv(demo.folder / "train-00000.csv")
    assert list(frame.columns) == list(COLUMNS)
    row = frame.iloc[0]
    ids, labels, segments = (json.loads(row[name]) for name in COLUMNS[:3])
    assert len(ids) == len(labels) == len(segments)
    assert demo.tokenizer.token(ids[0]) == "[CLS]"
    assert set(frame["is_next"]) == {0, 1}
    assert set(segments) == {1, 2}


@pytest.mark.parametrize("is_next", ["1", "True"])
def test_the_courses_files_are_read_as_they_are(tmp_path: Path, is_next: str) -> None:
    """Other names, segments without brackets, padding between A and B, and a column of texts with line breaks."""
    course = ["line one\nline two", "[1, 6, 2, 0, 7, 2]", "[0, 0, 0, 0, 7, 0]", "1,1,1,0,2,2", is_next]
    examples = read_table(write(tmp_path / "t.csv", [course, course], COURSE), 10)
    assert examples.ids.tolist() == [1, 6, 2, 0, 7, 2] * 2
    assert examples.labels.tolist() == [0, 0, 0, 0, 7, 0] * 2
    assert examples.segments.tolist() == [1, 1, 1, 0, 2, 2] * 2
    assert examples.is_next.tolist() == [1, 1]


def test_a_bad_row_after_line_breaks_is_named_by_its_row(tmp_path: Path) -> None:
    rows = [["a\nb\nc", *GOOD], ["d\n", *GOOD[:3], "2"]]
    with pytest.raises(DataError, match="row 2: is_next is '2'"):
        read_table(write(tmp_path / "t.csv", rows, COURSE), 10)


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed_csv_is_read(tmp_path: Path, compression: str) -> None:
    assert len(read_table(write(tmp_path / f"t.csv.{compression}", [GOOD] * 3), 10)) == 3


def test_externally_prepared_parquet_is_read(tmp_path: Path) -> None:
    lists = [json.loads(cell) for cell in GOOD[:3]]
    pd.DataFrame([[*lists, True], [*lists, False]], columns=list(COLUMNS)).to_parquet(tmp_path / "lists.parquet")
    assert read_table(tmp_path / "lists.parquet", 10).is_next.tolist() == [1, 0]
    pd.DataFrame([GOOD], columns=list(COLUMNS)).to_parquet(tmp_path / "texts.parquet")
    assert read_table(tmp_path / "texts.parquet", 10).ids.tolist() == [1, 3, 6, 2]
    pd.DataFrame([[[1.5], *lists[1:], 1]], columns=list(COLUMNS)).to_parquet(tmp_path / "floats.parquet")
    with pytest.raises(DataError, match=r"'bert_input' holds list<.*double>; it must hold lists of integers"):
        read_table(tmp_path / "floats.parquet", 10)
    pd.DataFrame([[lists[0], lists[1], lists[2], 1], [None, lists[1], lists[2], 1]], columns=list(COLUMNS)).to_parquet(
        tmp_path / "none.parquet"
    )
    with pytest.raises(DataError, match=r"none\.parquet: row 2: bert_input is not a JSON list"):
        read_table(tmp_path / "none.parquet", 10)


LISTS = [json.loads(cell) for cell in GOOD[:3]]


def write_parquet(path: Path, list_type: pa.DataType, is_next: pa.Array) -> Path:
    """A table of equal rows, whose lists have this type."""
    cells: list[Any] = GOOD[:3] if pa.types.is_string(list_type) else LISTS
    columns = [pa.array([cell] * len(is_next), list_type) for cell in cells]
    pq.write_table(pa.table([*columns, is_next], names=list(COLUMNS)), path)
    return path


@pytest.mark.parametrize(
    "list_type", [pa.string(), pa.list_(pa.int64()), pa.large_list(pa.uint8()), pa.list_(pa.int16(), 4)]
)
def test_columns_of_every_arrow_type_are_read(tmp_path: Path, list_type: pa.DataType) -> None:
    path = tmp_path / "T.PARQUET"
    for is_next in (pa.array([1, 0]), pa.array([True, False]), pa.array(["1", "0"]).dictionary_encode()):
        examples = read_table(write_parquet(path, list_type, is_next), 10)
        assert examples.ids.tolist() == LISTS[0] * 2
        assert examples.is_next.tolist() == [1, 0]
    if pa.types.is_string(list_type):
        table = pq.read_table(path)
        for text_type in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
            columns = [column.cast(text_type) for column in table.columns[:3]]
            pq.write_table(pa.table([*columns, table.column(3)], names=list(COLUMNS)), path)
            assert read_table(path, 10).ids.tolist() == LISTS[0] * 2
    write_parquet(path, list_type, pa.array([2**62, 0], pa.timestamp("us")))
    with pytest.raises(DataError, match="'is_next' holds timestamp"):
        read_table(path, 10)


def test_text_in_parquet_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    latin = pa.array([GOOD[0].encode(), b"[1, 3, \xe9]", GOOD[0].encode()]).view(pa.string())
    others = [pa.array([cell] * 3) for cell in GOOD[1:]]
    pq.write_table(pa.table([latin, *others], names=list(COLUMNS)), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="row 2: bert_input is not a JSON list of integers"):
        read_table(tmp_path / "t.parquet", 10)
    skipped = BadRows(skip=True)
    assert len(read_table(tmp_path / "t.parquet", 10, skipped)) == 2
    assert skipped.count == 1


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_tables_of_spreadsheets_are_read(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "T.CSV"
    pd.DataFrame([GOOD] * 2, columns=list(COLUMNS)).to_csv(path, index=False, sep=delimiter, encoding="utf-16")
    assert read_table(path, 10).ids.tolist() == LISTS[0] * 2


@pytest.mark.parametrize("rows_per_chunk", [3, 10_000])
def test_rows_before_the_damage_are_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int
) -> None:
    monkeypatch.setattr("babybert.data.table.ROWS_PER_CHUNK", rows_per_chunk)
    path = write(tmp_path / "t.csv", [GOOD] * 5)
    with path.open("a") as file:
        file.write('"open')
    chunks = []
    with pytest.raises(DataError, match="line 7: not CSV"):
        for chunk in read_chunks(path, 10, BadRows()):
            chunks.append(chunk)
    assert sum(map(len, chunks)) == 5


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    header = [*COLUMNS, "BERT Input"]  # the same in the course's spelling
    with pytest.raises(DataError, match="has column 'bert_input' 2 times"):
        read_table(write(tmp_path / "t.csv", [[*GOOD, GOOD[0]]], header), 10)


def test_bad_rows_can_be_counted_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad_rows = [
        ["[1, 3", *GOOD[1:]],
        ["[1, 3, 6]", *GOOD[1:]],
        ["[1, 3, 99, 2]", *GOOD[1:]],
        [*GOOD[:3], "7"],
        [GOOD[0], "[9, 0, 0, 0]", *GOOD[2:]],
    ]
    path = write(tmp_path / "t.csv", [GOOD, *bad_rows, GOOD])
    with path.open("a") as file:
        file.write('"[1]","[1]"\n')
    with path.open("ab") as file:
        file.write(b"[1],[1],\xff,1\n")
    skipped = BadRows(skip=True)
    assert read_table(path, 10, skipped).ids.tolist() == [1, 3, 6, 2] * 2
    assert skipped.count == 7
    for row in (2, 3, 4, 5, 6, 8, 9):
        assert f"row {row}: " in caplog.text


def test_only_the_first_bad_rows_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipped = BadRows(skip=True)
    read_table(write(tmp_path / "t.csv", [GOOD, *[[*GOOD[:3], "7"]] * 50]), 10, skipped)
    assert skipped.count == 50
    assert len(caplog.messages) == BadRows.MAX_LOGGED + 1


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, "[1, 3, 6", "bert_input is not a JSON list"),
        (0, "[1, 3.5, 6, 2]", "bert_input is not a JSON list of integers"),
        (0, '[1, "a", 6, 2]', "bert_input is not a JSON list of integers"),
        (0, "[1, [3], 6, 2]", "bert_input is not a JSON list of integers"),
        (0, "7", "bert_input is not a JSON list"),
        (0, "[" * 100_000, "bert_input is not a JSON list"),
        (0, "[" + "9" * 5000 + "]", "bert_input is not a JSON list"),
        (0, "", "bert_input is not a JSON list"),
        (0, "[]", "bert_input is empty"),
        (0, "[1, 3, 6]", "bert_input has 3 entries, bert_label has 4"),
        (0, "[1, 3, 10, 2]", "bert_input has id 10; the vocabulary has 0 to 9"),
        (0, "[1, 3, 99999999999999999999, 2]", "bert_input is not a JSON list"),
        (1, "[0, -1, 0, 0]", "bert_label has id -1"),
        (1, "[0, 5, 0, 5]", "bert_label is 5 at special token 2"),
        (0, "[1, true, 6, 2]", "bert_input is not a JSON list of integers"),
        (0, "[1, null, 6, 2]", "bert_input is not a JSON list of integers"),
        (0, "[1, 3e0, 6, 2]", "bert_input is not a JSON list of integers"),
        (0, "[1, NaN, 6, 2]", "bert_input is not a JSON list of integers"),
        (0, "[1, 0, 6, 2]", "bert_label is 5 at special token 0"),
        (2, "[1, 1, 1, 3]", "segment_label is 3"),
        (2, "[1, 1]", "segment_label has 2"),
        (3, "7", "is_next is '7'"),
        (3, "", "is_next is ''"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(tmp_path: Path, column: int, value: str, message: str) -> None:
    bad_row = [*GOOD[:column], value, *GOOD[column + 1 :]]
    path = write(tmp_path / "t.csv", [GOOD, GOOD, bad_row, GOOD])
    with pytest.raises(DataError, match="row 3: ") as error:
        read_table(path, 10)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_bad_row_in_a_later_chunk_has_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("babybert.data.table.ROWS_PER_CHUNK", 3)
    with pytest.raises(DataError, match="row 8: is_next is '2'"):
        read_table(write(tmp_path / "t.csv", [*[GOOD] * 7, [*GOOD[:3], "2"], GOOD]), 10)


def test_a_file_without_a_column_or_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'is_next'; it has bert_input, bert_label, segment_label"):
        read_table(write(tmp_path / "t.csv", [GOOD[:3]], COLUMNS[:3]), 10)
    with pytest.raises(DataError, match="has no rows"):
        read_table(write(tmp_path / "t.csv", []), 10)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_table(tmp_path / "empty.csv", 10)
    (tmp_path / "short.csv").write_text(",".join(COLUMNS) + "\n[1]\n")
    with pytest.raises(DataError, match="row 1: has 1 cells, the header has 4"):
        read_table(tmp_path / "short.csv", 10)


def test_counts_are_of_the_original_tokens() -> None:
    labels = np.array([0, 7, 0, 8], np.int32)
    examples = Examples(
        np.array([1, 3, 7, 9], np.int32), labels, np.ones(4, np.int8), np.array([0, 4]), np.ones(1, np.int8)
    )
    counts = examples.token_counts(10)
    assert counts[7] == 2
    assert counts[8] == 1
    assert counts.sum() == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b'bert_input,bert_label,segment_label,is_next\n"[1', "not CSV"),
        (
            "t.csv",
            b"bert_input,bert_label,segment_label,is_next\n[1],[0],\xe9,1\n",
            "row 1: line 2, byte 8 of the line, is not UTF-8",
        ),
        ("t.csv.gz", b"no gzip", "damaged"),
        ("t.csv.zst", b"no zstandard", "damaged"),
        ("t.parquet", b"no parquet", "damaged"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name, 10)


def test_rows_have_offsets_that_start_at_zero() -> None:
    examples = Examples(np.arange(6), np.arange(6), np.ones(6), np.array([0, 2, 3, 6]), np.array([0, 1, 0]))
    selected = examples.rows(1, 3)
    assert selected.ids.tolist() == [2, 3, 4, 5]
    assert selected.offsets.tolist() == [0, 1, 4]
    assert selected.is_next.tolist() == [1, 0]
    assert examples.first(99) is examples
    assert len(examples.first(1)) == 1
