"""Cells of Parquet files as Python objects, whatever Arrow type a column of texts has."""

from collections.abc import Sequence
from typing import Any

import pyarrow
import pyarrow.types as arrow_types

IS_TEXT = (
    arrow_types.is_string,
    arrow_types.is_large_string,
    arrow_types.is_string_view,
    # Some programs do not mark texts as such.
    arrow_types.is_binary,
    arrow_types.is_large_binary,
    arrow_types.is_binary_view,
)
IS_LIST = (arrow_types.is_list, arrow_types.is_large_list, arrow_types.is_fixed_size_list)


def is_text(column_type: pyarrow.DataType) -> bool:
    """Whether a column of this type holds texts. A dictionary (a category of pandas) may."""
    value_type = column_type.value_type if arrow_types.is_dictionary(column_type) else column_type
    return any(is_type(value_type) for is_type in IS_TEXT)


def is_list_of_integers(column_type: pyarrow.DataType) -> bool:
    """Whether a column of this type holds lists of integers."""
    return any(is_type(column_type) for is_type in IS_LIST) and arrow_types.is_integer(column_type.value_type)


def to_python(column: pyarrow.Array) -> Sequence[Any]:
    """Return the cells as Python objects. A text that is not UTF-8 is returned as bytes: Parquet does not check it."""
    try:
        cells: list[Any] = column.to_pylist()
        return cells
    except UnicodeDecodeError:
        return [_cell_to_python(cell) for cell in column]


def _cell_to_python(cell: pyarrow.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        text = cell.value if isinstance(cell, pyarrow.DictionaryScalar) else cell
        return text.as_buffer().to_pybytes()
