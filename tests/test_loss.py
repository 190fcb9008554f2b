import copy

import numpy as np
import pytest
import torch
from conftest import gradient
from torch import Tensor, nn

from babybert.config import ModelConfig
from babybert.model.bert import BabyBert
from babybert.model.loss import LossSums, PretrainingModel, mlm_loss, nsp_loss
from babybert.model.ops import Kernels


@pytest.fixture
def bert() -> BabyBert:
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=30, width=8, heads=2, layers=1, feed_forward=16, max_positions=20)).eval()


@pytest.fixture
def batch() -> tuple[Tensor, ...]:
    ids = torch.tensor([[1, 3, 8, 2, 9, 2], [1, 7, 2, 3, 2, 0], [1, 7, 3, 2, 5, 2]])
    labels = torch.tensor([[0, 6, 0, 0, 9, 0], [0, 0, 0, 8, 0, 0], [0, 0, 11, 0, 0, 0]])
    segments = torch.tensor([[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 2]])
    return ids, labels, segments, torch.tensor([1, 0, 0])


def softmax64(row: np.ndarray) -> np.ndarray:
    exponential = np.exp(row - row.max())
    probabilities: np.ndarray = exponential / exponential.sum()
    return probabilities


def test_mlm_is_the_cross_entropy_of_the_chosen_tokens_alone(bert: BabyBert, batch: tuple[Tensor, ...]) -> None:
    ids, labels, segments, _ = batch
    hidden = bert(ids, segments)
    logits = bert.mlm_logits(hidden.reshape(-1, 8)).reshape(3, 6, 30).detach().numpy().astype(np.float64)
    expected = [-np.log(softmax64(logits[b, t])[labels[b, t]]) for b in range(3) for t in range(6) if labels[b, t] != 0]
    mlm = mlm_loss(bert, hidden, labels)
    assert mlm.positions == len(expected) == 4
    assert mlm.loss_sum.item() == pytest.approx(sum(expected), rel=1e-6)


def test_no_chosen_token_is_no_loss(bert: BabyBert, batch: tuple[Tensor, ...]) -> None:
    hidden = bert(batch[0], batch[2])
    mlm = mlm_loss(bert, hidden, torch.zeros_like(batch[1]))
    assert mlm.loss_sum.item() == 0
    assert mlm.positions.item() == 0


def test_nsp_equals_a_float64_reference() -> None:
    logits, labels = torch.randn(7, 2), torch.tensor([0, 1, 1, 0, 0, 0, 1])
    expected = sum(
        -np.log(softmax64(row)[label])
        for row, label in zip(logits.numpy().astype(np.float64), labels.tolist(), strict=True)
    )
    assert nsp_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_negatives_carry_gradient(bert: BabyBert, batch: tuple[Tensor, ...]) -> None:
    """is_next 0 is a class, not a value to ignore."""
    for label in (0, 1):
        bert.zero_grad()
        nsp_loss(bert.nsp_logits(bert(batch[0], batch[2])), torch.full((3,), label)).backward()
        assert gradient(bert.embedding.token_embedding.embedding.weight).abs().sum() > 0
        last_linear = bert.nsp_head[3]
        assert isinstance(last_linear, nn.Linear)
        pushed = gradient(last_linear.bias)
        assert pushed[label] < 0 < pushed[1 - label]


def test_the_objective_is_the_sum_of_the_two_means(bert: BabyBert, batch: tuple[Tensor, ...]) -> None:
    sums = LossSums.of(PretrainingModel(bert)(*batch))
    hidden = bert(batch[0], batch[2])
    expected = mlm_loss(bert, hidden, batch[1]).loss_sum / 4 + nsp_loss(bert.nsp_logits(hidden), batch[3]) / 3
    torch.testing.assert_close(sums.loss, expected)
    assert sums.nsp_accuracy.item() in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)


@pytest.mark.parametrize(("pairs", "devices"), [(3, 2), (1, 2), (3, 3)])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_replicas_of_data_parallel_give_the_whole_batchs_loss_and_gradient(
    bert: BabyBert, batch: tuple[Tensor, ...], pairs: int, devices: int, kernels: Kernels
) -> None:
    """What DataParallel does, on the CPU: copies of the model, the batch in chunks along B, outputs concatenated.

    Chunks differ in size, and in how many positions are masked. A batch with fewer pairs than devices has fewer chunks.
    """
    model = PretrainingModel(bert.set_kernels(kernels))
    whole_batch = [tensor[:pairs] for tensor in batch]
    expected = LossSums.of(model(*whole_batch))
    expected.loss.backward()

    chunks = list(zip(*(tensor.chunk(devices) for tensor in whole_batch), strict=True))
    replicas = [copy.deepcopy(model) for _ in chunks]
    outputs = []
    for replica, chunk in zip(replicas, chunks, strict=True):
        replica.zero_grad()
        outputs.append(replica(*chunk))
    assert {tuple(value.shape) for output in outputs for value in output.values()} == {(1,)}
    gathered = LossSums.of({name: torch.cat([output[name] for output in outputs]) for name in outputs[0]})
    gathered.loss.backward()

    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(gathered, name), value)
    for name, parameter in model.named_parameters():
        replica_gradients = [replica.get_parameter(name).grad for replica in replicas]
        total = sum(grad for grad in replica_gradients if grad is not None)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-4, atol=1e-6)
