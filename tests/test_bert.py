import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from babybert.config import ModelConfig, model_config
from babybert.errors import UsageError
from babybert.evaluation.look import attention_weights
from babybert.model.bert import BabyBert, PositionalEncoding

SMALL = ModelConfig(vocab_size=30, width=8, heads=2, layers=2, feed_forward=16, max_positions=20)


@pytest.fixture
def bert() -> BabyBert:
    torch.manual_seed(0)
    return BabyBert(SMALL).eval()


def test_the_reference_module_for_module() -> None:
    model = BabyBert(model_config("baby", 147_161))
    assert str(model) + "\n" == (Path(__file__).parent / "golden" / "baby.txt").read_text()
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_177_689


def test_shapes(bert: BabyBert) -> None:
    hidden_BTD = bert(torch.randint(5, 30, (3, 7)), torch.ones(3, 7, dtype=torch.long))
    assert hidden_BTD.shape == (3, 7, 8)
    assert bert.mlm_logits(hidden_BTD[0, :2]).shape == (2, 30)
    assert bert.nsp_logits(hidden_BTD).shape == (3, 2)


def test_padding_changes_nothing_wherever_it_is(bert: BabyBert) -> None:
    ids, segments = torch.tensor([[1, 7, 8, 2, 9, 2]]), torch.tensor([[1, 1, 1, 1, 2, 2]])
    plain = bert(ids, segments)
    padded = bert(
        torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1),
        torch.cat([segments, torch.zeros(1, 4, dtype=torch.long)], 1),
    )
    torch.testing.assert_close(padded[:, :6], plain, atol=1e-6, rtol=0)
    # Inside a row, as in the course's files: the padding's embedding makes no difference.
    inside = torch.tensor([[1, 7, 0, 0, 9, 2]])
    before = bert(inside, segments)[:, [0, 1, 4, 5]]
    with torch.no_grad():
        bert.embedding.token_embedding.embedding.weight[0] += 5
    torch.testing.assert_close(bert(inside, segments)[:, [0, 1, 4, 5]], before)


def test_positions_are_the_papers_sines() -> None:
    encoding = PositionalEncoding(width=4, max_positions=5, dropout=0.0)
    added = encoding(torch.zeros(1, 5, 4), torch.arange(5))[0]
    for position in range(5):
        expected = [math.sin(position), math.cos(position), math.sin(position / 100), math.cos(position / 100)]
        assert added[position].tolist() == pytest.approx(expected, abs=1e-6)


def test_tokens_are_scaled_by_the_root_of_the_width(bert: BabyBert) -> None:
    token = bert.embedding.token_embedding
    torch.testing.assert_close(token(torch.tensor([7])), token.embedding.weight[[7]] * math.sqrt(8))


def test_layers_start_with_different_weights(bert: BabyBert) -> None:
    first, second = bert.encoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_mimetic_weights_attend_to_equal_tokens() -> None:
    """In the first layer a token of A attends most to itself, and among B's words to the same one."""
    torch.manual_seed(0)
    model = BabyBert(ModelConfig(vocab_size=30, width=128, heads=4, layers=2, feed_forward=16, max_positions=64)).eval()
    plain_segments = model.embedding.segment_embedding.weight.detach().clone()
    model.initialize_mimetic()
    torch.testing.assert_close(model.embedding.segment_embedding.weight, plain_segments * math.sqrt(128))
    ids = torch.tensor([[1, *range(10, 20), 2, *range(20, 25), 14, *range(25, 30), 2]])
    segments = torch.tensor([[1] * 12 + [2] * 12])
    weight_TT = attention_weights(model, ids, segments)[0, 0].mean(0)
    assert weight_TT[5].argmax() == 5
    assert weight_TT[5, 12:].argmax() == 5  # where the word stands in B
    assert weight_TT[17].argmax() == 17


def test_order_and_segments_matter(bert: BabyBert) -> None:
    ones = torch.ones(1, 4, dtype=torch.long)
    one = bert(torch.tensor([[1, 7, 8, 2]]), ones)
    assert not torch.allclose(one[:, 0], bert(torch.tensor([[1, 8, 7, 2]]), ones)[:, 0])
    assert not torch.allclose(one[:, 0], bert(torch.tensor([[1, 7, 8, 2]]), torch.tensor([[1, 1, 1, 2]]))[:, 0])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 7}, "even"),
        ({"heads": 3}, "shared by 3 heads"),
        ({"layers": 0}, "from 1 to"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm": "both"}, "norm is 'both'; choose one of post, pre"),
        ({"activation": "tanh"}, "activation is 'tanh'; choose one of relu, gelu"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model_config("baby", 30, **sizes)


def test_a_tied_decoder_is_the_table_of_token_embeddings() -> None:
    tied, untied = (BabyBert(replace(SMALL, tie_decoder=tie)) for tie in (True, False))
    assert tied.mlm_decoder.weight is tied.embedding.token_embedding.embedding.weight
    sizes = [sum(parameter.numel() for parameter in bert.parameters()) for bert in (tied, untied)]
    assert sizes[1] - sizes[0] == 30 * 8


@torch.no_grad()
def test_normal_weights_are_smaller_before_a_residual_sum() -> None:
    model = BabyBert(ModelConfig(vocab_size=30, width=64, heads=4, layers=8, feed_forward=256, norm="pre"))
    tables = model.embedding.token_embedding.embedding.weight.clone(), model.mlm_decoder.weight
    model.initialize_normal()
    assert torch.equal(model.embedding.token_embedding.embedding.weight, tables[0])
    for layer in model.encoder.layers:
        for matrix in (layer.self_attn.in_proj_weight, layer.linear1.weight):
            assert float(matrix.std()) == pytest.approx(0.02, rel=0.05)
        for matrix in (layer.self_attn.out_proj.weight, layer.linear2.weight):
            assert float(matrix.std()) == pytest.approx(0.02 / 4, rel=0.05)


def test_presets() -> None:
    assert model_config("small", 30).norm == model_config("medium", 30).norm == "pre"
    assert model_config("mini", 30).norm == "post"
    assert model_config("mini", 30).width == 128
    assert model_config("tiny", 30, width=32).width == 32
    with pytest.raises(UsageError, match="unknown preset 'huge'; choose one of baby, tiny, mini"):
        model_config("huge", 30)
