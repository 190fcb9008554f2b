"""Held-out loss after equal training time: the reference, Hugging Face's Trainer, and ours, on the same reviews.

    python benchmarks/learning.py --data data/imdb --wordpiece data/imdb-wordpiece       # 25 minutes on two cores
    python benchmarks/learning.py --preset small --wordpiece data/imdb-runs --minutes 10  # 30 minutes

The models train one after the other, each for the same number of minutes. The clock stops during evaluation. Each
learning rate schedule is fitted to that time: 10 % warm-up, then a linear decay to zero. Prints every evaluation and
two tables, and writes JSON and a figure.

`mini` uses WordPiece, which is a different vocabulary. Its loss cannot be compared with the others. What can be
compared is how far each model is below the unigram baseline of its own tokens. The held-out pairs come from the same
documents.

With `--preset small` or `medium` the models are ours, the same network in a plain loop (PyTorch's operations, AdamW,
cosine decay: nanoGPT's settings), and Hugging Face's BERT of the same sizes. All of them use WordPiece, and bf16 where
the processor has it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CPU, new_model, recipe_config, seed_step, training_loader, write_json
from step_variants import hugging_face_inputs, hugging_face_model, reference_step
from timed_training import Clock, Curve, curve_point, evaluator, first_held_out, run_steps, train_for

from babybert.data.dataset import Dataset, open_dataset
from babybert.data.loader import Batch, collate, ordered_batches
from babybert.data.table import Examples
from babybert.evaluation.scores import Scores, baseline_scores
from babybert.figures import open_pyplot, save_figure
from babybert.model.device import has_fast_bf16
from babybert.model.loss import nsp_loss

COLORS = {
    "reference": "tab:gray",
    "hugging face": "tab:orange",
    "hugging face, tuned": "tab:red",
    "default": "tab:blue",
    "mini": "tab:green",
    "plain": "tab:purple",
}
PLAIN_LOOP: dict[str, Any] = {"kernels": "plain", "optimizer": "adamw", "lr": 1e-3, "schedule": "cosine"}


def main() -> None:
    """Train all models one after the other; print tables, write JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument(
        "--wordpiece",
        type=Path,
        default=Path("data/imdb-wordpiece"),
        help="the same, prepared with --tokenizer-kind wordpiece",
    )
    parser.add_argument("--preset", choices=("baby", "small", "medium"), default="baby", help="sizes to compare at")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of each model")
    parser.add_argument("--looks", type=int, default=10, help="evaluations of each model, evenly spread over the time")
    parser.add_argument("--pairs", type=int, default=2000, help="held-out pairs to score on")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmarks/learning"),
        help="path of the JSON and the figure, no extension",
    )
    options = parser.parse_args()
    curves = train_small_models(options) if options.preset == "baby" else train_wide_models(options)
    print_tables(curves)
    json_path = write_json(options.out.with_suffix(".json"), curves)
    print("written:", *draw(curves, options.out), json_path)


def train_small_models(options: argparse.Namespace) -> dict[str, Curve]:
    """`baby` and `mini`, the reference, and Hugging Face's model of `baby`'s sizes."""
    words, pieces = open_dataset(options.data), open_dataset(options.wordpiece)
    return {
        "default": train_ours("default", words, options, preset="baby"),
        "reference": train_reference(words, options),
        "hugging face": train_hugging_face("hugging face", words, options, batch_size=8, lr=5e-5),
        "hugging face, tuned": train_hugging_face("hugging face, tuned", words, options, batch_size=32, lr=1e-3),
        "mini": train_ours("mini", pieces, options, preset="mini"),
    }


def train_wide_models(options: argparse.Namespace) -> dict[str, Curve]:
    """A wide preset, the same network in a plain loop, and Hugging Face's model of its sizes."""
    pieces, preset = open_dataset(options.wordpiece), options.preset
    name, lr = "hugging face, tuned", 5e-4
    return {
        "default": train_ours("default", pieces, options, preset=preset),
        "plain": train_ours("plain", pieces, options, preset=preset, **PLAIN_LOOP),
        name: train_hugging_face(name, pieces, options, batch_size=32, lr=lr),
    }


def new_clock(options: argparse.Namespace) -> Clock:
    """The time of one training."""
    return Clock(60 * options.minutes, options.looks)


def train_ours(name: str, dataset: Dataset, options: argparse.Namespace, **settings: Any) -> Curve:
    """The training of `babybert pretrain` with these settings."""
    config = recipe_config(dataset.folder, **settings)
    return train_for(config, dataset, first_held_out(dataset, options.pairs), new_clock(options), name)[1]


def train_reference(dataset: Dataset, options: argparse.Namespace) -> Curve:
    """The reference's recipe in its own loop: logits at every position, batches of six."""
    config = recipe_config(dataset.folder, recipe="reference")
    torch.manual_seed(config.seed)
    bert = new_model(config, dataset).set_kernels("plain")
    train_step, optimizer = reference_step(bert)
    clock = new_clock(options)

    def step(batch: Batch, step_number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = clock.lr(config)
        seed_step(config.seed, step_number)
        train_step(batch)

    evaluate_model = evaluator(bert, dataset, first_held_out(dataset, options.pairs))
    batches = training_loader(config, dataset)
    return run_steps(step, batches.epoch, evaluate_model, clock, "reference")


def train_hugging_face(name: str, dataset: Dataset, options: argparse.Namespace, batch_size: int, lr: float) -> Curve:
    """Hugging Face's model of the same sizes, trained by its Trainer with AdamW."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = hugging_face_model(dataset.tokenizer.size, options.preset)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    clock = new_clock(options)
    config = recipe_config(dataset.folder, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: clock.lr(config) / lr)
    train = dataset.examples("train")
    held_out = first_held_out(dataset, options.pairs)
    counts_V = dataset.token_counts()

    def new_point(seconds: float, seen: int) -> dict[str, Any]:
        return curve_point(_score(model, held_out, counts_V), seconds, seen, name)

    arguments = TrainingArguments(
        output_dir=str(options.out.parent / "trainer"),
        per_device_train_batch_size=batch_size,
        max_steps=10**6,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=options.preset != "baby" and has_fast_bf16(CPU),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=0,
    )
    curve: Curve = []
    rows: Any = list(range(len(train)))
    Trainer(
        model,
        arguments,
        lambda chosen: hugging_face_inputs(collate(train, np.array(chosen))),
        rows,
        optimizers=(optimizer, schedule),
        callbacks=[_evaluation_callback(clock, curve, new_point, batch_size)],
    ).train()
    return curve


def _evaluation_callback(
    clock: Clock, curve: Curve, new_point: Callable[[float, int], dict[str, Any]], batch_size: int
) -> Any:
    """A callback that appends `new_point(seconds, pairs)` to `curve` when an evaluation is due."""
    from transformers import TrainerCallback

    class EvaluationCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            curve.append(new_point(0.0, 0))
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if clock.evaluation_due(len(curve) - 1):
                clock.stop()
                curve.append(new_point(clock.seconds_before, state.global_step * batch_size))
                control.should_training_stop = len(curve) > clock.evaluations
                clock.start()

    return EvaluationCallback()


@torch.inference_mode()
def _score(model: Any, held_out: Examples, counts_V: np.ndarray) -> Scores:
    """The scores of Hugging Face's model, computed as `evaluate` does: logits at the masked positions only."""
    model.eval()
    mlm_sum = nsp_sum = nsp_correct = 0.0
    ranks = []
    for batch in ordered_batches(held_out, 64):
        inputs = hugging_face_inputs(batch)
        encoder_inputs = {name: inputs[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        hidden_BTD, pooled_BD = model.bert(**encoder_inputs, return_dict=False)
        masked_BT = batch.labels_BT > 0
        target_N = batch.labels_BT[masked_BT]
        logits_NV = model.cls.predictions(hidden_BTD[masked_BT])
        target_logits_N1 = logits_NV.gather(1, target_N[:, None])
        mlm_sum += float((logits_NV.logsumexp(1) - target_logits_N1[:, 0]).sum())
        ranks.append((logits_NV > target_logits_N1).sum(1))
        nsp_logits_B2 = model.cls.seq_relationship(pooled_BD).flip(1)  # Hugging Face uses 0 for "B follows A", we use 1
        nsp_sum += float(nsp_loss(nsp_logits_B2, batch.is_next_B))
        nsp_correct += float((nsp_logits_B2.argmax(1) == batch.is_next_B).sum())
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
        nsp_accuracy=nsp_correct / len(held_out),
        **baseline_scores(held_out, counts_V),
    )


def print_tables(curves: dict[str, Curve]) -> None:
    """The last evaluation of each model, and in how many evaluations the default has a lower loss than each peer."""
    header = ("", "pairs", "pairs/s", "MLM loss", "minus its unigram baseline", "top-1", "NSP loss", "NSP accuracy")
    print(f"\n| {' | '.join(header)} |")
    print(f"| --- | {' | '.join(['---:'] * (len(header) - 1))} |")
    for name, curve in curves.items():
        point = curve[-1]
        cells = (
            name,
            f"{point['seen']:,}",
            f"{point['seen'] / point['seconds']:,.0f}",
            f"{point['mlm_loss']:.3f}",
            f"{point['mlm_loss'] - point['mlm_unigram_loss']:+.3f}",
            f"{point['mlm_top1']:.1%}",
            f"{point['nsp_loss']:.4f}",
            f"{point['nsp_accuracy']:.1%}",
        )
        print(f"| {' | '.join(cells)} |")
    for name, curve in curves.items():
        if name not in ("default", "mini"):
            pairs_of_points = list(zip(curves["default"], curve, strict=True))[1:]
            ahead = sum(ours["mlm_loss"] < peer["mlm_loss"] for ours, peer in pairs_of_points)
            print(f"default ahead of {name} in {ahead} of {len(pairs_of_points)} evaluations")


def draw(curves: dict[str, Curve], out: Path) -> list[Path]:
    """Plot the held-out loss minus the unigram baseline, and NSP accuracy, by time and by pairs."""
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for (mlm_axis, nsp_axis), x, label in zip(
        axes.T, ("seconds", "seen"), ("seconds of training", "pairs seen"), strict=True
    ):
        for name, curve in curves.items():
            points = curve if x == "seconds" else curve[1:]  # 0 pairs cannot be shown on a logarithmic axis
            x_values = [point[x] for point in points]
            differences = [point["mlm_loss"] - point["mlm_unigram_loss"] for point in points]
            mlm_axis.plot(x_values, differences, ".-", color=COLORS[name], label=name)
            nsp_axis.plot(x_values, [point["nsp_accuracy"] for point in points], ".-", color=COLORS[name], label=name)
        mlm_axis.axhline(0, color="black", linestyle="--", linewidth=1)
        mlm_axis.set_yscale("symlog", linthresh=0.5)
        mlm_axis.set(ylabel="MLM loss minus unigram baseline, nats", xlabel=label, title="masked words, held out")
        nsp_axis.axhline(curves["default"][0]["nsp_chance_accuracy"], color="black", linestyle="--", linewidth=1)
        nsp_axis.set(ylabel="NSP accuracy", xlabel=label, title="next sentence, held out")
        if x == "seen":
            mlm_axis.set_xscale("log")
            nsp_axis.set_xscale("log")
    axes[0, 0].legend(fontsize="small")
    return save_figure(pyplot, figure, out)


if __name__ == "__main__":
    main()
