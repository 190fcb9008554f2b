"""How fast data is prepared and loaded, beside the reference's way and Hugging Face's, on the same reviews in one run.

    python benchmarks/data.py aclImdb_v1.tar.gz      # three to five minutes on two cores; needs `pip install '.[bench]'`

Preparing: archive to sharded CSV, beside tokenizing alone (`tokenizers`, all cores, text in memory, vocabulary known)
and beside the reference's loop, which is run on a sample of the reviews because all of them would take hours. Memory
and time by size of the corpus come from JSON Lines of 5,000 to 100,000 documents (50,000 reviews, each twice at most).
Loading: pairs/s of batches of 256 pairs of at most 64 positions in the second epoch, beside the reference's
`Dataset`, `datasets` with `DataCollatorForLanguageModeling`, and what whole training steps take in.

Figures are medians of `--repeat` runs, in which peers and ours take turns; each size is run once, as what is read off is the line through all.
"""

import argparse
import csv
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from babybert.config import PrepareConfig, PretrainConfig
from babybert.corpus.documents import open_corpus
from babybert.corpus.files import BadRows
from babybert.data.dataset import Dataset, open_dataset
from babybert.data.loader import DynamicMasking, Loader
from babybert.data.tokenizer import Tokenizer
from babybert.model.loss import LossSums, PretrainingModel
from babybert.training.train import load_or_create, make_optimizer

BATCH, POSITIONS = 256, 64
SIZES = (5_000, 10_000, 20_000, 50_000, 100_000)


def main() -> None:
    """Run everything, print tables, write JSON."""
    parser = argparse.ArgumentParser(description="Measure preparing and loading.")
    parser.add_argument("archive", help="the IMDB archive")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each measurement; medians are reported")
    parser.add_argument("--sample", type=int, default=150, help="reviews that the reference's preparation is timed on")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/data.json"), help="where the figures go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        texts = read_texts(options.archive, work)
        found = {
            "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "reviews": len(texts)},
            "preparing": measure_preparing(options.archive, texts, work, options.repeat, options.sample),
            "sizes": measure_sizes(texts, work),
            "loading": measure_loading(options.archive, work, options.repeat),
        }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\n{options.json} has these figures")


def read_texts(archive: str, work: Path) -> list[str]:
    """All reviews, in memory."""
    config = PrepareConfig(corpus="imdb", source=(archive,))
    return [document.text for document in open_corpus(config, work, BadRows()).documents("read")]


def timed(action: Callable[[], Any]) -> float:
    """Seconds that it supports."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


# The high-water mark is asked for from inside: what the parent sees of its child counts the parent's own pages.
PREPARE = """
import sys
from babybert.cli import main
code = main(["prepare", *sys.argv[1:], "--overwrite"])
print("peak kB:", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


def run_prepare(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory (GiB) of one `babybert prepare`, the start of Python and all."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PREPARE, *arguments], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(done.stdout.split("peak kB:")[1]) / 2**20


# Preparing


def measure_preparing(archive: str, texts: list[str], work: Path, repeat: int, sample: int) -> dict[str, float]:
    """Ours from the archive, tokenizing alone, and the reference's loop on a sample."""
    ours, memory, alone, reference = [], [], [], []
    chosen = random.Random(0).sample(texts, sample)
    for _ in range(repeat):
        seconds, peak = run_prepare("--corpus=imdb", f"--source={archive}", f"--out={work / 'imdb'}")
        ours.append(seconds)
        memory.append(peak)
        tokenizer = Tokenizer.load(work / "imdb" / "tokenizer.json")
        alone.append(
            timed(
                lambda tokenizer=tokenizer: [
                    tokenizer.encode_documents(texts[i : i + 1000]) for i in range(0, len(texts), 1000)
                ]
            )
        )  # type: ignore[misc]
        reference.append(timed(lambda: reference_prepare(chosen, work / "reference.csv")))
    found = {
        "ours_seconds": statistics.median(ours),
        "ours_reviews_per_second": len(texts) / statistics.median(ours),
        "ours_peak_gib": max(memory),
        "tokenizing_alone_seconds": statistics.median(alone),
        "reference_reviews_per_second": sample / statistics.median(reference),
    }
    found["times_tokenizing_alone"] = found["ours_seconds"] / found["tokenizing_alone_seconds"]
    found["times_reference_rate"] = found["ours_reviews_per_second"] / found["reference_reviews_per_second"]
    print(f"\nPreparing, {len(texts):,} reviews, archive to sharded CSV (medians of {repeat})")
    print(
        f"  ours                 {found['ours_seconds']:8.1f} s {found['ours_reviews_per_second']:10,.0f} reviews/s   peak {found['ours_peak_gib']:.2f} GiB"
    )
    print(
        f"  tokenizing alone     {found['tokenizing_alone_seconds']:8.1f} s   ours takes {found['times_tokenizing_alone']:.2f} times as long"
    )
    print(
        f"  the reference's loop            {found['reference_reviews_per_second']:10,.1f} reviews/s   ours has {found['times_reference_rate']:,.0f} times its rate"
    )
    return found


def reference_prepare(texts: list[str], path: Path) -> None:
    """The reference's way, in spirit: tokens one by one in Python, a Bernoulli draw each, pairs padded alike."""
    documents = [reference_sentences(text) for text in texts]
    vocabulary = Counter(word for sentences in documents for sentence in sentences for word in sentence)
    ids = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *vocabulary])}
    words = list(vocabulary)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Original Text", "BERT Input", "BERT Label", "Segment Label", "Is Next"])
        for sentences in documents:
            for i in range(0, len(sentences) - 1, 2):
                follows = bernoulli(0.5)
                second = (
                    sentences[i + 1]
                    if follows
                    else random.choice(random.choice([other for other in documents if other]))
                )
                (a, a_label), (b, b_label) = reference_mask(sentences[i], words), reference_mask(second, words)
                longest = max(len(a), len(b))
                first, first_label = ["[CLS]", *a, "[SEP]"], ["[PAD]", *a_label, "[PAD]"]
                tokens = first + ["[PAD]"] * (longest - len(a)) + [*b, "[SEP]"] + ["[PAD]"] * (longest - len(b))
                labels = (
                    first_label + ["[PAD]"] * (longest - len(a)) + [*b_label, "[PAD]"] + ["[PAD]"] * (longest - len(b))
                )
                segments = [1] * len(first) + [0] * (longest - len(a)) + [2] * (len(b) + 1) + [0] * (longest - len(b))
                row = [
                    json.dumps([ids[t] for t in tokens]),
                    json.dumps([ids[t] for t in labels]),
                    ",".join(map(str, segments)),
                    int(follows),
                ]
                writer.writerow([" ".join(sentences[i] + second), *row])


def reference_sentences(text: str) -> list[list[str]]:
    """`basic_english` by regular expressions, then sentences token by token."""
    text = text.lower()
    for pattern, replacement in [
        (r"\'", " '  "), (r"\"", ""), (r"\.", " . "), (r"<br \/>", " "), (r",", " , "), (r"\(", " ( "), (r"\)", " ) "),
        (r"\!", " ! "), (r"\?", " ? "), (r"\;", " "), (r"\:", " "), (r"\s+", " "),
    ]:  # fmt: skip
        text = re.sub(pattern, replacement, text)
    sentences: list[list[str]] = []
    current: list[str] = []
    for token in text.split():
        current.append(token)
        if token in (".", "!", "?"):
            if len(current) > 1:
                sentences.append(current)
            current = []
    return sentences


def bernoulli(p: float) -> bool:
    """One draw, as the reference makes it."""
    return bool(torch.distributions.Bernoulli(torch.tensor([p])).sample().item())


def reference_mask(sentence: list[str], words: list[str]) -> tuple[list[str], list[str]]:
    """A draw for every token, and two more for a chosen one."""
    tokens, labels = [], []
    for word in sentence:
        if not bernoulli(0.15):
            tokens.append(word)
            labels.append("[PAD]")
            continue
        labels.append(word)
        tokens.append("[MASK]" if bernoulli(0.8) else random.choice(words) if bernoulli(0.5) else word)
    return tokens, labels


# Memory and time by size


def measure_sizes(texts: list[str], work: Path) -> list[dict[str, float]]:
    """JSON Lines of each size to CSV; the largest has every review twice, the second time with a word more."""
    shuffled = random.Random(0).sample(texts, len(texts))
    for size in SIZES:
        with (work / f"{size}.jsonl").open("w") as file:
            for text in [*shuffled, *(f"{text} again" for text in shuffled)][:size]:
                file.write(json.dumps({"text": text}) + "\n")
    found = []
    print("\nBy size, JSON Lines to CSV")
    for size in SIZES:
        seconds, peak = run_prepare("--corpus=jsonl", f"--source={work / f'{size}.jsonl'}", f"--out={work / 'sized'}")
        found.append({"documents": size, "seconds": seconds, "peak_gib": peak})
        print(f"  {size:>7,} documents {seconds:7.1f} s {size / seconds:8,.0f} documents/s   peak {peak:.2f} GiB")
    few = [run for run in found if run["documents"] <= 50_000]
    exponent = np.polyfit([math.log(run["documents"]) for run in few], [math.log(run["seconds"]) for run in few], 1)[0]
    each, fixed = np.polyfit([run["documents"] for run in found], [run["seconds"] for run in found], 1)
    once, twice = found[-2]["peak_gib"], found[-1]["peak_gib"]
    print(
        f"  time grows as size to the power of {exponent:.2f} (5,000 to 50,000): {fixed:.1f} s to start and {each * 1000:.3f} ms a document"
    )
    print(f"  twice the corpus takes {twice / once:.2f} times the memory")
    return [
        *found,
        {
            "exponent": float(exponent),
            "fixed_seconds": float(fixed),
            "seconds_a_document": float(each),
            "memory_of_twice_the_corpus": twice / once,
        },
    ]


# Loading


def measure_loading(archive: str, work: Path, repeat: int) -> dict[str, float]:
    """Pairs/s of each way to make batches, and of training."""
    run_prepare(
        "--corpus=imdb",
        f"--source={archive}",
        f"--out={work / 'short'}",
        f"--max-positions={POSITIONS}",
        "--shard-mb=1000",
    )
    dataset = open_dataset(work / "short")
    train, vocab = dataset.examples("train"), dataset.tokenizer.size
    static, dynamic = Loader(train, BATCH, 0), Loader(train, BATCH, 0, masking=DynamicMasking(vocab, 0))
    ways: dict[str, tuple[Callable[[], Iterator[Any]], int]] = {
        "ours, static masks": (lambda: static.epoch(1), 400),
        "ours, dynamic masks": (lambda: dynamic.epoch(1), 400),
        "reference": (reference_loader(dataset), 4),
        "datasets + collator": (hugging_face_loader(dataset), 8),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for name in ("train baby", "train tiny"):
        rates[name] = []
    for _ in range(repeat):
        for name, (make, batches) in ways.items():
            iterator = make()
            next(iterator)  # the epoch's order is drawn, files are open: what is timed is the flow
            rates[name].append(
                batches
                * BATCH
                / timed(lambda iterator=iterator, batches=batches: [None for _ in islice(iterator, batches)])
            )  # type: ignore[misc]
        for preset, steps in (("baby", 3), ("tiny", 6)):
            rates[f"train {preset}"].append(training_rate(dataset, preset, steps))
    found = {name: statistics.median(values) for name, values in rates.items()}
    ours = min(found["ours, static masks"], found["ours, dynamic masks"])
    found["times_reference"] = ours / found["reference"]
    found["times_training"] = ours / max(found["train baby"], found["train tiny"])
    print(f"\nLoading, batches of {BATCH} pairs of at most {POSITIONS} positions, second epoch")
    for name in rates:
        print(
            f"  {name:<22}{found[name]:>12,.0f} pairs/s   ours (dynamic) has {found['ours, dynamic masks'] / found[name]:8.1f} times that"
        )
    return found


class ReferenceDataset(TorchDataset):
    """A row at a time, in spirit: `iloc`, JSON, and the text tokenized again at every access."""

    def __init__(self, frame: pd.DataFrame, tokenizer: Any) -> None:
        self.frame, self.tokenizer = frame, tokenizer

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.frame.iloc[index]
        item = {name: torch.tensor(json.loads(row[name])) for name in ("bert_input", "bert_label", "segment_label")}
        encoded = self.tokenizer(
            row["text"], max_length=POSITIONS, padding="max_length", truncation=True, return_tensors="pt"
        )
        return {
            **item,
            "is_next": torch.tensor(row["is_next"]),
            "input_ids": encoded["input_ids"].squeeze(0),
            "attention_mask": encoded["attention_mask"].squeeze(0),
        }


def reference_loader(dataset: Dataset) -> Callable[[], Iterator[Any]]:
    """Over 20,000 rows, which is faster for pandas than all of them."""
    (path,) = dataset.shards("train")
    frame = pd.read_csv(path, nrows=20_000)
    tokens = [dataset.tokenizer.token(i) for i in range(dataset.tokenizer.size)]
    frame["text"] = [" ".join(tokens[i] for i in json.loads(cell)) for cell in frame["bert_input"]]

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            name: pad([row[name] for row in rows], batch_first=True)
            if rows[0][name].dim()
            else torch.stack([row[name] for row in rows])
            for name in rows[0]
        }

    rows = ReferenceDataset(frame, library_tokenizer(dataset.tokenizer))
    return lambda: iter(DataLoader(rows, BATCH, shuffle=True, collate_fn=collate))


def hugging_face_loader(dataset: Dataset) -> Callable[[], Iterator[Any]]:
    """`datasets` holds the pairs, the collator pads and masks anew."""
    import datasets
    from transformers import DataCollatorForLanguageModeling

    train = dataset.examples("train").first(50_000)
    ids, segments = (
        np.split(train.original_ids(), train.offsets[1:-1]),
        np.split(np.asarray(train.segments), train.offsets[1:-1]),
    )
    table = datasets.Dataset.from_dict(
        {"input_ids": ids, "token_type_ids": segments, "next_sentence_label": train.is_next.tolist()}
    )
    collator = DataCollatorForLanguageModeling(library_tokenizer(dataset.tokenizer), mlm_probability=0.15)
    return lambda: iter(DataLoader(table, BATCH, shuffle=True, collate_fn=collator))


def library_tokenizer(tokenizer: Tokenizer) -> Any:
    """Ours, as `transformers` wants it."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as name:
        tokenizer.save(Path(name) / "tokenizer.json")
        special = {
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
            "unk_token": "[UNK]",
        }
        return PreTrainedTokenizerFast(tokenizer_file=str(Path(name) / "tokenizer.json"), **special)


def training_rate(dataset: Dataset, preset: str, steps: int) -> float:
    """Pairs/s of whole steps, batches included."""
    with tempfile.TemporaryDirectory() as name:
        config = PretrainConfig(
            data=dataset.folder, out=Path(name), preset=preset, batch_size=BATCH, device="cpu", metrics=False
        )
        bert = load_or_create(config, dataset, dataset.token_counts(), None)
    model, optimizer = PretrainingModel(bert), make_optimizer(bert, config)
    batches = Loader(dataset.examples("train"), BATCH, 0).epoch(0)

    def take(steps: int) -> None:
        for batch in islice(batches, steps):
            optimizer.zero_grad()
            LossSums.of(model(*batch)).loss.backward()
            torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
            optimizer.step()

    take(1)
    return steps * BATCH / timed(lambda: take(steps))


if __name__ == "__main__":
    main()
