"""A small part of `make fuzz`, with a fixed seed."""

from pathlib import Path

import pytest
from fuzz import run_case

SEED = 9


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_prepare_with_strange_files_ends_in_one_line(tmp_path: Path, first: int) -> None:
    outcomes = {run_case("files", SEED, index, tmp_path) for index in range(first, first + 20)}
    assert len(outcomes) > 4  # several corpora, some of them prepared and some refused


def test_strange_settings_end_in_one_line(tmp_path: Path) -> None:
    assert {run_case("settings", SEED, index, tmp_path) for index in range(100)} == {"settings: 0", "settings: 2"}
