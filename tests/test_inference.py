import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from babybert.config import ModelConfig
from babybert.model import kernels, ops
from babybert.model.bert import BabyBert
from babybert.model.inference import InferenceModel, TopTokens
from babybert.model.kernels.cpu_top_tokens import (
    BLOCK,
    LARGEST_WEIGHT,
    SMALLEST_VOCABULARY,
    UNITS,
    WIDEST,
    FeedForwardKernel,
    TopTokensKernel,
)

pytestmark = pytest.mark.no_cover  # tracing makes numba's compiler several times slower


def small(width: int = 10, vocabulary: int = SMALLEST_VOCABULARY + 5) -> BabyBert:
    torch.manual_seed(1)
    return BabyBert(ModelConfig(vocabulary, width, heads=2, layers=2, feed_forward=UNITS + 3, max_positions=40))


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
def test_the_top_tokens_are_those_of_float64(
    n: int, width: int, vocabulary: int, k: int, scale: float, ties: bool, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = [scale * torch.randn(n, width), torch.randn(vocabulary, width), torch.randn(vocabulary)]
    if ties:  # whole numbers: sums are exact, and many are equal
        inputs = [x.round() for x in inputs]
    hidden_ND, weight_VD, bias_V = inputs
    log_sum_N, logits_NK, ids_NK = TopTokensKernel(weight_VD, bias_V, threads)(hidden_ND, k)
    expected_NV = hidden_ND.double() @ weight_VD.double().T + bias_V.double()
    assert logits_NK.shape == ids_NK.shape == (n, min(k, vocabulary))
    tolerance = 1e-6 * (1 + float(expected_NV.abs().max()) if n else 1.0)
    largest_NK = expected_NV.topk(min(k, vocabulary)).values
    np.testing.assert_allclose(log_sum_N, expected_NV.logsumexp(1).numpy(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(logits_NK, largest_NK.numpy(), rtol=0, atol=tolerance)
    at_ids_NK = expected_NV.gather(1, torch.from_numpy(ids_NK))
    np.testing.assert_allclose(logits_NK, at_ids_NK.numpy(), rtol=0, atol=tolerance)
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
def test_the_feed_forward_is_that_of_float64(n: int, width: int, units: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    linear1, linear2, x_ND = nn.Linear(width, units), nn.Linear(units, width), scale * torch.randn(n, width)
    y_ND = FeedForwardKernel(linear1, linear2)(x_ND)
    with torch.no_grad():
        expected_ND = linear2.double()(torch.relu(linear1.double()(x_ND.double())))
    assert y_ND.dtype == torch.float32
    assert torch.allclose(y_ND.double(), expected_ND, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("shape", [(3, 12), (1, 5)])
def test_hidden_states_at_query_positions_are_those_of_the_whole_batch(shape: tuple[int, int]) -> None:
    model = small().eval()
    ids_BT, segments_BT = torch.randint(5, 99, shape), torch.ones(shape, dtype=torch.long)
    ids_BT[0, 4:] = 0
    ids_BT[0, 1] = 0  # also inside a row
    query_M = (ids_BT != 0).flatten().nonzero()[::2, 0]
    for choice in ("auto", "plain"):
        model.set_kernels(choice)
        with torch.inference_mode():
            assert torch.allclose(
                model.hidden_at(ids_BT, segments_BT, query_M),
                model(ids_BT, segments_BT).flatten(0, 1)[query_M],
                atol=1e-5,
            )


def top_tokens(model: InferenceModel, targets: bool = True) -> TopTokens:
    """Of 40 positions with three targets, or of one position without."""
    ids_BT = torch.arange(5, 45).view(4, 10)
    with torch.inference_mode():
        hidden_ND = model.model.hidden_at(ids_BT, torch.ones_like(ids_BT), torch.arange(40))
        if targets:
            return model.top_tokens(hidden_ND, 7, [0, 0, 39], [5, 4000, 17])
        return model.top_tokens(hidden_ND[:1], 1, [], [])


@pytest.mark.parametrize(("threads", "width"), [(1, 10), (2, 10), (1, WIDEST)])
@pytest.mark.slow
def test_compiled_top_tokens_are_the_plain_ones(threads: int, width: int) -> None:
    compiled = InferenceModel(small(width), compiled=True, threads=threads)
    plain = InferenceModel(small(width))
    assert compiled.uses_compiled_kernels
    assert not plain.uses_compiled_kernels
    results, expected = top_tokens(compiled), top_tokens(plain)
    for name in TopTokens._fields:
        np.testing.assert_allclose(getattr(results, name), getattr(expected, name), rtol=0, atol=1e-6)
    for model in (compiled, plain):
        (scores,), (ids,), target_scores = top_tokens(model, targets=False)
        assert len(scores) == len(ids) == 1
        assert target_scores == []


def test_no_masks_have_no_top_tokens() -> None:
    for compiled in (False, True):
        with torch.inference_mode():
            results = InferenceModel(small(), compiled=compiled).top_tokens(torch.zeros(0, 10), 5, [], [])
        assert results == ([], [], [])


def test_unsupported_models_run_in_pytorch() -> None:
    huge, broken = small(), small()
    with torch.no_grad():
        huge.mlm_decoder.bias[3] = 2 * LARGEST_WEIGHT
        broken.get_parameter("mlm_transform.0.weight")[0, 0] = torch.nan
    for model in (huge, broken, small(width=2 * WIDEST), small(vocabulary=SMALLEST_VOCABULARY - 1)):
        assert not InferenceModel(model, compiled=True).uses_compiled_kernels
    assert np.isnan(top_tokens(InferenceModel(broken, compiled=True)).scores_NK).all()


def test_the_largest_weights_overflow_nothing() -> None:
    model = small(width=WIDEST)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(LARGEST_WEIGHT * parameter.sign())
    inference = InferenceModel(model, compiled=True)
    assert inference.uses_compiled_kernels
    assert np.isfinite(top_tokens(inference).scores_NK).all()


def test_without_numba_it_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "babybert.model.kernels.cpu_top_tokens", None)
    monkeypatch.delattr(kernels, "cpu_top_tokens")
    ops._load_cpu_kernels.cache_clear()
    try:
        inference = InferenceModel(small(), compiled=True)
    finally:
        ops._load_cpu_kernels.cache_clear()
    assert not inference.uses_compiled_kernels
    assert len(top_tokens(inference).ids_NK) == 40
