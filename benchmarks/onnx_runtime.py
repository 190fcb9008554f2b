"""Fill-mask in ONNX Runtime, fp32 and int8, beside the models of our server: sequences/s on one thread.

    python benchmarks/onnx_runtime.py

The networks are untrained; speed does not depend on the weights. Each request is a batch of texts with one mask each,
and the five likeliest tokens with their probabilities. All variants take turns, and medians are compared. "fp32" and
"int8" are what the server computes, int8 one text at a time; the exported graphs get the whole batch.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import seconds_of, write_json

from babybert.config import model_config
from babybert.export.onnx_graphs import PretrainedGraph, export_graph, quantize
from babybert.model.bert import BabyBert
from babybert.model.inference import InferenceModel
from babybert.serving.int8_encoder import INT8_ENCODER, Int8Encoder, write_int8_encoder

VOCABULARIES = {"baby": 147_161, "mini": 8_192, "small": 8_192, "medium": 8_192}
MASK_POSITION, TOP_K = 7, 5
BATCHES = (1, 8, 32)


def main() -> None:
    """Measure each preset; print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=VOCABULARIES, default=list(VOCABULARIES))
    parser.add_argument("--positions", type=int, default=32, help="tokens of each text")
    parser.add_argument("--repeat", type=int, default=15, help="turns of each variant")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/onnx_runtime.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| preset, batch | server fp32, sequences/s | server int8 | graph fp32 | graph int8 | server int8 / fp32 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for preset in options.presets:
        with tempfile.TemporaryDirectory() as folder:
            variants = make_variants(preset, options.positions, Path(folder))
            for batch in BATCHES:
                shape = (batch, options.positions)
                rows.append({"preset": preset, "batch": batch, **rates(variants, preset, shape, options.repeat)})
                figures = " | ".join(f"{rows[-1][name]:,.0f}" for name in variants)
                ratio = rows[-1]["server int8"] / rows[-1]["server fp32"]
                print(f"| {preset}, {batch} | {figures} | {ratio:.2f} |", flush=True)
    print(f"written: {write_json(options.out, rows)}")


def make_variants(preset: str, positions: int, folder: Path) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Functions from ids (B, T) to the likeliest tokens and their probabilities."""
    torch.manual_seed(0)
    model = BabyBert(model_config(preset, VOCABULARIES[preset])).eval().set_kernels("plain")
    export_graph(PretrainedGraph(model), folder / "fp32.onnx")
    quantize(folder / "fp32.onnx", folder / "int8.onnx")
    write_int8_encoder(model, folder)
    int8_encoder = Int8Encoder(folder / INT8_ENCODER, model)
    inference = InferenceModel(model, compiled=True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1

    def query(ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(ids_BT)) * positions + MASK_POSITION

    def in_server(hidden_at: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], Any]:
        @torch.inference_mode()
        def run(ids_BT: torch.Tensor) -> Any:
            hidden_MD = hidden_at(ids_BT, torch.ones_like(ids_BT), query(ids_BT))
            return inference.top_tokens(hidden_MD, TOP_K, [], [])

        return run

    def in_runtime(name: str) -> Callable[[torch.Tensor], Any]:
        session = onnxruntime.InferenceSession(folder / name, settings)

        def run(ids_BT: torch.Tensor) -> Any:
            inputs = (ids_BT, torch.zeros_like(ids_BT), query(ids_BT))
            feeds = {name: tensor.numpy() for name, tensor in zip(PretrainedGraph.inputs, inputs, strict=True)}
            (logits_MV,) = session.run(["mlm_logits"], feeds)
            best_MK = np.argpartition(logits_MV, -TOP_K)[:, -TOP_K:]
            largest_M1 = logits_MV.max(1, keepdims=True)
            total_M1 = np.exp(logits_MV - largest_M1).sum(1, keepdims=True)
            return np.exp(np.take_along_axis(logits_MV, best_MK, 1) - largest_M1) / total_M1

        return run

    return {
        "server fp32": in_server(model.hidden_at),
        "server int8": in_server(int8_encoder.hidden_at),
        "graph fp32": in_runtime("fp32.onnx"),
        "graph int8": in_runtime("int8.onnx"),
    }


def rates(
    variants: dict[str, Callable[[torch.Tensor], Any]], preset: str, shape: tuple[int, int], repeat: int
) -> dict[str, float]:
    """Sequences/s of each variant, from the median of its turns."""
    ids_BT = torch.randint(5, VOCABULARIES[preset], shape, generator=torch.Generator().manual_seed(0))
    batch = shape[0]
    calls = max(1, 16 // batch)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeat + 2):
        for name, variant in variants.items():
            seconds = sum(seconds_of(partial(variant, ids_BT)) for _ in range(calls))
            if turn >= 2:  # the first ones compile
                times[name].append(seconds)
    return {name: calls * batch / statistics.median(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
