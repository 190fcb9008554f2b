import numpy as np
import pytest
import torch

from babybert.config import ModelConfig
from babybert.model.bert import BabyBert
from babybert.model.loss import LossSums, PretrainingModel, mlm_loss, nsp_loss


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=30, width=8, heads=2, layers=1, feed_forward=16, max_positions=20)).eval()


@pytest.fixture
def batch():
    ids = torch.tensor([[1, 3, 8, 2, 9, 2], [1, 7, 2, 3, 2, 0], [1, 7, 3, 2, 5, 2]])
    labels = torch.tensor([[0, 6, 0, 0, 9, 0], [0, 0, 0, 8, 0, 0], [0, 0, 11, 0, 0, 0]])
    segments = torch.tensor([[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 2]])
    return ids, labels, segments, torch.tensor([1, 0, 0])


def softmax64(row):
    exponential = np.exp(row - row.max())
    return exponential / exponential.sum()


def test_mlm_is_the_cross_entropy_of_the_chosen_tokens_alone(bert, batch):
    ids, labels, segments, _ = batch
    hidden = bert(ids, segments)
    logits = bert.mlm_logits(hidden.reshape(-1, 8)).reshape(3, 6, 30).detach().numpy().astype(np.float64)
    expected = [-np.log(softmax64(logits[b, t])[labels[b, t]]) for b in range(3) for t in range(6) if labels[b, t] != 0]
    found = mlm_loss(bert, hidden, labels)
    assert found.positions == len(expected) == 4
    assert found.loss_sum.item() == pytest.approx(sum(expected), rel=1e-6)


def test_no_chosen_token_is_no_loss(bert, batch):
    hidden = bert(batch[0], batch[2])
    found = mlm_loss(bert, hidden, torch.zeros_like(batch[1]))
    assert (found.loss_sum.item(), found.positions) == (0, 0)


def test_nsp_equals_a_float64_reference():
    logits, labels = torch.randn(7, 2), torch.tensor([0, 1, 1, 0, 0, 0, 1])
    expected = sum(
        -np.log(softmax64(row)[label])
        for row, label in zip(logits.numpy().astype(np.float64), labels.tolist(), strict=True)
    )
    assert nsp_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_negatives_carry_gradient(bert, batch):
    """is_next 0 is a class, not a value to ignore."""
    for label in (0, 1):
        bert.zero_grad()
        nsp_loss(bert.nsp_logits(bert(batch[0], batch[2])), torch.full((3,), label)).backward()
        assert bert.embedding.token_embedding.embedding.weight.grad.abs().sum() > 0
        pushed = bert.nsp_head[3].bias.grad
        assert pushed[label] < 0 < pushed[1 - label]


def test_the_objective_is_the_sum_of_the_two_means(bert, batch):
    totals = LossSums.of(PretrainingModel(bert)(*batch))
    hidden = bert(batch[0], batch[2])
    expected = mlm_loss(bert, hidden, batch[1]).loss_sum / 4 + nsp_loss(bert.nsp_logits(hidden), batch[3]) / 3
    torch.testing.assert_close(totals.loss, expected)
    assert totals.nsp_accuracy.item() in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)


def test_replicas_gathered_give_the_whole_batchs_loss_and_gradient(bert, batch):
    """What DataParallel does by hand: uneven parts, their outputs joined along the first dimension."""
    model = PretrainingModel(bert)
    LossSums.of(model(*batch)).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in bert.named_parameters()}
    loss = LossSums.of(model(*batch)).loss.item()
    bert.zero_grad()
    parts = [model(*(tensor[rows] for tensor in batch)) for rows in (slice(0, 1), slice(1, 3))]
    gathered = LossSums.of({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    assert gathered.loss.item() == pytest.approx(loss, rel=1e-6)
    gathered.loss.backward()
    for name, parameter in bert.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)
    assert {tuple(value.shape) for value in parts[0].values()} == {(1,)}
