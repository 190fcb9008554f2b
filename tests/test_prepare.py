import itertools
import json
import resource
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import imdb_review_folder, run_until_killed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pairs import plain_split

from babybert.config import PrepareConfig
from babybert.corpus.demo import generate_reviews
from babybert.data.dataset import open_dataset, sha256
from babybert.data.prepare import prepare
from babybert.data.tokenizer import CLS, SEP, UNK
from babybert.errors import DataError, StorageError, UsageError


def files_of(folder):
    return {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}


def test_the_same_seed_writes_the_same_files(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(PrepareConfig(out=tmp_path / name, demo_documents=40, validation_fraction=0.2, seed=seed))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert files_of(tmp_path / "a")["train-00000.csv"] != files_of(tmp_path / "c")["train-00000.csv"]


def test_facts_are_those_of_the_files(demo):
    facts = demo.facts
    assert facts["generated"] is True
    for split in ("train", "validation"):
        examples = demo.examples(split)
        assert facts[split]["pairs"] == len(examples) == len(pd.read_csv(demo.folder / f"{split}-00000.csv"))
        assert facts[split]["masked_tokens"] == (examples.labels > 0).sum()
        assert facts[split]["longest"] == np.diff(examples.offsets).max() <= facts["max_positions"]
    assert (demo.token_counts() == demo.examples("train").token_counts(demo.tokenizer.size)).all()


def test_copies_of_a_document_are_on_one_side(tmp_path):
    texts = generate_reviews(60, seed=0)
    prepare(
        PrepareConfig(
            corpus="imdb",
            source=(str(imdb_review_folder(tmp_path / "source", texts * 2)),),
            out=tmp_path / "data",
            validation_fraction=0.3,
        )
    )
    dataset = open_dataset(tmp_path / "data")
    sides = {}
    for split in ("train", "validation"):
        examples = dataset.examples(split)
        ids = examples.original_ids()
        positive = np.flatnonzero(examples.is_next == 1)
        sides[split] = {ids[examples.offsets[p] : examples.offsets[p + 1]].tobytes() for p in positive}
    assert sides["train"]
    assert sides["validation"]
    assert not sides["train"] & sides["validation"]


def test_prepared_data_is_not_replaced_unasked(tmp_path):
    prepare(PrepareConfig(out=tmp_path, demo_documents=40, validation_fraction=0.2))
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match="--overwrite"):
        prepare(PrepareConfig(out=tmp_path, demo_documents=50, validation_fraction=0.2))
    assert files_of(tmp_path) == before
    prepare(PrepareConfig(out=tmp_path, demo_documents=60, validation_fraction=0.2, overwrite=True))
    assert open_dataset(tmp_path).facts["train"]["documents"] > 40


def test_a_failed_prepare_leaves_nothing(tmp_path):
    source = imdb_review_folder(tmp_path / "source", ["Too short"] * 10)
    with pytest.raises(DataError, match="give no sentence pairs"):
        prepare(PrepareConfig(corpus="imdb", source=(str(source),), out=tmp_path / "data"))
    assert not (tmp_path / "data").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write the data"):
        prepare(PrepareConfig(out=tmp_path / "file" / "data", demo_documents=40))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "calls"),
    [
        ("babybert.data.spool:Spool.add", 40),
        ("babybert.data.basic_english:BasicEnglishTokenizer.finish", 1),
        ("babybert.data.shards:Shard.write_csv", 1),
        ("babybert.data.shards:Shard.close", 1),
        ("babybert.data.prepare:_write_vocabulary", 1),
        ("babybert.data.shards:Shard.close", 2),
        ("babybert.data.prepare:_finish", 1),
        ("babybert.data.prepare:_replace", 1),
        ("pathlib:Path.replace", 1),
        ("pathlib:Path.replace", 3),
        ("pathlib:Path.replace", 5),
    ],
)
def test_a_killed_prepare_leaves_nothing_that_looks_whole_and_the_next_starts_clean(
    tmp_path, demo_folder, function, calls
):
    out = tmp_path / "data"
    flags = ["prepare", "--demo-documents=80", "--validation-fraction=0.2", f"--out={out}"]
    run_until_killed(function, calls, *flags)
    assert (out / ".partial").exists()
    with pytest.raises(DataError, match=r"no dataset.json"):
        open_dataset(out)
    prepare(PrepareConfig(out=out, demo_documents=80, validation_fraction=0.2))
    assert files_of(out) == files_of(demo_folder)
    assert not (out / ".partial").exists()
    assert not (out / ".work").exists()


@pytest.mark.parametrize("calls", [1, 4, 5])
def test_data_that_is_replaced_is_whole_or_no_data(tmp_path, demo_folder, calls):
    """Killed between the last of the old and the last of the new files."""
    shutil.copytree(demo_folder, tmp_path / "data")
    flags = ["prepare", "--demo-documents=60", "--overwrite", f"--out={tmp_path / 'data'}"]
    run_until_killed("pathlib:Path.replace", calls, *flags)
    with pytest.raises(DataError, match=r"no dataset.json"):
        open_dataset(tmp_path / "data")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "csv.gz", "csv.zst", "parquet"])
def test_a_full_disk_is_one_line_and_leaves_the_older_data(tmp_path, kind):
    """A limit on the size of files stands in for the full disk: writing fails in the same place, in the same way."""
    prepare(PrepareConfig(out=tmp_path / "data", demo_documents=40, validation_fraction=0.2))
    before = files_of(tmp_path / "data")
    command = [
        sys.executable,
        "-m",
        "babybert.cli",
        "prepare",
        "--demo-documents=2000",
        "--overwrite",
        f"--format={kind}",
        f"--out={tmp_path / 'data'}",
    ]
    for limit in (50_000, 450_000):  # within the spool, within the table
        full = subprocess.run(
            command,
            capture_output=True,
            text=True,
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        if limit > 50_000 and kind != "csv" and full.returncode == 0:
            continue  # compressed, the table fits
        assert full.returncode == 1, full.stderr
        assert (
            full.stderr.strip()
            .splitlines()[-1]
            .startswith(f"babybert prepare: error: {tmp_path / 'data'}: cannot write the data:")
        ), full.stderr
        assert files_of(tmp_path / "data") == before
        assert not (tmp_path / "data" / ".partial").exists()


ANY_TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=60)
PUNCTUATED = st.lists(
    st.one_of(ANY_TEXT, st.sampled_from([". ", "! ", "? ", "<br />", "[MASK]", "[PAD] x", '"', ",", "\n"])), max_size=12
).map("".join)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(PUNCTUATED, min_size=1, max_size=8),
    st.sampled_from(["csv", "parquet"]),
    st.sampled_from(["basic-english", "wordpiece"]),
)
def test_whatever_the_text_the_tokens_in_the_table_are_the_tokenizers_own(
    tmp_path_factory, texts, kind, tokenizer_kind
):
    folder = tmp_path_factory.mktemp("any")
    texts += [f"this is review {i} . it has a second sentence {i} ." for i in range(30)]
    with (folder / "in.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    config = PrepareConfig(
        corpus="jsonl",
        source=(str(folder / "in.jsonl"),),
        out=folder / "out",
        validation_fraction=0.3,
        format=kind,
        tokenizer_kind=tokenizer_kind,
        max_positions=512,
    )
    facts = prepare(config)
    dataset = open_dataset(folder / "out")
    encoded = dataset.tokenizer.encode_documents(texts)
    assert facts["tokens"] == sum(map(len, encoded))
    ends = set(dataset.tokenizer.sentence_end_ids().tolist())
    sentences = [tuple(sentence) for ids in encoded for sentence in plain_split(ids.tolist(), ends)]
    neighbours = {pair for ids in encoded for pair in itertools.pairwise(map(tuple, plain_split(ids.tolist(), ends)))}
    for split in ("train", "validation"):
        examples = dataset.examples(split)
        for row in range(len(examples)):
            ids = examples.rows(row, row + 1).original_ids().tolist()
            middle = ids.index(SEP)
            a, b = tuple(ids[1:middle]), tuple(ids[middle + 1 : -1])
            assert ids == [CLS, *a, SEP, *b, SEP]
            if len(ids) < 512:
                assert a in sentences
                assert b in sentences
                assert not examples.is_next[row] or (a, b) in neighbours
    shutil.rmtree(folder)


@pytest.mark.slow
def test_format_alone_does_not_tell_the_label(tmp_path):
    """Reviews as people write them: openings, verdicts at the end, sentences that grow shorter, unequal reviews.

    A classifier that sees lengths, last tokens and positions of specials, but no words, must stay at chance. Fitted
    on one half of the pairs and tried on the other; the bound is five standard deviations of a coin.
    """
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(300)]
    for i in range(1500):
        lines = []
        count = int(rng.integers(2, 14))
        for place in range(count):
            length = max(2, int(rng.gamma(3, 6) * (2 if place == 0 else 0.5 if place == count - 1 else 1)))
            end = rng.choice(["...", "?!", "!!!", "."] if place == count - 1 else [".", ".", ".", "?"])
            lines.append(" ".join(rng.choice(words, length)) + end)
        (tmp_path / f"{i}.txt").write_text(" ".join(lines) + ("" if i % 3 else " no end"))
    prepare(
        PrepareConfig(corpus="text", source=(str(tmp_path),), out=tmp_path / "data", max_positions=48, min_frequency=1)
    )
    dataset = open_dataset(tmp_path / "data")
    examples = dataset.examples("train")
    features, labels = format_features(examples), examples.is_next
    assert len(labels) > 3000
    half = len(labels) // 2
    guess = fitted(features[:half], labels[:half])(features[half:])
    chance = 5 * 0.5 / (len(labels) - half) ** 0.5
    assert abs((guess == labels[half:]).mean() - 0.5) < chance
    leaky = np.column_stack(
        [features, labels + rng.normal(0, 0.5, len(labels))]
    )  # the classifier does find what is there
    assert (fitted(leaky[:half], labels[:half])(leaky[half:]) == labels[half:]).mean() > 0.5 + chance


def format_features(examples):
    """All that is to be seen without knowing a word, with squares and products."""
    rows = []
    for row in range(len(examples)):
        part = examples.rows(row, row + 1)
        ids = part.original_ids()
        length_a = int((part.segments == 1).sum()) - 2
        length_b = len(ids) - length_a - 3
        last = [ids[length_a], ids[-2], ids[length_a - 1], ids[-3]]
        rows.append(
            [
                length_a,
                length_b,
                len(ids),
                np.log(length_a),
                np.log(length_b),
                *(token == t for token in last for t in range(5, 9)),
                int((part.labels > 0).sum()),
            ]
        )
    x = np.array(rows, float)
    x = (x - x.mean(0)) / (x.std(0) + 1e-9)
    return np.column_stack([x, x[:, :5] ** 2, x[:, :1] * x, x[:, 1:2] * x])


def fitted(features, labels):
    """Logistic regression by gradient descent."""
    x = np.column_stack([features, np.ones(len(features))])
    weights = np.zeros(x.shape[1])
    for _ in range(300):
        weights += 0.1 * x.T @ (labels - 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))) / len(x)
    return lambda new: (np.column_stack([new, np.ones(len(new))]) @ weights > 0).astype(int)


def test_copies_are_masked_differently_and_the_held_out_pairs_are_not_copied(tmp_path):
    for copies in (1, 3):
        prepare(
            PrepareConfig(out=tmp_path / str(copies), demo_documents=60, validation_fraction=0.3, duplicates=copies)
        )
    once, thrice = open_dataset(tmp_path / "1"), open_dataset(tmp_path / "3")
    assert thrice.facts["train"]["pairs"] == 3 * once.facts["train"]["pairs"]
    assert thrice.facts["shards"]["validation"] == once.facts["shards"]["validation"]
    examples, count = thrice.examples("train"), once.facts["train"]["pairs"]
    copies = [examples.rows(first, first + count) for first in range(0, 3 * count, count)]
    for copy in copies[1:]:
        assert (copy.original_ids() == copies[0].original_ids()).all()
        both = ((copy.labels > 0) & (copies[0].labels > 0)).sum() / (copy.labels > 0).sum()
        assert 0.05 < both < 0.35  # about 0.15 of ordinary tokens, more in short rows


def test_a_tokenizer_is_reused(tmp_path):
    prepare(PrepareConfig(out=tmp_path / "a", demo_documents=60, validation_fraction=0.3))
    first = open_dataset(tmp_path / "a")
    (tmp_path / "t.txt").write_text("\n\n".join(f"The unheard {i} is good. It is a western ." for i in range(40)))
    config = PrepareConfig(
        corpus="text",
        source=(str(tmp_path / "t.txt"),),
        documents="blank-lines",
        out=tmp_path / "b",
        tokenizer=tmp_path / "a" / "tokenizer.json",
        validation_fraction=0.3,
    )
    facts = prepare(config)
    second = open_dataset(tmp_path / "b")
    assert second.tokenizer.digest == first.tokenizer.digest
    assert facts["train"]["unknown_tokens"] > 0
    assert (second.examples("train").original_ids() == UNK).sum() == facts["train"]["unknown_tokens"]


def test_tables_of_other_hands_are_imported_and_checked(tmp_path):
    prepare(PrepareConfig(out=tmp_path / "a", demo_documents=60, validation_fraction=0.3))
    first = open_dataset(tmp_path / "a")
    for split in ("train", "validation"):
        frame = pd.read_csv(tmp_path / "a" / f"{split}-00000.csv")
        frame["segment_label"] = frame["segment_label"].str.strip("[]")
        frame.columns = ["BERT Input", "BERT Label", "Segment Label", "Is Next"]
        frame.insert(0, "Original Text", "a\nb")
        frame.to_csv(tmp_path / f"{split}.csv", index=False)
    settings = {
        "corpus": "table",
        "tokenizer": tmp_path / "a" / "tokenizer.json",
        "source": (str(tmp_path / "train.csv"),),
    }
    facts = prepare(
        PrepareConfig(**settings, validation_source=(str(tmp_path / "validation.csv"),), out=tmp_path / "b")
    )
    assert facts["shards"] == first.facts["shards"]
    assert (open_dataset(tmp_path / "b").token_counts() == first.token_counts()).all()
    with (tmp_path / "train.csv").open("a") as file:
        file.write('x,"[1,5,2]","[0,5]","1,1,1",1\n')
    with pytest.raises(
        DataError, match=rf"train.csv: row {facts['train']['pairs'] + 1}: bert_input has 3 entries, bert_label has 2"
    ):
        prepare(PrepareConfig(**settings, validation_source=(str(tmp_path / "validation.csv"),), out=tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    facts = prepare(
        PrepareConfig(
            **settings, validation_source=(str(tmp_path / "validation.csv"),), out=tmp_path / "c", skip_bad_rows=True
        )
    )
    assert facts["skipped_rows"] == 1
    assert facts["shards"] == first.facts["shards"]


def test_skipped_rows_are_counted_once(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": f"Number {i} is good. It is a film." if i % 10 else 7}) + "\n" for i in range(60))
    )
    for kind in ("basic-english", "wordpiece"):  # the latter reads the source twice
        facts = prepare(
            PrepareConfig(
                corpus="jsonl",
                source=(str(tmp_path / "t.jsonl"),),
                out=tmp_path / kind,
                skip_bad_rows=True,
                validation_fraction=0.3,
                tokenizer_kind=kind,
            )
        )
        assert facts["skipped_rows"] == 6
        assert facts["documents"] == 54
