"""Pairs/s and memory of whole training steps at the reference's sizes, beside three peers on the same batches.

    python benchmarks/pretrain.py --data data/imdb       # four minutes on two cores; needs `pip install '.[bench]'`

(a) the reference's loop: logits at every position, eager, Adam; (b) Hugging Face's `BertForPreTraining` at the same
sizes with its own loss; (c) our model with the plain head: masked positions only; (d) ours. Data, forward, backward,
clipping and optimizer are in a step. The ways take turns, and medians are compared; memory is each way's own process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from babybert.config import PretrainConfig
from babybert.data.dataset import Dataset, open_dataset
from babybert.data.loader import Batch, Loader
from babybert.model.objectives import PretrainingModel
from babybert.training.parallel import Parallel, backward
from babybert.training.trainer import load_or_create, make_optimizer

WAYS = ("reference", "hugging face", "plain head", "ours")
POSITIONS = 64


def main() -> None:
    """Run everything, print the table, write JSON."""
    parser = argparse.ArgumentParser(description="Measure training steps.")
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5, help="rounds in which each way has its turn")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/pretrain.json"), help="where the figures go")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    dataset = open_dataset(options.data)
    if options.memory_of:
        batches = batches_of(dataset, options.batch_size)
        step = make(options.memory_of, dataset, options.data)
        for _ in range(3):
            step(next(batches))
        print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # noqa: SIM115, PTH123
        return
    found = measure(dataset, options)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(f"batch {options.batch_size} x at most {POSITIONS} positions, {torch.get_num_threads()} threads, medians of {options.repeat}")
    for way in WAYS:
        own = found[way]
        ratio = found["ours"]["pairs_per_second"] / own["pairs_per_second"]
        print(
            f"  {way:<14}{own['step_ms']:>9,.0f} ms a step{own['pairs_per_second']:>9,.1f} pairs/s   ours has {ratio:5.1f} times that   peak {own['peak_gib']:.2f} GiB"
        )


def measure(dataset: Dataset, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median step and pairs/s of each way, in turns; the peak of a process that does only that."""
    steps = {way: make(way, dataset, options.data) for way in WAYS}
    batches = batches_of(dataset, options.batch_size)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in steps.values():
        step(next(batches))
    for _ in range(options.repeat):
        batch = next(batches)
        for way, step in steps.items():
            begin = time.perf_counter()
            step(batch)
            times[way].append(time.perf_counter() - begin)
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, f"--data={options.data}", f"--batch-size={options.batch_size}", f"--memory-of={way}"]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        seconds = statistics.median(times[way])
        found[way] = {"step_ms": 1000 * seconds, "pairs_per_second": options.batch_size / seconds, "peak_gib": peak / 2**20}
    return found


def batches_of(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Batches cut to 64 positions."""
    for batch in Loader(dataset.examples("train"), batch_size, 0, bucketing=False).epoch(0):
        yield Batch(*(tensor[:, :POSITIONS] if tensor.dim() == 2 else tensor for tensor in batch))


def make(way: str, dataset: Dataset, data: Path) -> Callable[[Batch], Any]:
    """A function that takes one training step."""
    head = "plain" if way == "plain head" else "auto"
    config = PretrainConfig(data=data, preset="baby", device="cpu", metrics=False, mlm_head=head)  # type: ignore[arg-type]
    torch.manual_seed(0)
    if way == "hugging face":
        return hugging_face(dataset.tokenizer.size)
    bert = load_or_create(config, dataset, dataset.token_counts(), None)
    if way == "reference":
        return reference(bert)
    model, optimizer, parallel = PretrainingModel(bert, head), make_optimizer(bert, config), Parallel("single", torch.device("cpu"), bf16=False)

    def step(batch: Batch) -> None:
        backward(model, batch, parallel)
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def reference(bert: torch.nn.Module) -> Callable[[Batch], Any]:
    """Logits at every position, and the cross entropy told to ignore most of them."""
    optimizer = torch.optim.Adam(bert.parameters(), lr=5e-5, weight_decay=0.01)
    mlm, nsp = torch.nn.CrossEntropyLoss(ignore_index=0), torch.nn.CrossEntropyLoss()

    def step(batch: Batch) -> None:
        hidden = bert(batch.ids_BT, batch.segments_BT)
        logits = bert.mlm_logits(hidden)  # type: ignore[operator]
        loss = mlm(logits.view(-1, logits.shape[-1]), batch.labels_BT.reshape(-1)) + nsp(bert.nsp_logits(hidden), batch.is_next_B)  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        optimizer.step()

    return step


def hugging_face(vocab_size: int) -> Callable[[Batch], Any]:
    """`BertForPreTraining` of width 10, with its own loss."""
    from transformers import BertConfig, BertForPreTraining

    sizes: dict[str, Any] = {"hidden_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2048, "type_vocab_size": 3}
    model = BertForPreTraining(BertConfig(vocab_size=vocab_size, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

    def step(batch: Batch) -> None:
        labels = torch.where(batch.labels_BT > 0, batch.labels_BT, -100)
        inputs = {"input_ids": batch.ids_BT, "token_type_ids": batch.segments_BT, "attention_mask": (batch.ids_BT > 0).long()}
        loss = model(**inputs, labels=labels, next_sentence_label=1 - batch.is_next_B).loss  # its 0 is our 1
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
