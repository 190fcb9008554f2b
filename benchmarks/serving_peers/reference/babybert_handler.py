"""The same model asked as the reference asks it: one text at a time, logits and a softmax at every position."""

import json
from pathlib import Path

import torch

from babybert.checkpoint.format import load_model
from babybert.data.tokenizer import CLS, MASK, SEP


class Handler:
    """One worker's model; TorchServe calls `initialize` once and `handle` for each batch."""

    def initialize(self, context):
        """Load the model that lies beside this file."""
        torch.set_num_threads(1)
        self.model, self.tokenizer = load_model(Path(context.system_properties["model_dir"]))
        self.model.eval().set_kernels("plain")

    @torch.no_grad()
    def handle(self, rows, context):
        """Answer each of `rows` by a pass of its own."""
        return [json.dumps(self.answer(row["body"]["text"])) for row in rows]

    def answer(self, text):
        """The five likeliest words at each mask."""
        ids_1T = torch.tensor([[CLS, *self.tokenizer.encode(text), SEP]])
        probability_1TV = self.model.mlm_logits(self.model(ids_1T, torch.ones_like(ids_1T))).softmax(-1)
        scores_NK, ids_NK = probability_1TV[ids_1T == MASK].topk(5)
        pairs = [zip(scores, ids, strict=True) for scores, ids in zip(scores_NK.tolist(), ids_NK.tolist(), strict=True)]
        return {
            "masks": [
                [{"token": self.tokenizer.token(token_id), "score": score} for score, token_id in own] for own in pairs
            ]
        }
