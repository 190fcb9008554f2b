"""Who learns how much in the same time: the reference, Hugging Face's Trainer, and ours, on the same reviews and held-out pairs.

    python benchmarks/learning.py --data data/imdb --wordpiece data/imdb-wordpiece       # 25 minutes on two cores

One after the other, each for so many minutes of training; measuring stops its clock. The learning rate of each is fitted to that time:
10 % warm-up, then down to zero. Prints every look, a table, and the first look at which ours was ahead for good; writes JSON and a chart.

`mini` reads pieces of words: another vocabulary, so its loss is not that of the others. What compares is how far each is below the
word (or piece) counts of its own tokens, on pairs of the same held-out documents.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learn import CPU, Clock, Curve, learn, point, run, settings, some_pairs
from ways import hugging_face, hugging_face_inputs, reference

from babybert.data.dataset import Dataset, open_dataset
from babybert.data.loader import Batch, collate, ordered_batches
from babybert.data.table import Examples
from babybert.evaluation.scores import Scores, baseline_scores, evaluate_held_out
from babybert.figures import open_pyplot, save_figure
from babybert.model.loss import nsp_loss
from babybert.training.distributed import DistributedContext
from babybert.training.train import load_or_create, make_loader

COLOURS = {
    "reference": "tab:gray",
    "hugging face": "tab:orange",
    "hugging face, tuned": "tab:red",
    "default": "tab:blue",
    "mini": "tab:green",
}


def main() -> None:
    """Train all, one after the other; print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument(
        "--wordpiece",
        type=Path,
        default=Path("data/imdb-wordpiece"),
        help="the same, prepared with --tokenizer-kind wordpiece",
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of each")
    parser.add_argument(
        "--looks",
        type=int,
        default=10,
        help="how often each is measured; more at the beginning of a time would need shorter steps",
    )
    parser.add_argument("--pairs", type=int, default=2000, help="held-out pairs to measure on")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmarks/learning"),
        help="the JSON's and the picture's name, without an ending",
    )
    options = parser.parse_args()
    words, pieces = open_dataset(options.data), open_dataset(options.wordpiece)
    curves = {
        "default": ours("default", words, options, preset="baby"),
        "reference": reference_loop(words, options),
        "hugging face": trainer("hugging face", words, options, batch_size=8, lr=5e-5),
        "hugging face, tuned": trainer("hugging face, tuned", words, options, batch_size=32, lr=1e-3),
        "mini": ours("mini", pieces, options, preset="mini"),
    }
    table(curves)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(curves, indent=2) + "\n")
    print("written:", *draw(curves, options.out), options.out.with_suffix(".json"))


def ours(name: str, dataset: Dataset, options: argparse.Namespace, **given: Any) -> Curve:
    """What `babybert pretrain --preset ...` does."""
    config = settings(dataset.folder, **given)
    return learn(config, dataset, some_pairs(dataset, options.pairs), 60 * options.minutes, options.looks, name)[1]


def reference_loop(dataset: Dataset, options: argparse.Namespace) -> Curve:
    """The reference's recipe in its own loop: logits at every position, batches of six."""
    config = settings(dataset.folder, recipe="reference")
    torch.manual_seed(config.seed)
    counts_V, held_out = dataset.token_counts(), some_pairs(dataset, options.pairs)
    bert = load_or_create(config, dataset, counts_V, None).set_kernels("plain")
    take, optimizer = reference(bert)

    def step(batch: Batch, number: int, clock: Clock) -> None:
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(config)
        DistributedContext("single", CPU, bf16=False).seed_step(config.seed, number)
        take(batch)

    loader = make_loader(config, dataset.examples("train"), dataset.tokenizer.size, CPU)
    clock = Clock(60 * options.minutes, options.looks)
    return run(
        step,
        loader.epoch,
        lambda: evaluate_held_out(bert, held_out, counts_V, 64, CPU),
        clock,
        config.batch_size,
        "reference",
    )


def trainer(name: str, dataset: Dataset, options: argparse.Namespace, batch_size: int, lr: float) -> Curve:
    """Hugging Face's model of the same sizes, trained by its own Trainer with AdamW."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    model = hugging_face(dataset.tokenizer.size, "baby")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    curve: Curve = []
    clock = Clock(60 * options.minutes, options.looks)
    config = settings(dataset.folder, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: clock.rate(config) / lr)
    train, held_out, counts_V = dataset.examples("train"), some_pairs(dataset, options.pairs), dataset.token_counts()

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            curve.append(point(_score(model, held_out, counts_V), 0.0, 0, name))
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if clock.due(len(curve) - 1):
                clock.stop()
                curve.append(
                    point(_score(model, held_out, counts_V), clock.trained, state.global_step * batch_size, name)
                )
                control.should_training_stop = clock.trained >= clock.budget
                clock.start()

    arguments = TrainingArguments(
        output_dir=str(options.out.parent / "trainer"),
        per_device_train_batch_size=batch_size,
        max_steps=10**6,
        max_grad_norm=1.0,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=0,
    )
    rows: Any = list(range(len(train)))
    Trainer(
        model,
        arguments,
        lambda chosen: _inputs(train, chosen),
        rows,
        optimizers=(optimizer, schedule),
        callbacks=[Look()],
    ).train()
    return curve


def _inputs(examples: Examples, chosen: list[int]) -> dict[str, torch.Tensor]:
    batch = collate(examples, np.array(chosen))
    return hugging_face_inputs(batch)


@torch.inference_mode()
def _score(model: Any, held_out: Examples, counts_V: np.ndarray) -> Scores:
    """As `evaluate_held_out`: logits at the masked positions alone."""
    model.eval()
    mlm_sum = nsp_sum = right = 0.0
    ranks = []
    for batch in ordered_batches(held_out, 64):
        inputs = hugging_face_inputs(batch)
        hidden_BTD, pooled_BD = model.bert(
            **{name: inputs[name] for name in ("input_ids", "token_type_ids", "attention_mask")}, return_dict=False
        )
        chosen_BT = batch.labels_BT > 0
        target_N, logits_NV = batch.labels_BT[chosen_BT], model.cls.predictions(hidden_BTD[chosen_BT])
        own_N = logits_NV.gather(1, target_N[:, None])
        mlm_sum += float((logits_NV.logsumexp(1) - own_N[:, 0]).sum())
        ranks.append((logits_NV > own_N).sum(1))
        nsp_B2 = model.cls.seq_relationship(pooled_BD).flip(1)  # its 0 is our 1
        nsp_sum += float(nsp_loss(nsp_B2, batch.is_next_B))
        right += float((nsp_B2.argmax(1) == batch.is_next_B).sum())
    model.train()
    rank_N = torch.cat(ranks).double()
    return Scores(
        pairs=len(held_out),
        masked_tokens=len(rank_N),
        mlm_loss=mlm_sum / len(rank_N),
        mlm_top1=float((rank_N < 1).double().mean()),
        mlm_top5=float((rank_N < 5).double().mean()),
        mlm_reciprocal_rank=float((1 / (1 + rank_N)).mean()),
        nsp_loss=nsp_sum / len(held_out),
        nsp_accuracy=right / len(held_out),
        **baseline_scores(held_out, counts_V),
    )


def table(curves: dict[str, Curve]) -> None:
    """The last look of each, and from when on the default was ahead of each of the others."""
    print(
        "\n| | pairs | pairs/s | MLM loss | below its word counts | top-1 | NSP loss | NSP accuracy |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for name, curve in curves.items():
        at = curve[-1]
        gain = at["mlm_unigram_loss"] - at["mlm_loss"]
        row = f"{at['seen']:,} | {at['seen'] / at['seconds']:,.0f} | {at['mlm_loss']:.3f} | {gain:+.3f} | {at['mlm_top1']:.1%} | {at['nsp_loss']:.4f}"
        print(f"| {name} | {row} | {at['nsp_accuracy']:.1%} |")
    for name, curve in curves.items():
        if name not in ("default", "mini"):
            ahead = [own["mlm_loss"] < other["mlm_loss"] for own, other in zip(curves["default"], curve, strict=True)]
            print(f"default ahead of {name} in {sum(ahead[1:])} of {len(ahead) - 1} looks")


def draw(curves: dict[str, Curve], out: Path) -> list[Path]:
    """Held-out loss less that of word counts, and NSP accuracy, by time and by pairs."""
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for column, (axis, label) in enumerate((("seconds", "seconds of training"), ("seen", "pairs seen"))):
        for name, curve in curves.items():
            seen = curve if axis == "seconds" else curve[1:]
            x = [at[axis] for at in seen]
            axes[0, column].plot(
                x, [at["mlm_loss"] - at["mlm_unigram_loss"] for at in seen], ".-", color=COLOURS[name], label=name
            )
            axes[1, column].plot(x, [at["nsp_accuracy"] for at in seen], ".-", color=COLOURS[name], label=name)
        axes[0, column].axhline(0, color="black", linestyle="--", linewidth=1)
        axes[0, column].set_yscale("symlog", linthresh=0.5)
        axes[0, column].set(
            ylabel="MLM loss less that of word counts, nats", xlabel=label, title="masked words, held out"
        )
        axes[1, column].axhline(curves["default"][0]["nsp_chance_accuracy"], color="black", linestyle="--", linewidth=1)
        axes[1, column].set(ylabel="NSP accuracy", xlabel=label, title="next sentence, held out")
        if axis == "seen":
            for row in (0, 1):
                axes[row, column].set_xscale("log")
    axes[0, 0].legend(fontsize="small")
    return save_figure(pyplot, figure, out)


if __name__ == "__main__":
    main()
