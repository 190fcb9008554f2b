"""Files written by the previous version of the project can still be read; tests/golden/previous_version has them.

They are the checkpoint and the archive of a run of three steps on the demo, `prepare --demo-documents 40` and
`pretrain --preset tiny --width 4 --heads 1 --layers 1 --feed-forward 8 --max-steps 3 --batch-size 8`.
"""

import json
import shutil
from pathlib import Path

import pytest

from babybert.checkpoint.format import checkpoint_problem, find_checkpoint
from babybert.config import PrepareConfig, PretrainConfig
from babybert.data.prepare import prepare
from babybert.serving.archive import check_archive, write_archive
from babybert.serving.predictor import Predictor
from babybert.training.train import pretrain

FILES = Path(__file__).parent / "golden" / "previous_version"
CHECKPOINT = FILES / "step-00000003"
TEXT = "The sheriff rides near the [MASK]."
# What the previous version answered for TEXT, and for the pair below.
CANDIDATES = {"the": 0.11360441148281097, ".": 0.07224149256944656, "and": 0.041375767439603806}
PAIR = ("Mary is superb.", "She rides.")
PAIR_PROBABILITY = 0.6745306849479675


def test_a_checkpoint_of_the_previous_version_is_valid_and_predicts_the_same() -> None:
    assert checkpoint_problem(CHECKPOINT) is None
    assert find_checkpoint(FILES) == CHECKPOINT
    predictor = Predictor.load(CHECKPOINT)
    (mask,) = predictor.fill_mask([TEXT], top_k=3)[0]["masks"]
    scores = {candidate["token"]: candidate["score"] for candidate in mask["candidates"]}
    assert list(scores) == list(CANDIDATES)
    assert scores == pytest.approx(CANDIDATES, rel=1e-6)
    (answer,) = predictor.next_sentence([PAIR])
    assert answer == {"is_next": True, "probability": pytest.approx(PAIR_PROBABILITY, rel=1e-6)}


@pytest.mark.parametrize("batch_size", [8, 5])
def test_a_run_of_the_previous_version_can_be_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, batch_size: int
) -> None:
    """Also with another batch size: its checkpoint does not say on which devices it was trained."""
    prepare(PrepareConfig(out=tmp_path / "data", demo_documents=40))
    shutil.copytree(CHECKPOINT, tmp_path / "run" / CHECKPOINT.name)
    settings = PretrainConfig(
        data=tmp_path / "data",
        out=tmp_path / "run",
        preset="tiny",
        width=4,
        heads=1,
        layers=1,
        feed_forward=8,
        batch_size=batch_size,
        max_steps=5,
        metrics=False,
        device="cpu",
        kernels="plain",
    )
    result = pretrain(settings)
    assert result is not None
    assert result.checkpoint.name == "step-00000005"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trained_pairs"] == 3 * 8 + 2 * batch_size
    assert ("batch_size changed from 8 to 5" in caplog.text) == (batch_size == 5)


def test_an_archive_of_the_previous_version_is_valid() -> None:
    assert check_archive(FILES / "babybert.mar") == {
        "version": "3-9009c86ea861",
        "step": 3,
        "digest": "9009c86ea861ae64a0973e41cee8c4a707739df7b7e0ae6bb1264a4ea4310c78",
    }


def test_a_checkpoint_of_the_previous_version_can_be_archived_with_the_same_version(tmp_path: Path) -> None:
    archive = write_archive(CHECKPOINT, tmp_path)
    assert check_archive(archive) == check_archive(FILES / "babybert.mar")
