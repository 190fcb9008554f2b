"""Flags, environment variables and YAML become one settings object; bad values are refused by name."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from babybert.cli import COMMANDS
from babybert.config import (
    PRESETS,
    EvaluateConfig,
    FillMaskConfig,
    InfoConfig,
    LookConfig,
    PlaygroundConfig,
    PrepareConfig,
    PretrainConfig,
    ProbeConfig,
    ServeConfig,
)
from babybert.config.command_line import add_flags, load_config
from babybert.errors import UsageError
from babybert.s3 import make_client


def pretrain_settings(*flags: str, environment: Mapping[str, str] | None = None) -> PretrainConfig:
    """The settings that `babybert pretrain FLAGS` would use."""
    parser = argparse.ArgumentParser()
    add_flags(parser, PretrainConfig)
    return load_config(PretrainConfig, "pretrain", parser.parse_args(flags), environment or {}, COMMANDS)


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
        ("pretrain:\n  epochs: true", "pretrain.epochs is 'true'"),
        ("pretrain: 5", "expected settings by name below 'pretrain:'"),
        ("just text", "expected settings by name"),
        ("a: [", "is not YAML"),
        ("- pretrain", "expected settings by name"),
        ("pretrain:\n\tseed: 5", "is not YAML"),
        ("pretrain: {seed: 1}\n---\npretrain: {seed: 2}", "is not YAML"),
        ("[" * 5000, "is not YAML: it is nested too deeply"),
        ('pretrain: {data: "\\Uffffffff"}', "is not YAML"),
        # YAML 1.1 keeps the last of two equal keys.
        ("pretrain:\n  seed: 5\n  seed: 6", "line 3: 'seed' is given twice"),
        ("pretrain: {seed: 5}\npretrain: {epochs: 6}", "line 2: 'pretrain' is given twice"),
        ("pretrain: {seed: 5}\n'pretrain': {epochs: 6}", "line 2: 'pretrain' is given twice"),
        ("pretrian: {seed: 5}", "line 1: 'pretrian' is no command; choose one of prepare, pretrain"),
        ("1: 2", "'1' is no command"),
        ("~: 2", "expected a name and ':'"),
        ("? [a]\n: 2", "expected a name and ':'"),
        # Values that YAML 1.1 would convert before the setting's type is known.
        ("pretrain: {checkpoint_every: 1:30}", "checkpoint_every is '1:30'; it must be steps (500) or minutes (10m)"),
        ("pretrain: {max_minutes: 1:30.5}", "pretrain.max_minutes is '1:30.5'; it must be a number"),
        ("pretrain: {seed: 010}", "pretrain.seed is '010'; it must be a whole number"),
        ("pretrain: {seed: 0x10}", "pretrain.seed is '0x10'; it must be a whole number"),
        ("pretrain: {epochs: 2024-01-01}", "pretrain.epochs is '2024-01-01'; it must be a whole number"),
        ("pretrain: {lr: .inf}", "pretrain.lr is '.inf'; it must be a number"),
        ("pretrain: {lr: .nan}", "pretrain.lr is '.nan'; it must be a number"),
        ("pretrain: {preset: null}", "pretrain.preset is null; it must be a text"),
        ("pretrain: {device: }", "pretrain.device is null; choose one of"),
        ("pretrain: {metrics: maybe}", "pretrain.metrics is 'maybe'; it must be true or false"),
        ("pretrain: {data: {a: b}}", "line 1: expected one value, or a list of values"),
        ("pretrain: {data: [a, b]}", "pretrain.data is '['a', 'b']'; it must be a path"),
        ("pretrain: {data: [a, [b]]}", "expected one value, or a list of values"),
        ("pretrain: {seed: !!int 5}", "the tag 'tag:yaml.org,2002:int' is not supported"),
        ('pretrain: {data: "a\\0b"}', "pretrain.data has a NUL character"),
        ('pretrain: {data: "\\ud800"}', "pretrain.data is '\\ud800'; it must be a path"),
        ("pretrain: {data: ''}", "pretrain.data is empty"),
        ("pretrain: &a\n  <<: *a", "'<<' merges a mapping that has no '<<' itself"),
        ("pretrain: {<<: 5}", "'<<' merges a mapping"),
    ],
)
def test_an_error_in_a_file_names_file_and_key(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        pretrain_settings("--config", str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value) or message.startswith("checkpoint_every")  # its class makes this check
    assert "\n" not in str(error.value)


def test_values_in_a_file_mean_what_they_mean_after_a_flag(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "x-common: &common {seed: 3, epochs: 4}\n"
        "pretrain:\n  <<: *common\n  epochs: 1_000\n  metrics: No\n  tensorboard: on\n"
        "  data: no\n  out: 2024-01-01\n  resume: 0100\n  checkpoint_every: 500\n  max_steps: ~\n  lr: 1e-3\n"
        "fill-mask: {top_k: 3}\n"
    )
    config = pretrain_settings("--config", str(path))
    assert (config.seed, config.epochs, config.metrics, config.tensorboard) == (3, 1000, False, True)
    assert (config.data, config.out, config.resume_step) == (Path("no"), Path("2024-01-01"), 100)
    assert (config.checkpoint_interval, config.max_steps, config.lr) == ((500, None), None, 1e-3)
    path.write_text("# nothing\n")
    assert pretrain_settings("--config", str(path)) == PretrainConfig()
    path.write_text("pretrain:\nprepare: {seed: 1}")
    assert pretrain_settings("--config", str(path)) == PretrainConfig()


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"pretrain: {data: d\xe9}")
    with pytest.raises(UsageError, match=r"settings\.yaml: is not UTF-8: byte 18"):
        pretrain_settings("--config", str(path))
    path.write_text("pretrain: {data: dé}", encoding="utf-8-sig")
    assert pretrain_settings("--config", str(path)).data == Path("dé")


def test_aliases_do_not_grow(tmp_path: Path) -> None:
    """Each line refers to the line before nine times: written out, it would be 9^30 texts."""
    lines = ["x-0: &a0 [x]"] + [f"x-{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 31)]
    path = tmp_path / "settings.yaml"
    path.write_text("\n".join([*lines, "pretrain: {data: *a30}"]))
    with pytest.raises(UsageError, match="expected one value, or a list of values"):
        pretrain_settings("--config", str(path))


def test_a_whole_number_beyond_the_range_of_floats_is_refused() -> None:
    with pytest.raises(UsageError, match="seed is 9999"):
        pretrain_settings("--seed=" + "9" * 400)


@pytest.mark.parametrize("text", ["²", "٣", "1٣", "0x1", "007", "1e3", "1__0", "9" * 5000, "", "1 0"])
def test_whole_numbers_have_one_notation(text: str) -> None:
    for environment, flags in (({}, [f"--seed={text}"]), ({"BABYBERT_PRETRAIN_SEED": text}, [])):
        with pytest.raises(
            UsageError, match=r"(--seed|BABYBERT_PRETRAIN_SEED) is '.*'; it must be a whole number"
        ) as error:
            pretrain_settings(*flags, environment=environment)
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e400", "٣", "½", "01.5", "1:30", ".", ""])
def test_numbers_have_one_notation_and_are_finite(text: str) -> None:
    with pytest.raises(UsageError, match=r"--lr is '.*'; it must be a (finite )?number"):
        pretrain_settings(f"--lr={text}")


def test_plain_numbers() -> None:
    assert pretrain_settings("--seed= 12 ").seed == 12
    for text, number in ((".5", 0.5), ("5.", 5.0), ("1e-4", 1e-4), ("+2.5E1", 25.0), ("3", 3.0)):
        assert pretrain_settings(f"--lr={text}").lr == number


@pytest.mark.parametrize("every", ["0", "0m", "0.0m", "m", "1:30", "²", "1٣m", "9" * 400 + "m", "1e3", "-5", "5 m"])
def test_steps_and_minutes_of_checkpoints_are_checked(every: str) -> None:
    with pytest.raises(UsageError, match="checkpoint_every is"):
        pretrain_settings(f"--checkpoint-every={every}")


def test_resume_takes_steps_in_ascii_digits() -> None:
    assert pretrain_settings("--resume=00000012").resume_step == 12
    assert pretrain_settings("--resume=²").resume_step is None  # a folder
    with pytest.raises(UsageError, match="a step has at most 8 digits"):
        pretrain_settings(f"--resume={'9' * 5000}")


def test_texts_and_paths_of_other_encodings() -> None:
    """Python decodes a byte that is not UTF-8 as a lone surrogate; with `LC_ALL=C`, each byte of a letter."""
    assert pretrain_settings("--data=d\udce9").data == Path("d\udce9")
    assert pretrain_settings("--store=s3://b/\udcc3\udca4").store == "s3://b/ä"
    assert prepare_settings("--text-column=\udcc3\udca4").text_column == "ä"
    with pytest.raises(UsageError, match="--text-column is not UTF-8 text"):
        prepare_settings("--text-column=\udce9")


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
        {"masked_share_end": 0.2, "masking": "static"},
        {"whole_word_masking": True, "masking": "static"},
        {"masked_share_end": 1.0},
        {"max_minutes": float("inf")},
        {"upload_minutes": float("inf")},
        {"upload_minutes": 1e300},
        {"upload_minutes": -1.0},
        {"weight_decay": float("inf")},
        {"epochs": 10**30},
        {"max_steps": 10**8},
        {"width": 10**6},
        {"layers": 10**6},
        {"metrics_host": ""},
        {"metrics_host": "a..b"},
        {"metrics_host": "a b"},
    ],
)
def test_invalid_settings_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        PretrainConfig(**settings)


def prepare_settings(*flags: str, environment: Mapping[str, str] | None = None) -> PrepareConfig:
    """The settings that `babybert prepare FLAGS` would use."""
    parser = argparse.ArgumentParser()
    add_flags(parser, PrepareConfig)
    return load_config(PrepareConfig, "prepare", parser.parse_args(flags), environment or {}, COMMANDS)


def test_a_folder_or_an_address_of_s3(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("prepare:\n  out: s3://bucket/from/the//file\n")

    def out_of(*flags: str, **environment: str) -> Path | str:
        parser = argparse.ArgumentParser()
        add_flags(parser, PrepareConfig)
        return load_config(PrepareConfig, "prepare", parser.parse_args(flags), environment, COMMANDS).out

    assert out_of(f"--config={tmp_path / 'settings.yaml'}") == "s3://bucket/from/the//file"
    assert out_of(BABYBERT_PREPARE_OUT="s3://bucket") == "s3://bucket"
    assert out_of("--out=none", BABYBERT_PREPARE_OUT="s3://bucket") == Path("none")
    with pytest.raises(UsageError, match=r"s3://b!/x: 'b!' is not a bucket name"):
        out_of("--out=s3://b!/x")


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
    path.write_text("prepare: {corpus: text, source: [1, no]}")
    assert prepare_settings("--config", str(path)).source == ("1", "no")
    for source, problem in (("~", "is null; it must be a text or a list"), ("[a, '']", "is empty")):
        path.write_text(f"prepare: {{corpus: text, source: {source}}}")
        with pytest.raises(UsageError, match=f"prepare.source {problem}"):
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
        ({"tokenizer": Path("t"), "vocab_size": 100}, "vocab_size is for training a tokenizer"),
        ({"tokenizer": Path("t"), "min_frequency": 1}, "min_frequency is for training a tokenizer"),
        ({"tokenizer": Path("t"), "tokenizer_kind": "basic-english"}, "tokenizer_kind is for training a tokenizer"),
        ({"vocab_size": 5}, "vocab_size is 5"),
        ({"min_frequency": 0}, "min_frequency is 0"),
        ({"max_positions": 513}, "max_positions is 513"),
        ({"duplicates": 0}, "duplicates is 0"),
        ({"shard_mb": 0}, "shard_mb is 0"),
        ({"limit": 10**30}, "limit is 1000"),
        ({"validation_fraction": float("nan")}, "validation_fraction is nan"),
    ],
)
def test_invalid_settings_of_prepare_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PrepareConfig(**settings)


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (EvaluateConfig, {"max_pairs": 10**30}),
        (ProbeConfig, {"documents": 10**30}),
        (LookConfig, {"among": 10**30}),
        (InfoConfig, {"rows": 10**30}),
        (FillMaskConfig, {"top_k": 0}),
        (ServeConfig, {"start_seconds": float("inf")}),
        (ServeConfig, {"watch_seconds": float("nan")}),
        (ServeConfig, {"drain_seconds": 1e300}),
        (ServeConfig, {"token_minutes": 10**9}),
        (ServeConfig, {"workers": 10**6}),
        (ServeConfig, {"host": "a\nb"}),
        (PlaygroundConfig, {"port": 65_536, "checkpoint": "x"}),
        (PlaygroundConfig, {"host": "", "checkpoint": "x"}),
        (PlaygroundConfig, {"endpoint": "http://127.0.0.1:65536"}),
        (PlaygroundConfig, {"endpoint": "http://:8080"}),
        (PlaygroundConfig, {"endpoint": "http://[::1:8080"}),
    ],
)
def test_invalid_settings_of_other_commands_are_refused(config_class: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        config_class(**settings)


@pytest.mark.parametrize("seconds", ["²", "nan", "inf", "0", "-1", "1e300", ""])
def test_the_timeout_of_s3_is_checked(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv("BABYBERT_S3_TIMEOUT", seconds)
    with pytest.raises(UsageError, match=r"BABYBERT_S3_TIMEOUT is '.*'; it must be seconds"):
        make_client()


def test_settings_that_a_given_tokenizer_excludes_are_refused_wherever_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("prepare: {tokenizer_kind: wordpiece}")
    for flags, environment in (
        (["--config", str(path)], {}),
        (["--min-frequency=1"], {}),
        ([], {"BABYBERT_PREPARE_VOCAB_SIZE": "500"}),
    ):
        with pytest.raises(UsageError, match="leave one of them out"):
            prepare_settings("--tokenizer=t.json", *flags, environment=environment)
    config = prepare_settings("--tokenizer=t.json", environment={"BABYBERT_PREPARE_VOCAB_SIZE": ""})
    assert dataclasses.replace(config, seed=1).tokenizer == Path("t.json")
    assert prepare_settings() == PrepareConfig()
    assert (PrepareConfig().tokenizer_kind, PrepareConfig().min_frequency) == ("basic-english", 1)
