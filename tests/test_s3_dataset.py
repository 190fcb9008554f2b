"""Datasets in S3, with a real server: the pairs and bits of a folder, one fetch a machine, no half or wrong file."""

import dataclasses
import json
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import S3
from faulty_proxy import Refusal, S3Proxy, S3Request
from processes import COMMAND_SECONDS, babybert_command, run_babybert, run_until_killed
from test_distributed import Small, logged_mlm_losses, torchrun_command

from babybert.config import EvaluateConfig, InfoConfig, PrepareConfig, PretrainConfig
from babybert.data import s3_cache
from babybert.data.dataset import Dataset, open_dataset
from babybert.data.digest import sha256
from babybert.data.prepare import prepare
from babybert.data.s3_cache import CacheLimits
from babybert.data.s3_dataset import S3Dataset, open_data, open_s3_dataset
from babybert.errors import DataError, StorageError, UsageError
from babybert.info import describe
from babybert.training.train import pretrain


@pytest.fixture
def address(s3: S3, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The demo dataset in S3. The default cache is below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    upload(s3, demo_folder)
    return f"s3://{s3.bucket}/data"


def upload(s3: S3, folder: Path, prefix: str = "data") -> None:
    """Copy a dataset folder, as `aws s3 sync` does."""
    for path in folder.iterdir():
        if path.is_file():
            s3.client.upload_file(str(path), s3.bucket, f"{prefix}/{path.name}")


def fetched(tmp_path: Path) -> set[str]:
    """The files in the default cache, which must have one dataset."""
    (folder,) = (tmp_path / "caches/babybert/datasets").iterdir()
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def downloads(proxy: S3Proxy) -> Counter[str]:
    """How often each object was downloaded."""
    return Counter(Path(request.path).name for request in proxy.requests if request.method == "GET")


def cache(folder: Path) -> CacheLimits:
    return CacheLimits(folder / "cache", 1)


def assert_same_pairs(dataset: Dataset, expected: Dataset) -> None:
    for split in ("train", "validation"):
        examples, expected_examples = dataset.examples(split), expected.examples(split)
        for field in dataclasses.fields(examples):
            assert np.array_equal(getattr(examples, field.name), getattr(expected_examples, field.name))


def test_the_pairs_are_those_of_the_folder(
    address: str, demo: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_data(address, CacheLimits(None, 1))
    assert fetched(tmp_path) == {"dataset.json", "tokenizer.json"}
    assert_same_pairs(dataset, demo)
    assert np.array_equal(dataset.token_counts(), demo.token_counts())
    assert dataset.digest == demo.digest
    # What was fetched is a dataset folder.
    assert_same_pairs(open_dataset(dataset.folder), demo)
    assert "fetch and read train: " in caplog.text


def test_only_what_is_needed_is_fetched(address: str, tmp_path: Path) -> None:
    dataset = open_data(address, CacheLimits(None, 1))
    dataset.examples("validation")
    dataset.token_counts()
    assert fetched(tmp_path) == {"dataset.json", "tokenizer.json", "vocabulary.csv", "validation-00000.csv"}


@pytest.mark.slow
def test_a_run_has_the_bits_of_one_from_the_folder(address: str, small: Small, tmp_path: Path) -> None:
    runs = [
        pretrain(small(data=data, out=tmp_path / name, epochs=1, log_every=1))
        for name, data in (("folder", small().data), ("s3", address))
    ]
    weights = [run and sha256(run.checkpoint / "model.safetensors") for run in runs]
    assert weights[0] == weights[1]
    assert logged_mlm_losses(tmp_path / "s3") == logged_mlm_losses(tmp_path / "folder")
    # It may go on from the folder.
    assert pretrain(small(out=tmp_path / "s3", epochs=2))


@pytest.mark.slow
def test_the_order_of_pairs_is_the_same_for_one_two_and_four_processes(
    address: str, small: Small, tmp_path: Path
) -> None:
    """The losses of each step are those of the same global batches. The ranks share one cache."""
    settings = {"data": address, "batch_size": 40, "lr": 1e-3, "log_every": 1, "epochs": 1}
    pretrain(small(out=tmp_path / "1", **settings))
    for processes in (2, 4):
        command = torchrun_command(small(out=tmp_path / str(processes), **settings))
        command = [part.replace("--nproc-per-node=2", f"--nproc-per-node={processes}") for part in command]
        job = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=COMMAND_SECONDS
        )
        assert job.returncode == 0, job.stderr
        losses = logged_mlm_losses(tmp_path / str(processes))
        assert losses == pytest.approx(logged_mlm_losses(tmp_path / "1"), abs=1e-4)


def test_processes_of_one_machine_fetch_once(address: str, s3_proxy: S3Proxy, demo: Dataset, tmp_path: Path) -> None:
    """Threads here: the locks are between open files."""
    failures: list[Exception] = []

    def read() -> None:
        try:
            dataset = open_s3_dataset(address, cache(tmp_path))
            dataset.token_counts()
            assert_same_pairs(dataset, demo)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    files = ("tokenizer.json", "vocabulary.csv", "train-00000.csv", "validation-00000.csv")
    assert [downloads(s3_proxy)[name] for name in files] == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_killed_process_leaves_complete_files(s3: S3, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    prepare(PrepareConfig(out=tmp_path / "data", demo_documents=1500, validation_fraction=0.2, shard_mb=1))
    for shard in (tmp_path / "data").glob("*-*.csv"):  # many small shards, as a large corpus has
        assert shard.stat().st_size > 1000
    upload(s3, tmp_path / "data")
    flags = ("info", f"s3://{s3.bucket}/data", f"--cache={tmp_path / 'cache'}")
    run_until_killed("babybert.data.s3_dataset:sha256", 3, *flags)  # the tokenizer, a shard; the next one is partial
    (folder,) = (tmp_path / "cache").iterdir()
    complete = {path.name for path in folder.glob("*.csv")}
    assert [path for path in folder.iterdir() if path.name.startswith(".fetch-")]
    s3_proxy.requests.clear()
    done = run_babybert(*flags)
    assert done.returncode == 0, done.stderr
    assert not complete & set(downloads(s3_proxy))
    assert not [path for path in folder.iterdir() if path.name.startswith(".fetch-")]
    folder_output = run_babybert("info", str(tmp_path / "data")).stdout
    assert done.stdout.replace(flags[1], str(tmp_path / "data")) == folder_output


def test_what_is_no_dataset_is_refused(s3: S3, address: str, tmp_path: Path) -> None:
    facts = json.loads(s3.client.get_object(Bucket=s3.bucket, Key="data/dataset.json")["Body"].read())
    s3.client.put_object(Bucket=s3.bucket, Key="half/train-00000.csv", Body=b"x")
    s3.client.put_object(Bucket=s3.bucket, Key="text/dataset.json", Body=b"no JSON")
    s3.client.put_object(Bucket=s3.bucket, Key="old/dataset.json", Body=json.dumps({**facts, "format": 1}).encode())
    facts["shards"]["train"][0]["file"] = "../../evil.csv"
    s3.client.put_object(Bucket=s3.bucket, Key="evil/dataset.json", Body=json.dumps(facts).encode())
    for prefix, message in (
        ("half", "half: no dataset.json, so there is no dataset, or it is incomplete"),
        ("text", "text/dataset.json: not a description of prepared data"),
        ("old", "old/dataset.json: format 1; this version reads format 2"),
        ("evil", "'../../evil.csv' is not the name of a file"),
    ):
        with pytest.raises(DataError, match=message):
            open_s3_dataset(f"s3://{s3.bucket}/{prefix}", cache(tmp_path))
    with pytest.raises(UsageError, match="not an S3 address"):
        PretrainConfig(data="s3://")
    with pytest.raises(UsageError, match="cache_gb is 0"):
        EvaluateConfig(cache_gb=0)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocabulary.csv", "train-00000.csv"])
@pytest.mark.parametrize("change", ["missing", "changed"])
def test_an_object_that_is_missing_or_has_changed_is_named(
    s3: S3, address: str, tmp_path: Path, name: str, change: str
) -> None:
    content = s3.client.get_object(Bucket=s3.bucket, Key=f"data/{name}")["Body"].read()
    if change == "missing":
        s3.client.delete_object(Bucket=s3.bucket, Key=f"data/{name}")
    else:
        s3.client.put_object(Bucket=s3.bucket, Key=f"data/{name}", Body=content.replace(b"1", b"2", 1))
    message = "no such object" if change == "missing" else "differs from what dataset.json recorded"
    with pytest.raises(DataError, match=f"data/{name}: {message}"):
        describe_everything(address, tmp_path)
    # Once it is right again, it is fetched.
    s3.client.put_object(Bucket=s3.bucket, Key=f"data/{name}", Body=content)
    describe_everything(address, tmp_path)


def describe_everything(address: str, tmp_path: Path) -> None:
    """Read every file of a dataset."""
    open_s3_dataset(address, cache(tmp_path)).token_counts()
    assert describe(address, InfoConfig(cache=tmp_path / "cache"))["train"]["shards"] == 1


def test_another_dataset_at_the_address_is_fetched(s3: S3, address: str, tmp_path: Path) -> None:
    first = open_s3_dataset(address, cache(tmp_path))
    first.examples("train")
    prepare(PrepareConfig(out=tmp_path / "other", demo_documents=60, seed=1))
    upload(s3, tmp_path / "other")
    second = open_s3_dataset(address, cache(tmp_path))
    assert second.folder != first.folder
    assert_same_pairs(second, open_dataset(tmp_path / "other"))
    # A shard that was replaced while it was to be fetched is not taken for the old one.
    with pytest.raises(DataError, match=r"validation-00000.csv: differs from what dataset.json recorded"):
        first.examples("validation")


def test_s3_may_be_away_for_a_while(address: str, s3_proxy: S3Proxy, demo: Dataset, tmp_path: Path) -> None:
    remaining = iter(range(4))  # boto3 tries a request three times

    def rule(request: S3Request) -> Refusal | None:
        return Refusal(503, "SlowDown", "wait") if next(remaining, None) is not None else None

    s3_proxy.rule = rule
    assert_same_pairs(open_s3_dataset(address, cache(tmp_path), retry_seconds=60), demo)
    s3_proxy.rule = lambda request: Refusal(503, "SlowDown", "wait")
    with pytest.raises(StorageError, match="S3"):
        open_s3_dataset(address, cache(tmp_path), retry_seconds=0)


@pytest.fixture
def datasets(s3: S3, address: str, tmp_path: Path) -> Callable[[int], S3Dataset]:
    """A function that opens the dataset again as another one: its `dataset.json` has one more field."""
    facts = json.loads(s3.client.get_object(Bucket=s3.bucket, Key="data/dataset.json")["Body"].read())

    def open_number(number: int) -> S3Dataset:
        content = json.dumps({**facts, "number": number}).encode()
        s3.client.put_object(Bucket=s3.bucket, Key="data/dataset.json", Body=content)
        return open_s3_dataset(address, cache(tmp_path))

    return open_number


def test_the_cache_is_bounded(
    datasets: Callable[[int], S3Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Datasets that nobody uses are deleted, the one that was opened first before others."""
    (tmp_path / "cache/other").mkdir(parents=True)
    (tmp_path / "cache/other/file").write_bytes(bytes(10**6))
    opened = []
    for number in range(3):
        opened.append(datasets(number))
        opened[-1].examples("train")
        os.utime(opened[-1].folder / ".in-use", (number, number))
    used = s3_cache.size_of(opened[0].folder)
    monkeypatch.setattr(s3_cache, "BYTES_PER_GB", int(3.5 * used))
    with pytest.raises(UsageError, match="because other processes use what is in it; raise --cache-gb"):
        datasets(3).examples("train")
    opened[1].in_use.close()
    opened[2].in_use.close()
    dataset = datasets(4)
    dataset.examples("train")
    assert [one.folder.exists() for one in opened] == [True, False, True]
    assert (tmp_path / "cache/other/file").exists()
    monkeypatch.setattr(s3_cache, "BYTES_PER_GB", used // 2)
    with pytest.raises(UsageError, match="which may have 1; raise --cache-gb"):
        dataset.examples("validation")
    assert opened[2].folder.exists()


def test_a_full_disk_is_noticed_before_anything_is_fetched(
    address: str, s3_proxy: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_s3_dataset(address, cache(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"on the disk of .*, which has 0\.0; make room"):
        dataset.examples("train")
    assert "train-00000.csv" not in downloads(s3_proxy)


@pytest.mark.slow
def test_evaluate_scores_held_out_pairs_from_s3(address: str, small: Small, tmp_path: Path) -> None:
    run: Any = pretrain(small(epochs=1))
    scores = []
    for data in (small().data, address):
        done = subprocess.run(
            babybert_command("evaluate", f"--checkpoint={run.checkpoint}", f"--data={data}", "--json", "--device=cpu"),
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout))
    assert scores[0] == scores[1]
