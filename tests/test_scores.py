import math

import numpy as np
import pytest
import torch

from babybert.config import ModelConfig
from babybert.data.table import Examples
from babybert.evaluation.scores import baselines, evaluate, unigram_log_probs
from babybert.model.bert import BabyBert

CPU = torch.device("cpu")


@pytest.fixture
def bert(demo):
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=8, heads=2, layers=1, feed_forward=16))


def test_scores_equal_a_pair_by_pair_reference(bert, demo):
    examples = demo.examples("validation")
    scores = evaluate(bert, examples, demo.token_counts(), batch_size=7, device=CPU)
    losses, ranks, nsp, right = [], [], [], []
    bert.eval()
    for p in range(len(examples)):
        i, j = examples.offsets[p], examples.offsets[p + 1]
        with torch.no_grad():
            hidden = bert(
                torch.from_numpy(examples.ids[i:j].astype(np.int64))[None],
                torch.from_numpy(examples.segments[i:j].astype(np.int64))[None],
            )
            for t, label in enumerate(examples.labels[i:j].tolist()):
                if label:
                    probability = torch.softmax(bert.mlm_logits(hidden[0, t : t + 1]).double(), -1)[0]
                    losses.append(-math.log(probability[label]))
                    ranks.append(int((probability > probability[label]).sum()))
            answer = torch.softmax(bert.nsp_logits(hidden).double(), -1)[0]
        nsp.append(-math.log(answer[examples.is_next[p]]))
        right.append(int(answer.argmax()) == examples.is_next[p])
    assert scores.pairs == len(examples)
    assert scores.masked_tokens == len(losses)
    assert scores.mlm_loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert scores.mlm_top1 == pytest.approx(np.mean(np.array(ranks) == 0), abs=0.01)
    assert scores.mlm_top5 == pytest.approx(np.mean(np.array(ranks) < 5), abs=0.01)
    assert scores.mlm_reciprocal_rank == pytest.approx(np.mean(1 / (1 + np.array(ranks))), abs=0.01)
    assert scores.nsp_loss == pytest.approx(np.mean(nsp), rel=1e-5)
    assert scores.nsp_accuracy == pytest.approx(np.mean(right), abs=0.03)
    assert "MLM loss" in scores.table()


def test_the_models_mode_is_restored(bert, demo):
    bert.train()
    evaluate(bert, demo.examples("validation").first(3), demo.token_counts(), 2, CPU)
    assert bert.training


def test_baselines_by_hand():
    examples = Examples(
        ids=np.array([1, 3, 6, 2, 1, 3, 2]),
        labels=np.array([0, 5, 0, 0, 0, 7, 0]),
        segments=np.ones(7),
        offsets=np.array([0, 4, 7]),
        is_next=np.array([1, 0]),
    )
    counts = np.array([0, 0, 0, 0, 0, 6, 3, 0])  # words 5, 6, 7 of a vocabulary of 8
    found = baselines(examples, counts)
    assert found["mlm_unigram_loss"] == pytest.approx(-(math.log(7 / 17) + math.log(1 / 17)) / 2)
    assert found["mlm_unigram_top1"] == 0.5
    assert found["mlm_chance_loss"] == pytest.approx(math.log(3))
    assert found["nsp_chance_loss"] == pytest.approx(math.log(2))
    assert np.exp(unigram_log_probs(counts)).sum() == pytest.approx(1)
