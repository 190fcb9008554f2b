import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from babybert.config import ModelConfig
from babybert.model import kernels
from babybert.model.bert import BabyBert
from babybert.model.inference import Answers, top
from babybert.model.kernels import cpu_top_tokens
from babybert.model.kernels.cpu_top_tokens import (
    BLOCK,
    LARGEST_WEIGHT,
    SMALLEST_VOCABULARY,
    UNITS,
    WIDEST,
    BestWords,
    FeedForward,
)


def small(width=10, vocabulary=SMALLEST_VOCABULARY + 5):
    torch.manual_seed(1)
    return BabyBert(
        ModelConfig(vocab_size=vocabulary, width=width, heads=2, layers=2, feed_forward=UNITS + 3, max_positions=40)
    )


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 7, 32]),
    width=st.sampled_from([1, 10, WIDEST]),
    vocabulary=st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17]),
    k=st.sampled_from([1, 5, 100]),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1000.0]),
    ties=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_the_best_words_are_those_of_float64(n, width, vocabulary, k, scale, ties, threads, seed):
    torch.manual_seed(seed)
    hidden_ND, weight_VD, bias_V = (
        scale * torch.randn(n, width),
        torch.randn(vocabulary, width),
        torch.randn(vocabulary),
    )
    if ties:
        hidden_ND, weight_VD, bias_V = (
            hidden_ND.round(),
            weight_VD.round(),
            bias_V.round(),
        )  # whole numbers: nothing is lost, and many are equal
    log_sum_N, logits_NK, ids_NK = BestWords(weight_VD, bias_V, threads)(hidden_ND, k)
    expected_NV = hidden_ND.double() @ weight_VD.double().T + bias_V.double()
    assert logits_NK.shape == ids_NK.shape == (n, min(k, vocabulary))
    size = 1 + float(expected_NV.abs().max()) if n else 1.0
    np.testing.assert_allclose(log_sum_N, expected_NV.logsumexp(1).numpy(), rtol=0, atol=1e-6 * size)
    np.testing.assert_allclose(logits_NK, expected_NV.topk(min(k, vocabulary)).values.numpy(), rtol=0, atol=1e-6 * size)
    np.testing.assert_allclose(
        logits_NK, expected_NV.gather(1, torch.from_numpy(ids_NK)).numpy(), rtol=0, atol=1e-6 * size
    )
    assert all(len(set(row)) == len(row) for row in ids_NK.tolist())
    for scores, ids in zip(logits_NK.tolist(), ids_NK.tolist(), strict=True):
        order = sorted(zip([-score for score in scores], ids, strict=True))
        assert ids == [token_id for _, token_id in order]  # of equals, the first of the vocabulary


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 33]),
    width=st.sampled_from([1, 10, WIDEST]),
    units=st.sampled_from([1, UNITS - 1, UNITS, 2 * UNITS + 5]),
    scale=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_the_feed_forward_is_that_of_float64(n, width, units, scale, seed):
    torch.manual_seed(seed)
    linear1, linear2, x_ND = nn.Linear(width, units), nn.Linear(units, width), scale * torch.randn(n, width)
    y_ND = FeedForward(linear1, linear2)(x_ND)
    with torch.no_grad():
        expected_ND = linear2.double()(torch.relu(linear1.double()(x_ND.double())))
    assert y_ND.dtype == torch.float32
    assert torch.allclose(y_ND.double(), expected_ND, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("shape", [(3, 12), (1, 5)])
def test_hidden_states_of_some_are_those_of_all(shape):
    model = small().eval()
    ids_BT, segments_BT = torch.randint(5, 99, shape), torch.ones(shape, dtype=torch.long)
    ids_BT[0, 4:] = 0
    ids_BT[0, 1] = 0  # also inside a row
    query_M = (ids_BT != 0).flatten().nonzero()[::2, 0]
    for ways in ("auto", "plain"):
        model.set_kernels(ways)
        with torch.inference_mode():
            assert torch.allclose(
                model.hidden_at(ids_BT, segments_BT, query_M),
                model(ids_BT, segments_BT).flatten(0, 1)[query_M],
                atol=1e-5,
            )


def ask(answers, targets=True):
    ids_BT = torch.arange(5, 45).view(4, 10)
    with torch.inference_mode():
        hidden_ND = answers.model.hidden_at(ids_BT, torch.ones_like(ids_BT), torch.arange(40))
        return (
            answers.words(hidden_ND, 7, [0, 0, 39], [5, 4000, 17])
            if targets
            else answers.words(hidden_ND[:1], 1, [], [])
        )


@pytest.mark.parametrize(("threads", "width"), [(1, 10), (2, 10), (1, WIDEST)])
def test_compiled_answers_are_the_plain_ones(threads, width):
    compiled, plain = Answers(small(width), compiled=True, threads=threads), Answers(small(width))
    assert compiled.best_words is not None
    assert plain.best_words is None
    for found, expected in zip(ask(compiled), ask(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    (scores,), (ids,), nothing = ask(compiled, targets=False)
    assert len(scores) == len(ids) == 1
    assert nothing == []


def test_models_that_the_kernels_are_not_for_are_answered_in_pytorch():
    huge, broken = small(), small()
    with torch.no_grad():
        huge.mlm_decoder.bias[3] = 2 * LARGEST_WEIGHT
        broken.mlm_transform[0].weight[0, 0] = torch.nan
    for model in (huge, broken, small(width=2 * WIDEST), small(vocabulary=SMALLEST_VOCABULARY - 1)):
        assert Answers(model, compiled=True).best_words is None
    scores_NK = ask(Answers(broken, compiled=True))[0]
    assert np.isnan(scores_NK).all()


def test_the_largest_weights_overflow_nothing():
    model = small(width=WIDEST)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(LARGEST_WEIGHT * parameter.sign())
    answers = Answers(model, compiled=True)
    assert answers.best_words is not None
    assert np.isfinite(ask(answers)[0]).all()


def test_without_numba_it_is_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "babybert.model.kernels.cpu_top_tokens", None)
    monkeypatch.delattr(kernels, "cpu_top_tokens")
    kernels._load.cache_clear()
    try:
        answers = Answers(small(), compiled=True)
    finally:
        kernels._load.cache_clear()
    assert answers.best_words is None
    assert cpu_top_tokens.supports(answers.model)
    assert len(ask(answers).ids_NK) == 40


@pytest.mark.parametrize(("size", "k"), [(5, 9), (256, 1), (700, 2), (2000, 5), (2000, 7), (2000, 8), (2560, 3)])
def test_top_is_topk(size, k):
    torch.manual_seed(size)
    x = torch.randn(6, size)
    x[0, -1] = x[1, 0] = 9
    values, columns = top(x, k)
    expected = x.topk(min(k, size))
    assert torch.equal(values, expected.values)
    assert torch.equal(columns, expected.indices)
