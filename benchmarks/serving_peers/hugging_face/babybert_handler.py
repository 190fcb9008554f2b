"""The fill-mask pipeline of `transformers`, as its users would put it behind TorchServe."""

import json

import torch
from transformers import pipeline


class Handler:
    """One worker's pipeline; TorchServe calls `initialize` once and `handle` for each batch."""

    def initialize(self, context):
        """Load the model that lies beside this file."""
        torch.set_num_threads(1)
        self.pipeline = pipeline("fill-mask", context.system_properties["model_dir"], device="cpu")

    def handle(self, rows, context):
        """Answer each of `rows` by one call for all; the pipeline takes a list of one text for that text."""
        answers = self.pipeline([row["body"]["text"] for row in rows], top_k=5)
        return [json.dumps(answer) for answer in (answers if len(rows) > 1 else [answers])]
