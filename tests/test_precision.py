"""The precision of evaluations: which one is picked, and how far bf16 is from fp32."""

import logging

import numpy as np
import pytest
import torch

from babybert.config import ModelConfig
from babybert.data.dataset import Dataset
from babybert.evaluation.predictions import predict
from babybert.evaluation.probe import pooled_states
from babybert.evaluation.report import report
from babybert.model.bert import BabyBert
from babybert.model.precision import evaluates_in_bf16, uses_bf16

CPU = torch.device("cpu")


def mask_features(monkeypatch: pytest.MonkeyPatch, has_amx: bool) -> None:
    """Pretend that the processor has AMX, or neither AMX nor AVX512-BF16."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def wide_model(dataset: Dataset, width: int = 128) -> BabyBert:
    torch.manual_seed(0)
    sizes = ModelConfig(dataset.tokenizer.size, width, 2, 4, 256, norm="pre", activation="gelu")
    bert = BabyBert(sizes)
    bert.mlm_decoder.weight.data.mul_(3)  # so that predictions differ, as those of a trained model do
    return bert


@pytest.mark.parametrize(("has_amx", "width", "expected"), [(True, 128, True), (True, 64, False), (False, 128, False)])
def test_auto_uses_bf16_where_it_wins(
    demo: Dataset,
    has_amx: bool,
    width: int,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mask_features(monkeypatch, has_amx)
    model = wide_model(demo, width)
    with caplog.at_level(logging.INFO):
        assert evaluates_in_bf16("auto", model, CPU) == expected
    assert caplog.messages == [f"encoder: cpu, {'bf16' if expected else 'fp32'}"]
    assert evaluates_in_bf16("bf16", model, CPU)
    assert not evaluates_in_bf16("fp32", model, CPU)
    assert not uses_bf16("auto", CPU, width, 2, "auto")  # casts of the weights cost more than so few pairs gain
    assert not uses_bf16("auto", CPU, width, 64, "plain")


@pytest.mark.slow
def test_scores_in_bf16_are_those_in_fp32_to_three_decimals(demo: Dataset) -> None:
    model, examples = wide_model(demo), demo.examples("validation").first(200)
    exact, fast = (predict(model, examples, 64, CPU, token_losses=True, bf16=bf16) for bf16 in (False, True))
    assert 0 < np.abs(fast.loss_N - exact.loss_N).mean() < 0.02
    assert fast.loss_N.mean() == pytest.approx(exact.loss_N.mean(), abs=1e-3)
    assert ((fast.rank_N == 0) == (exact.rank_N == 0)).mean() > 0.97
    assert fast.nsp_logits_P2 == pytest.approx(exact.nsp_logits_P2, abs=0.05)
    assert fast.nsp_loss_sum / len(examples) == pytest.approx(exact.nsp_loss_sum / len(examples), abs=2e-3)
    assert model.bf16_weights is None  # the copies are those of one evaluation


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_bf16_runs_where_the_processor_has_none(demo: Dataset, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask_features(monkeypatch, has_amx=False)
    model = wide_model(demo).set_kernels("plain" if kernels == "plain" else "auto")
    results = report(model, demo, 20, 8, CPU, bf16=True)
    assert results["precision"] == "bf16"
    assert results["mlm_loss"] == pytest.approx(report(model, demo, 20, 8, CPU)["mlm_loss"], abs=0.01)


def test_states_of_the_probe_in_bf16_are_close(demo: Dataset) -> None:
    model = wide_model(demo).eval()
    documents = [np.arange(5, 5 + length) for length in (3, 9, 20, 4, 31)]
    exact, fast = (pooled_states(model, documents, 2, CPU, "states", bf16) for bf16 in (False, True))
    for states, others in zip(exact, fast, strict=True):
        assert states.dtype == others.dtype == np.float64
        assert others == pytest.approx(states, abs=0.05)
        assert not np.array_equal(others, states)
