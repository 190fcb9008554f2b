"""Flags, environment variables and YAML become one settings object; bad values are refused by name."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from babybert.config import PRESETS, PrepareConfig, PretrainConfig
from babybert.config.command_line import add_flags, load_config
from babybert.errors import UsageError


def pretrain_settings(*flags: str, environment: Mapping[str, str] | None = None) -> PretrainConfig:
    """The settings that `babybert pretrain FLAGS` would use."""
    parser = argparse.ArgumentParser()
    add_flags(parser, PretrainConfig)
    return load_config(PretrainConfig, "pretrain", parser.parse_args(flags), environment or {})


def test_defaults() -> None:
    assert pretrain_settings() == PretrainConfig()


def test_a_flag_overrides_a_variable_overrides_the_file_overrides_the_default(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "pretrain:\n  lr: 1e-4\n  epochs: 7\n  metrics: false\n  max_steps: null\n  data: some/where\n"
        "prepare:\n  seed: 9\n"
    )
    environment = {
        "BABYBERT_PRETRAIN_EPOCHS": "8",
        "BABYBERT_PRETRAIN_BATCH_SIZE": "5",
        "BABYBERT_PRETRAIN_SERVICE_HOST": "10.0.0.1",
    }
    config = pretrain_settings("--config", str(path), "--batch-size=6", environment=environment)
    assert (config.lr, config.epochs, config.batch_size, config.metrics, config.max_steps, config.data) == (
        1e-4,
        8,
        6,
        False,
        None,
        Path("some/where"),
    )
    assert config.seed == PretrainConfig().seed


def test_a_preset_sets_its_recipe_and_explicit_settings_override_it() -> None:
    baby = pretrain_settings("--preset=baby")
    assert (baby.lr, baby.decoder_lr_factor, baby.embedding_lr_factor, baby.decoder_epsilon, baby.dropout) == (
        2e-3,
        50.0,
        20.0,
        1e-3,
        0.0,
    )
    assert pretrain_settings("--preset=baby", "--lr=0.5", "--dropout=0.2").lr == 0.5
    assert pretrain_settings("--lr=0.5", environment={"BABYBERT_PRETRAIN_PRESET": "baby"}).decoder_epsilon == 1e-3
    reference = pretrain_settings("--preset=baby", "--recipe=reference")
    assert (reference.lr, reference.decoder_lr_factor, reference.decoder_epsilon, reference.dropout) == (
        5e-5,
        1.0,
        1e-8,
        None,
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", ["default", "reference"])
def test_settings_from_python_are_those_of_the_command_line(preset: str, recipe: Any) -> None:
    from_flags = pretrain_settings(f"--preset={preset}", f"--recipe={recipe}", "--weight-decay=0.5")
    assert PretrainConfig(preset=preset, recipe=recipe, weight_decay=0.5) == from_flags
    assert PretrainConfig(recipe="reference") == pretrain_settings("--recipe=reference")
    assert "UNSET" not in repr(from_flags)


def test_booleans_and_optional_values() -> None:
    assert pretrain_settings("--no-metrics").metrics is False
    assert pretrain_settings(environment={"BABYBERT_PRETRAIN_METRICS": "no"}).metrics is False
    assert pretrain_settings("--max-steps=3", "--width=4").max_steps == 3
    assert pretrain_settings(environment={"BABYBERT_PRETRAIN_MAX_STEPS": ""}).max_steps is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pretrain:\n  lrr: 3", "'pretrain' has no setting 'lrr'"),
        ("pretrain:\n  epochs: many", "pretrain.epochs is 'many'; it must be a whole number"),
        ("pretrain:\n  epochs: [1]", "pretrain.epochs is"),
        ("pretrain:\n  epochs: true", "pretrain.epochs is 'True'"),
        ("pretrain: 5", "expected settings by name below 'pretrain:'"),
        ("just text", "expected settings by name"),
        ("a: [", "is not YAML"),
    ],
)
def test_an_error_in_a_file_names_file_and_key(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        pretrain_settings("--config", str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_bad_variable_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: cannot be read"):
        pretrain_settings("--config", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(UsageError, match="BABYBERT_PRETRAIN_OPTIMIZER is 'sgd'; choose one of adamw, adam"):
        pretrain_settings(environment={"BABYBERT_PRETRAIN_OPTIMIZER": "sgd"})
    # As a host, an empty text would mean every address, and as a path the current folder.
    with pytest.raises(UsageError, match="BABYBERT_PRETRAIN_METRICS_HOST is empty; give it a value or leave it out"):
        pretrain_settings(environment={"BABYBERT_PRETRAIN_METRICS_HOST": ""})
    with pytest.raises(UsageError, match="--out is empty"):
        pretrain_settings("--out", "")
    assert pretrain_settings(environment={"BABYBERT_PRETRAIN_STORE": ""}).store is None


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"epochs": 0},
        {"batch_size": 0},
        {"weight_decay": -0.1},
        {"warmup_fraction": 1.5},
        {"metrics_port": 70_000},
        {"preset": "huge"},
        {"seed": -1},
        {"seed": 2**32},
        {"max_steps": 0},
        {"masked_share": 0.0},
        {"masked_share": 0.2, "masking": "static"},
    ],
)
def test_invalid_settings_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        PretrainConfig(**settings)


def prepare_settings(*flags: str, environment: Mapping[str, str] | None = None) -> PrepareConfig:
    """The settings that `babybert prepare FLAGS` would use."""
    parser = argparse.ArgumentParser()
    add_flags(parser, PrepareConfig)
    return load_config(PrepareConfig, "prepare", parser.parse_args(flags), environment or {})


def test_lists_from_flags_variables_and_files(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("prepare: {corpus: text, source: [a, 'b, c']}")
    assert prepare_settings("--config", str(path)).source == ("a", "b, c")
    assert prepare_settings("--corpus", "text", "--source", "a", "b, c").source == ("a", "b, c")
    assert prepare_settings("--corpus=text", environment={"BABYBERT_PREPARE_SOURCE": "a, s3://b/c"}).source == (
        "a",
        "s3://b/c",
    )
    path.write_text("prepare: {corpus: text, source: one}")
    assert prepare_settings("--config", str(path)).source == ("one",)
    path.write_text("prepare: {corpus: text, source: [1]}")
    with pytest.raises(UsageError, match=r"prepare.source is '\[1\]'; it must be a text or a list of texts"):
        prepare_settings("--config", str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "csv"}, "--corpus csv needs --source"),
        ({"source": ("a",)}, "--corpus demo does not support --source"),
        ({"corpus": "table", "source": ("a",)}, "--corpus table needs --validation-source"),
        ({"corpus": "table", "source": ("a",), "validation_source": ("b",)}, "--corpus table needs --tokenizer"),
        ({"corpus": "csv", "source": ("a",), "validation_source": ("b",)}, "--validation-source is for --corpus table"),
        ({"tokenizer": Path("t"), "train_tokenizer": True}, "exclude each other"),
        ({"vocab_size": 5}, "vocab_size is 5"),
        ({"max_positions": 513}, "max_positions is 513"),
        ({"duplicates": 0}, "duplicates is 0"),
        ({"shard_mb": 0}, "shard_mb is 0"),
    ],
)
def test_invalid_settings_of_prepare_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PrepareConfig(**settings)
