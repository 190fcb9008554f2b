"""Held-out scores against a reference that goes pair by pair, and the baselines by hand."""

import math

import numpy as np
import pytest
import torch

from babybert.config import ModelConfig
from babybert.data.dataset import Dataset
from babybert.data.table import Examples
from babybert.evaluation.scores import baseline_scores, evaluate_held_out, format_scores, unigram_log_probs
from babybert.model.bert import BabyBert

CPU = torch.device("cpu")


@pytest.fixture
def bert(demo: Dataset) -> BabyBert:
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=8, heads=2, layers=1, feed_forward=16))


def test_scores_equal_a_pair_by_pair_reference(bert: BabyBert, demo: Dataset) -> None:
    examples = demo.examples("validation")
    scores = evaluate_held_out(bert, examples, demo.token_counts(), batch_size=7, device=CPU)
    mlm_losses, ranks, nsp_losses, correct = [], [], [], []
    bert.eval()
    for pair in range(len(examples)):
        row = examples.rows(pair, pair + 1)
        ids_1T, segments_1T = (torch.from_numpy(values.astype(np.int64))[None] for values in (row.ids, row.segments))
        with torch.no_grad():
            hidden_1TD = bert(ids_1T, segments_1T)
            for position, label in enumerate(row.labels.tolist()):
                if label:
                    logits_1V = bert.mlm_logits(hidden_1TD[0, position : position + 1])
                    probability_V = torch.softmax(logits_1V.double(), -1)[0]
                    mlm_losses.append(-math.log(probability_V[label]))
                    ranks.append(int((probability_V > probability_V[label]).sum()))
            probability_2 = torch.softmax(bert.nsp_logits(hidden_1TD).double(), -1)[0]
        is_next = int(row.is_next[0])
        nsp_losses.append(-math.log(probability_2[is_next]))
        correct.append(int(probability_2.argmax()) == is_next)
    assert scores.pairs == len(examples)
    assert scores.masked_tokens == len(mlm_losses)
    assert scores.mlm_loss == pytest.approx(np.mean(mlm_losses), rel=1e-5)
    assert scores.mlm_top1 == pytest.approx(np.mean(np.array(ranks) == 0), abs=0.01)
    assert scores.mlm_top5 == pytest.approx(np.mean(np.array(ranks) < 5), abs=0.01)
    assert scores.mlm_reciprocal_rank == pytest.approx(np.mean(1 / (1 + np.array(ranks))), abs=0.01)
    assert scores.nsp_loss == pytest.approx(np.mean(nsp_losses), rel=1e-5)
    assert scores.nsp_accuracy == pytest.approx(np.mean(correct), abs=0.03)


def test_scores_as_table_and_as_json(bert: BabyBert, demo: Dataset) -> None:
    scores = evaluate_held_out(bert, demo.examples("validation").first(9), demo.token_counts(), 4, CPU)
    title, header, *rows = format_scores(scores).splitlines()
    assert title == f"held out: 9 pairs, {scores.masked_tokens} masked tokens"
    assert header.split() == ["score", "model", "unigram", "chance"]
    loss = f"{scores.mlm_loss:.3f}", f"{scores.mlm_unigram_loss:.3f}", f"{scores.mlm_chance_loss:.3f}"
    assert rows[0].split() == ["MLM", "loss", "(nats)", *loss]
    assert scores.as_dict()["mlm_loss"] == round(scores.mlm_loss, 6)
    assert scores.as_dict()["pairs"] == 9


def test_baselines_by_hand() -> None:
    examples = Examples(
        ids=np.array([1, 3, 6, 2, 1, 3, 2]),
        labels=np.array([0, 5, 0, 0, 0, 7, 0]),
        segments=np.ones(7),
        offsets=np.array([0, 4, 7]),
        is_next=np.array([1, 0]),
    )
    counts = np.array([0, 0, 0, 0, 0, 6, 3, 0])  # words 5, 6, 7 of a vocabulary of 8
    scores = baseline_scores(examples, counts)
    assert scores["mlm_unigram_loss"] == pytest.approx(-(math.log(7 / 17) + math.log(1 / 17)) / 2)
    assert scores["mlm_unigram_top1"] == 0.5
    assert scores["mlm_chance_loss"] == pytest.approx(math.log(3))
    assert scores["nsp_chance_loss"] == pytest.approx(math.log(2))
    assert np.exp(unigram_log_probs(counts)).sum() == pytest.approx(1)
