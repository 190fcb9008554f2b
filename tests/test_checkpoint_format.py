"""The format of a checkpoint: what is saved is loaded, and what is damaged is detected."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from babybert.checkpoint.format import (
    FILES,
    MANIFEST,
    CheckpointState,
    Manifest,
    TrainState,
    checkpoint_problem,
    find_checkpoint,
    list_checkpoints,
    load_model,
    load_optimizer,
    newest_valid,
    read_manifest,
    read_state,
    save_checkpoint,
)
from babybert.checkpoint.retention import prune_checkpoints, steps_to_delete
from babybert.config import PretrainConfig
from babybert.data.dataset import Dataset
from babybert.data.epoch_order import BatchSpan
from babybert.errors import DataError
from babybert.model.bert import BabyBert
from babybert.training.optimizer import make_optimizer
from babybert.training.setup import new_model

SCORES = {"mlm_loss": 4.5, "nsp_loss": 0.5}
Run = tuple[Path, BabyBert, torch.optim.Optimizer, PretrainConfig]


def optimizer_steps(bert: BabyBert, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        torch.stack([(parameter**2).sum() for parameter in bert.parameters()]).sum().backward()
        optimizer.step()


def state_of(step: int, epoch: int = 0, batch: int = 0, scores: dict[str, float] | None = None) -> CheckpointState:
    return CheckpointState(step, epoch, batch, 1.5, 2, "tokenizer digest", {"lr": 0.1}, "data digest", scores)


@pytest.fixture
def run(small: Callable[..., PretrainConfig], demo: Dataset) -> Run:
    """A run's folder with checkpoints of steps 1 to 3, its model and its optimizer."""
    config = small()
    bert = new_model(config, config.sizes(demo.tokenizer.size), demo.token_counts())
    optimizer = make_optimizer(bert, config)
    for step in (1, 2, 3):
        optimizer_steps(bert, optimizer, 1)
        save_checkpoint(config.out, state_of(step, batch=step, scores=SCORES), bert, demo.tokenizer, optimizer)
    return config.out, bert, optimizer, config


def test_a_saved_checkpoint_is_loaded_as_it_was(run: Run, demo: Dataset) -> None:
    folder, bert, optimizer, config = run
    span = {"batch_size": 8, "bucketing": True, "batches": 3}
    saved_state = replace(state_of(4, 1, 2, SCORES), earlier_spans=[span], devices={"world_size": 1})
    save_checkpoint(folder, saved_state, bert, demo.tokenizer, optimizer)
    newest = newest_valid(folder)
    assert newest is not None
    loaded, tokenizer = load_model(newest)
    loaded_optimizer = make_optimizer(loaded, config)
    load_optimizer(newest, loaded_optimizer)
    assert read_state(newest) == saved_state
    assert read_state(newest).train_state() == TrainState(4, 1, 2, 1.5, 2, [BatchSpan(8, True, 3)])
    assert read_manifest(newest).held_out_loss == 5.0
    assert tokenizer.digest == demo.tokenizer.digest
    for saved, parameter in zip(bert.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(saved, parameter)
        assert torch.equal(optimizer.state[saved]["exp_avg_sq"], loaded_optimizer.state[parameter]["exp_avg_sq"])


def test_a_tied_model_is_saved_with_one_table_and_goes_on_with_the_same_bits(
    small: Callable[..., PretrainConfig], demo: Dataset, tmp_path: Path
) -> None:
    config = small(tie_decoder=True, norm="pre", activation="gelu", initial_weights="normal")
    bert = new_model(config, config.sizes(demo.tokenizer.size), demo.token_counts())
    optimizer = make_optimizer(bert, config)
    optimizer_steps(bert, optimizer, 2)
    folder = save_checkpoint(tmp_path, state_of(2), bert, demo.tokenizer, optimizer)
    table_bytes = 4 * bert.mlm_decoder.weight.numel()
    assert (folder / "model.safetensors").stat().st_size < 4 * sum(p.numel() for p in bert.parameters()) + table_bytes
    loaded, _ = load_model(folder)
    assert loaded.config == bert.config
    assert loaded.mlm_decoder.weight is loaded.embedding.token_embedding.embedding.weight
    resumed = make_optimizer(loaded, config)
    load_optimizer(folder, resumed)
    bert.zero_grad()
    optimizer_steps(bert, optimizer, 1)
    optimizer_steps(loaded, resumed, 1)
    for name, tensor in bert.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_skipped(run: Run, caplog: pytest.LogCaptureFixture, name: str, damage: str) -> None:
    folder = run[0]
    path = folder / "step-00000003" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1] if name != MANIFEST else content[:-10])
    else:
        path.unlink()
    assert checkpoint_problem(folder / "step-00000003")
    assert find_checkpoint(folder).name == "step-00000002"
    assert "skipping" in caplog.text
    with pytest.raises(DataError, match="not a valid checkpoint"):
        find_checkpoint(folder / "step-00000003")


@pytest.mark.parametrize(
    ("key", "value"), [("step", 4), ("held_out_loss", 0.1), ("held_out_loss", None), ("format", 1), ("step", "x")]
)
def test_a_changed_manifest_is_detected(run: Run, key: str, value: Any) -> None:
    """The retention rule and the store trust these fields."""
    path = run[0] / "step-00000003" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert checkpoint_problem(path.parent)


def test_a_manifest_of_an_earlier_version_has_no_digest_and_is_read(run: Run) -> None:
    path = run[0] / "step-00000003" / MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))
    assert checkpoint_problem(path.parent) is None
    assert read_manifest(path.parent).step == 3


def test_a_manifest_survives_its_json() -> None:
    manifest = Manifest(7, 1.25, {}, attempt="a" * 32)
    assert Manifest.from_json(manifest.to_json()) == manifest
    for text in ("[]", "{}", '{"step": 1}', "null", "{garbage"):
        with pytest.raises(ValueError):
            Manifest.from_json(text)


def test_a_missing_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="babybert pretrain --out"):
            find_checkpoint(path)
    with pytest.raises(DataError, match="no such folder"):
        find_checkpoint(tmp_path / "step-00000001")


def test_a_partial_checkpoint_is_ignored_and_deleted_by_the_next_save(run: Run, demo: Dataset) -> None:
    folder, bert, optimizer, _ = run
    shutil.copytree(folder / "step-00000003", folder / ".partial-step-00000009")
    assert find_checkpoint(folder).name == "step-00000003"
    save_checkpoint(folder, state_of(4), bert, demo.tokenizer, optimizer)
    assert not list(folder.glob(".partial-*"))


def test_the_newest_and_the_best_are_kept(run: Run, demo: Dataset) -> None:
    folder, bert, optimizer, _ = run
    best = replace(state_of(4), scores={"mlm_loss": 1.0, "nsp_loss": 0.5})
    save_checkpoint(folder, best, bert, demo.tokenizer, optimizer)
    save_checkpoint(folder, state_of(5), bert, demo.tokenizer, optimizer)
    save_checkpoint(folder, state_of(6), bert, demo.tokenizer, optimizer)
    prune_checkpoints(folder, keep=2, in_use=frozenset({folder / "step-00000001"}))
    names = [path.name for path in list_checkpoints(folder)]
    assert names == [f"step-0000000{step}" for step in (6, 5, 4, 1)]
    assert steps_to_delete({1: 2.0, 2: 2.0, 3: None}, keep=1) == [1]  # of equal losses the newest is the best


def test_weights_and_tokenizer_must_be_from_one_run(run: Run) -> None:
    folder = find_checkpoint(run[0])
    sizes = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**sizes, "vocab_size": 99}))
    with pytest.raises(DataError, match="99 tokens"):
        load_model(folder)
    (folder / "model.json").write_text(json.dumps({**sizes, "width": 16}))
    with pytest.raises(DataError, match="not the weights of this model"):
        load_model(folder)
    (folder / "model.json").write_text(json.dumps({**sizes, "colour": 16}))
    with pytest.raises(DataError, match="not the sizes of a model"):
        load_model(folder)
