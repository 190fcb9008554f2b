"""The fill-mask pipeline of `transformers`, as its users would serve it with TorchServe."""

import json
from typing import Any

import torch
from transformers import pipeline


class PipelineHandler:
    """The pipeline of one worker. TorchServe calls `initialize` once and `handle` for each batch."""

    def initialize(self, context: Any) -> None:
        """Load the model from the folder of the unpacked archive."""
        torch.set_num_threads(1)
        self.pipeline: Any = pipeline("fill-mask", context.system_properties["model_dir"], device="cpu")

    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[str]:
        """Answer all rows with one call; the pipeline answers a list of one text as it answers the text alone."""
        answers = self.pipeline([row["body"]["text"] for row in rows], top_k=5)
        if len(rows) == 1:
            answers = [answers]
        return [json.dumps(answer) for answer in answers]
