"""The present code writes, computes and answers what tests/golden/record.py recorded with an earlier version.

Files must have the same bytes everywhere. Numbers must be equal to the bit on the machine of the record; elsewhere
other instructions and numbers of threads round differently, so a tolerance applies.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from golden import record

import babybert
from babybert.model.device import has_fast_bf16

GOLDENS: dict[str, Any] = json.loads(record.GOLDENS.read_text(encoding="utf-8"))
VERSIONS = {"babybert": babybert.__version__, "numpy": np.__version__, "tokenizers": tokenizers.__version__}
HERE = record.machine() == GOLDENS["machine"]
TOLERANCE = None if HERE else 1e-2  # 50 steps amplify differences in rounding

# The first run of a preset compiles its kernels, which takes up to a minute on two cores.
pytestmark = [pytest.mark.slow, pytest.mark.serial, pytest.mark.timeout(600)]


def assert_equal(recorded: Any, current: Any, tolerance: float | None, where: str = "") -> None:
    """Compare parsed JSON. Floats may differ by `tolerance`, relative or absolute; None means equal to the bit.

    The text of an error message is prose and may change: under the key "error" any text will do.
    """
    assert type(recorded) is type(current), (where, recorded, current)
    if isinstance(recorded, dict):
        assert recorded.keys() == current.keys(), where
        for key, value in recorded.items():
            if key == "error":
                assert isinstance(current[key], str), where
                assert current[key], where
            else:
                assert_equal(value, current[key], tolerance, f"{where}.{key}")
    elif isinstance(recorded, list):
        assert len(recorded) == len(current), where
        for index, value in enumerate(recorded):
            assert_equal(value, current[index], tolerance, f"{where}[{index}]")
    elif isinstance(recorded, float) and tolerance is not None:
        assert current == pytest.approx(recorded, rel=tolerance, abs=tolerance), where
    else:
        assert current == recorded, where


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands run."""
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def demo_dataset(folder: Path) -> Path:
    """The data set that the runs are trained on."""
    return record.prepare(folder, "demo")


@pytest.fixture(scope="module")
def tiny_losses(folder: Path, demo_dataset: Path) -> list[list[float | None]]:
    """The losses of the run that is evaluated and served."""
    return record.pretrain(folder, "tiny")


def assert_same_files(name: str, folder: Path) -> None:
    """Each file of the data set has the recorded bytes; dataset.json where the versions that it names are the same."""
    recorded = dict(GOLDENS["prepare"][name])
    current = record.digests(folder)
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    expected = GOLDENS["datasets"][name]
    if {key: expected[key] for key in VERSIONS} != VERSIONS:
        del recorded["dataset.json"], current["dataset.json"]
    assert {**content, **VERSIONS} == {**expected, **VERSIONS}
    assert current == recorded


@pytest.mark.parametrize("name", [*record.DATASETS, *record.IMDB_DATASETS])
def test_prepare_writes_the_recorded_files(name: str, tmp_path: Path) -> None:
    if "parquet" in name and record.pyarrow_version() != GOLDENS["pyarrow"]:
        pytest.skip(f"recorded with pyarrow {GOLDENS['pyarrow']}: another version writes other bytes")
    if name in record.IMDB_DATASETS:
        archive = os.environ.get("BABYBERT_IMDB")
        if not archive:
            pytest.skip("set BABYBERT_IMDB to the archive of labelled IMDb reviews that docs/results.md uses")
        (tmp_path / "aclImdb.tar.gz").symlink_to(Path(archive).resolve())
    assert_same_files(name, record.prepare(tmp_path, name))


@pytest.mark.parametrize("name", [name for name in record.RUNS if name != "tiny"])
def test_pretrain_computes_the_recorded_losses(name: str, folder: Path, demo_dataset: Path) -> None:
    assert_equal(GOLDENS["pretrain"][name], record.pretrain(folder, name), TOLERANCE)


@pytest.mark.parametrize("name", list(record.SHORT_RUNS))
def test_short_runs_compute_the_recorded_losses(name: str, folder: Path, demo_dataset: Path) -> None:
    tolerance = TOLERANCE
    if "bf16" in name:
        if not has_fast_bf16(torch.device("cpu")):
            pytest.skip("the processor has neither AMX nor AVX512-BF16")
        tolerance = 1e-2  # a library may multiply in another order, and bf16 has three digits
    if name == "segments-runs":
        record.prepare(folder, "demo-runs")
    assert_equal(GOLDENS["pretrain"][name], record.pretrain(folder, name), tolerance)


def test_pretrain_computes_the_recorded_losses_of_tiny(tiny_losses: list[list[float | None]]) -> None:
    assert_equal(GOLDENS["pretrain"]["tiny"], tiny_losses, TOLERANCE)


@pytest.mark.usefixtures("tiny_losses")
def test_evaluate_computes_the_recorded_scores(folder: Path) -> None:
    recorded, current = dict(GOLDENS["evaluate"]), record.evaluate(folder)
    if not HERE:  # a small difference in a probability moves a pair to the next bin
        del recorded["calibration"], current["calibration"]
    assert_equal(recorded, current, TOLERANCE)


@pytest.mark.system
@pytest.mark.usefixtures("tiny_losses")
def test_the_server_gives_the_recorded_answers(folder: Path) -> None:
    answers = record.answers(folder)
    assert len(answers) == len(GOLDENS["http"])
    for (body, _), recorded, current in zip(record.REQUESTS, GOLDENS["http"], answers, strict=True):
        assert_equal(recorded, current, TOLERANCE, str(body)[:60])
