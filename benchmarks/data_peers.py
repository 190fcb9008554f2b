"""What data.py compares with: the reference's data preparation and `Dataset`, and Hugging Face's `datasets`.

The reference's code is rewritten in its spirit: the same work for each token and row, without its notebook around it.
"""

import csv
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from babybert.data.dataset import Dataset
from babybert.data.tokenizer import SPECIAL_TOKENS, Tokenizer

Row = dict[str, torch.Tensor]
MakeIterator = Callable[[], Iterator[Any]]


def reference_prepare(texts: list[str], path: Path) -> None:
    """Prepare as the reference does: tokens one by one in Python, one Bernoulli draw for each, A and B padded alike."""
    documents = [reference_sentences(text) for text in texts]
    vocabulary = Counter(word for sentences in documents for sentence in sentences for word in sentence)
    words = list(vocabulary)
    ids = {token: id_ for id_, token in enumerate([*SPECIAL_TOKENS, *words])}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Original Text", "BERT Input", "BERT Label", "Segment Label", "Is Next"])
        for sentences in documents:
            for i in range(0, len(sentences) - 1, 2):
                follows = bernoulli(0.5)
                if follows:
                    second = sentences[i + 1]
                else:
                    second = random.choice(random.choice([document for document in documents if document]))
                row = reference_row(sentences[i], second, words, ids)
                writer.writerow([" ".join(sentences[i] + second), *row, int(follows)])


def reference_row(first: list[str], second: list[str], words: list[str], ids: dict[str, int]) -> list[str]:
    """Input ids, label ids and segments of a pair, each padded to the longer sentence in the middle and at the end."""
    a, a_labels = reference_mask(first, words)
    b, b_labels = reference_mask(second, words)
    longest = max(len(a), len(b))
    a_padding, b_padding = longest - len(a), longest - len(b)
    tokens = ["[CLS]", *a, "[SEP]", *["[PAD]"] * a_padding, *b, "[SEP]", *["[PAD]"] * b_padding]
    labels = ["[PAD]", *a_labels, "[PAD]", *["[PAD]"] * a_padding, *b_labels, "[PAD]", *["[PAD]"] * b_padding]
    segments = [1] * (len(a) + 2) + [0] * a_padding + [2] * (len(b) + 1) + [0] * b_padding
    return [
        json.dumps([ids[token] for token in tokens]),
        json.dumps([ids[token] for token in labels]),
        ",".join(map(str, segments)),
    ]


def reference_sentences(text: str) -> list[list[str]]:
    """Tokenize with `basic_english`'s regular expressions, then split into sentences token by token."""
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
    """One draw, in the way of the reference."""
    return bool(torch.distributions.Bernoulli(torch.tensor([p])).sample().item())


def reference_mask(sentence: list[str], words: list[str]) -> tuple[list[str], list[str]]:
    """Tokens and labels: one draw for every token, and two more for a chosen one."""
    tokens, labels = [], []
    for word in sentence:
        if not bernoulli(0.15):
            tokens.append(word)
            labels.append("[PAD]")
            continue
        labels.append(word)
        if bernoulli(0.8):
            tokens.append("[MASK]")
        else:
            tokens.append(random.choice(words) if bernoulli(0.5) else word)
    return tokens, labels


class ReferenceDataset(TorchDataset[Row]):
    """One row at a time, as in the reference: `iloc`, JSON, and the text tokenized again at every access."""

    def __init__(self, frame: pd.DataFrame, tokenizer: Any, positions: int) -> None:
        self.frame = frame
        self.tokenizer = tokenizer
        self.positions = positions

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> Row:
        row = self.frame.iloc[index]
        item = {name: torch.tensor(json.loads(row[name])) for name in ("bert_input", "bert_label", "segment_label")}
        encoded = self.tokenizer(
            row["text"], max_length=self.positions, padding="max_length", truncation=True, return_tensors="pt"
        )
        return {
            **item,
            "is_next": torch.tensor(row["is_next"]),
            "input_ids": encoded["input_ids"].squeeze(0),
            "attention_mask": encoded["attention_mask"].squeeze(0),
        }


def reference_loader(dataset: Dataset, batch_size: int, positions: int) -> MakeIterator:
    """The reference's loader over 20,000 rows, which is faster for pandas than all of them."""
    (path,) = dataset.shards("train")
    frame = pd.read_csv(path, nrows=20_000)
    tokens = dataset.tokenizer.tokens(range(dataset.tokenizer.size))
    frame["text"] = [" ".join(tokens[id_] for id_ in json.loads(cell)) for cell in frame["bert_input"]]
    rows = ReferenceDataset(frame, _transformers_tokenizer(dataset.tokenizer), positions)
    return lambda: iter(DataLoader(rows, batch_size, shuffle=True, collate_fn=_pad_rows))


def _pad_rows(rows: list[Row]) -> Row:
    batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True) if first.dim() else torch.stack(values)
    return batch


def hugging_face_loader(dataset: Dataset, batch_size: int) -> MakeIterator:
    """`datasets` holds the pairs; the collator pads them and draws new masks."""
    import datasets
    from transformers import DataCollatorForLanguageModeling

    train = dataset.examples("train").first(50_000)
    table = datasets.Dataset.from_dict(
        {
            "input_ids": np.split(train.original_ids(), train.offsets[1:-1]),
            "token_type_ids": np.split(np.asarray(train.segments), train.offsets[1:-1]),
            "next_sentence_label": train.is_next.tolist(),
        }
    )
    collator = DataCollatorForLanguageModeling(_transformers_tokenizer(dataset.tokenizer), mlm_probability=0.15)
    return lambda: iter(DataLoader(table, batch_size, shuffle=True, collate_fn=collator))


def _transformers_tokenizer(tokenizer: Tokenizer) -> Any:
    """Our tokenizer as a tokenizer of `transformers`."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "tokenizer.json"
        tokenizer.save(path)
        return PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            mask_token="[MASK]",
            unk_token="[UNK]",
        )
