"""The same model queried as the reference does it: one text at a time, logits and a softmax at every position."""

import json
from pathlib import Path
from typing import Any

import torch

from babybert.checkpoint.format import load_model
from babybert.data.tokenizer import CLS, MASK, SEP


class ReferenceHandler:
    """The model of one worker. TorchServe calls `initialize` once and `handle` for each batch."""

    def initialize(self, context: Any) -> None:
        """Load the model from the folder of the unpacked archive."""
        torch.set_num_threads(1)
        self.model, self.tokenizer = load_model(Path(context.system_properties["model_dir"]))
        self.model.eval().set_kernels("plain")

    @torch.no_grad()
    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[str]:
        """Answer each row with its own forward pass."""
        return [json.dumps(self.fill_mask(row["body"]["text"])) for row in rows]

    def fill_mask(self, text: str) -> dict[str, Any]:
        """The five likeliest words at each mask."""
        ids_1T = torch.tensor([[CLS, *self.tokenizer.encode(text), SEP]])
        probability_1TV = self.model.mlm_logits(self.model(ids_1T, torch.ones_like(ids_1T))).softmax(-1)
        scores_NK, ids_NK = probability_1TV[ids_1T == MASK].topk(5)
        masks = []
        for scores, token_ids in zip(scores_NK.tolist(), ids_NK.tolist(), strict=True):
            tokens = self.tokenizer.tokens(token_ids)
            masks.append([{"token": token, "score": score} for token, score in zip(tokens, scores, strict=True)])
        return {"masks": masks}
