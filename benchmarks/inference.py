"""Speed of evaluation and of a request in fp32 and bf16, and how far their scores are apart.

    python benchmarks/inference.py --data data/imdb-wordpiece                         # untrained models: speed
    python benchmarks/inference.py --data data/imdb-wordpiece --checkpoint runs/small # one model, with its scores

Both precisions take turns in one process, and medians are compared. A request is the encoder for some texts of 16 or 48
tokens, with the weights cast beforehand; the server runs it in fp32.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CPU, seconds_of, write_json

from babybert.checkpoint.format import find_checkpoint, load_model
from babybert.config import model_config
from babybert.data.dataset import open_dataset
from babybert.data.table import Examples
from babybert.evaluation.predictions import predict
from babybert.model.bert import BabyBert, keep_bf16_weights

PRESETS = ("mini", "small", "medium")
TEXTS, LENGTHS = (1, 2, 4, 8, 16, 32), (16, 48)  # texts of a request, and tokens of the longest


def main() -> None:
    """Print both tables of each model, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb-wordpiece"), help="prepared data, WordPiece")
    parser.add_argument("--checkpoint", type=Path, help="a run or a checkpoint; without it, untrained presets")
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--pairs", type=int, default=2048, help="held-out pairs")
    parser.add_argument("--repeat", type=int, default=5, help="turns of each precision")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for inference.json")
    options = parser.parse_args()
    dataset = open_dataset(options.data)
    examples = dataset.examples("validation").first(options.pairs)
    print(f"{torch.get_num_threads()} threads; medians of {options.repeat}")
    results: dict[str, Any] = {}
    if options.checkpoint:
        bert, _ = load_model(find_checkpoint(options.checkpoint))
        results[str(options.checkpoint)] = measure(str(options.checkpoint), bert, examples, options.repeat)
    else:
        for preset in options.presets:
            torch.manual_seed(0)
            bert = BabyBert(model_config(preset, dataset.tokenizer.size))
            results[preset] = measure(preset, bert, examples, options.repeat)
    print(f"written: {write_json(options.out / 'inference.json', results)}")


def measure(name: str, bert: BabyBert, examples: Examples, repeat: int) -> dict[str, Any]:
    """Pairs/s of an evaluation, the difference of its scores, and milliseconds of requests, in both precisions."""
    bert.eval()
    few = examples.first(64)
    works = {precision: partial(predict, bert, examples, 64, CPU, token_losses=True, bf16=precision == "bf16")
             for precision in ("fp32", "bf16")}  # fmt: skip
    predict(bert, few, 64, CPU, token_losses=True, bf16=True)  # compiles
    times: dict[str, list[float]] = {precision: [] for precision in works}
    for _ in range(repeat):
        for precision, work in works.items():
            times[precision].append(seconds_of(work))
    seconds = {precision: statistics.median(of_turns) for precision, of_turns in times.items()}
    rates = {precision: len(examples) / of_all for precision, of_all in seconds.items()}
    print(f"\n{name}: evaluate {rates['fp32']:,.0f} pairs/s in fp32, {rates['bf16']:,.0f} in bf16, ", end="")
    print(f"{rates['bf16'] / rates['fp32']:.2f} times as many")
    differences = _differences(examples, works)
    print("  " + ", ".join(f"{score} {value:.5f}" for score, value in differences.items()))
    requests = []
    for length in LENGTHS:
        for texts in TEXTS:
            ms = _request_ms(bert, texts, length, repeat)
            requests.append({"texts": texts, "tokens": length, **ms})
            ratio = ms["fp32"] / ms["bf16"]
            print(f"  {texts:>3} texts of {length}: {ms['fp32']:>8.2f} ms, {ms['bf16']:>8.2f} in bf16{ratio:>7.2f} x")
    return {"pairs_per_second": rates, "scores": differences, "requests": requests}


def _differences(examples: Examples, works: dict[str, Any]) -> dict[str, float]:
    """Scores in both precisions, and how often the likeliest token and label are the same."""
    exact, fast = works["fp32"](), works["bf16"]()
    is_right = [predictions.nsp_logits_P2.argmax(1) == examples.is_next for predictions in (exact, fast)]
    return {
        "MLM loss in fp32": float(exact.loss_N.mean()),
        "in bf16": float(fast.loss_N.mean()),
        "mean difference of a token's loss": float(np.abs(fast.loss_N - exact.loss_N).mean()),
        "top-1 in fp32": float((exact.rank_N == 0).mean()),
        "top-1 in bf16": float((fast.rank_N == 0).mean()),
        "agreement on whether top-1 is right": float(((exact.rank_N == 0) == (fast.rank_N == 0)).mean()),
        "NSP accuracy in fp32": float(is_right[0].mean()),
        "NSP accuracy in bf16": float(is_right[1].mean()),
    }


def _request_ms(bert: BabyBert, texts: int, length: int, repeat: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(5, bert.config.vocab_size, (texts, length), generator=generator)
    for row in range(1, texts):
        ids_BT[row, int(torch.randint(length // 2, length, (), generator=generator)) :] = 0
    segments_BT, query_B = (ids_BT > 0).long(), torch.arange(texts) * length + 2
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with torch.inference_mode(), keep_bf16_weights(bert):
        for turn in range(repeat + 1):
            for precision, of_turns in times.items():
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    seconds = seconds_of(lambda: [bert.hidden_at(ids_BT, segments_BT, query_B) for _ in range(4)])
                if turn:
                    of_turns.append(1000 * seconds / 4)
    return {precision: statistics.median(of_turns) for precision, of_turns in times.items()}


if __name__ == "__main__":
    main()
