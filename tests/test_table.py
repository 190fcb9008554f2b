import json

import numpy as np
import pandas as pd
import pytest

from babybert.data.table import COLUMNS, Examples, read_table, write_table
from babybert.errors import DataError

GOOD = ["[1, 3, 6, 2]", "[0, 5, 0, 0]", "[1, 1, 1, 1]", "1"]


def write(path, rows, columns=COLUMNS):
    pd.DataFrame(rows, columns=list(columns)).to_csv(path, index=False)
    return path


def test_what_is_written_is_read(tmp_path, demo):
    examples = demo.examples("train")
    write_table(tmp_path / "again.csv", examples)
    again = read_table(tmp_path / "again.csv", demo.tokenizer.size)
    for name, array in vars(examples).items():
        assert (array == getattr(again, name)).all(), name
        assert array.dtype == getattr(again, name).dtype


def test_pandas_and_json_read_it(demo):
    frame = pd.read_csv(demo.folder / "train.csv")
    assert list(frame.columns) == list(COLUMNS)
    row = frame.iloc[0]
    ids, labels, segments = (json.loads(row[name]) for name in COLUMNS[:3])
    assert len(ids) == len(labels) == len(segments)
    assert demo.tokenizer.token(ids[0]) == "[CLS]"
    assert set(frame["is_next"]) == {0, 1}
    assert set(segments) == {1, 2}


def test_lists_of_the_course_with_padding_inside_are_read(tmp_path):
    examples = read_table(write(tmp_path / "t.csv", [["[1, 6, 2, 0, 7, 2]", "[0, 0, 0, 0, 7, 0]", "[1, 1, 1, 0, 2, 2]", "0"]]), 10)
    assert examples.ids.tolist() == [1, 6, 2, 0, 7, 2]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, "[1, 3, 6", "bert_input is not a JSON list"),
        (0, "[1, 3.5, 6, 2]", "bert_input is not a JSON list of whole numbers"),
        (0, '[1, "a", 6, 2]', "bert_input is not a JSON list of whole numbers"),
        (0, "[1, [3], 6, 2]", "bert_input is not a JSON list of whole numbers"),
        (0, "7", "bert_input is not a JSON list"),
        (0, "", "bert_input is not a JSON list"),
        (0, "[]", "bert_input is empty"),
        (0, "[1, 3, 6]", "bert_input has 3 entries, bert_label has 4"),
        (0, "[1, 3, 10, 2]", "bert_input has id 10; the vocabulary has 0 to 9"),
        (0, "[1, 3, 99999999999999999999, 2]", "bert_input is not a JSON list"),
        (1, "[0, -1, 0, 0]", "bert_label has id -1"),
        (1, "[0, 5, 0, 5]", "bert_label is 5 at special token 2"),
        (2, "[1, 1, 1, 3]", "segment_label is 3"),
        (2, "[1, 1]", "segment_label has 2"),
        (3, "7", "is_next is '7'"),
        (3, "", "is_next is ''"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path, column, value, message):
    bad = [*GOOD[:column], value, *GOOD[column + 1 :]]
    path = write(tmp_path / "t.csv", [GOOD, GOOD, bad, GOOD])
    with pytest.raises(DataError, match="line 4") as error:
        read_table(path, 10)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_bad_row_in_a_later_chunk_has_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr("babybert.data.table.ROWS_AT_ONCE", 3)
    with pytest.raises(DataError, match="line 9: is_next is '2'"):
        read_table(write(tmp_path / "t.csv", [*[GOOD] * 7, [*GOOD[:3], "2"], GOOD]), 10)


def test_a_file_without_a_column_or_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="no column 'is_next'; it has bert_input, bert_label, segment_label"):
        read_table(write(tmp_path / "t.csv", [GOOD[:3]], COLUMNS[:3]), 10)
    with pytest.raises(DataError, match="has no rows"):
        read_table(write(tmp_path / "t.csv", []), 10)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        read_table(tmp_path / "empty.csv", 10)
    (tmp_path / "short.csv").write_text(",".join(COLUMNS) + "\n[1]\n")
    with pytest.raises(DataError, match="line 2"):
        read_table(tmp_path / "short.csv", 10)


def test_counts_are_of_the_originals():
    labels = np.array([0, 7, 0, 8], np.int32)
    examples = Examples(np.array([1, 3, 7, 9], np.int32), labels, np.ones(4, np.int8), np.array([0, 4]), np.ones(1, np.int8))
    counts = examples.token_counts(10)
    assert counts[7] == 2
    assert counts[8] == 1
    assert counts.sum() == 3
