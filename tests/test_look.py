"""`babybert look`: attention weights, neighbours and fill-ins against the model's own output and the predictor."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from babybert.cli import main
from babybert.config import ModelConfig
from babybert.data.dataset import Dataset
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, MASK, PAD, SEP
from babybert.errors import UsageError
from babybert.evaluation.look import SENTENCES, attention_weights, encode, fill_ins, format_look, look, neighbours
from babybert.evaluation.report_figures import plot_attention
from babybert.model.bert import BabyBert
from babybert.serving.predictor import Predictor
from babybert.training.train import pretrain


@pytest.fixture(scope="module")
def predictor(demo: Dataset) -> Predictor:
    torch.manual_seed(0)
    return Predictor(
        BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=8, heads=2, layers=3, feed_forward=16)),
        demo.tokenizer,
    )


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_attention_weights_times_values_are_the_output_of_the_layer(norm: Literal["post", "pre"]) -> None:
    torch.manual_seed(0)
    model = BabyBert(ModelConfig(vocab_size=40, width=8, heads=2, layers=3, feed_forward=16, norm=norm)).eval()
    ids_BT = torch.tensor([[CLS, 9, 20, MASK, 7, SEP], [CLS, 30, 8, SEP, PAD, PAD]])
    segments_BT = (ids_BT != PAD).long()
    with torch.inference_mode():
        weights_LBHTT = attention_weights(model, ids_BT, segments_BT)
        assert torch.allclose(weights_LBHTT.sum(-1), torch.ones(3, 2, 2, 6))
        assert (weights_LBHTT[:, 1, :, :, 4:] == 0).all()  # nobody looks at padding
        x_BTD = model.embedding(ids_BT, segments_BT, torch.arange(6))
        for layer, weights_BHTT in zip(model.encoder.layers, weights_LBHTT, strict=True):
            attend, is_pre = layer.self_attn, norm == "pre"
            input_BTD = layer.norm1(x_BTD) if is_pre else x_BTD
            values_BTD = F.linear(input_BTD, attend.in_proj_weight[16:], attend.in_proj_bias[16:])
            values_BHTd = values_BTD.view(2, 6, 2, 4).transpose(1, 2)
            attended_BTD = attend.out_proj((weights_BHTT @ values_BHTd).transpose(1, 2).flatten(2))
            x_BTD = x_BTD + attended_BTD if is_pre else layer.norm1(x_BTD + attended_BTD)
            input_BTD = layer.norm2(x_BTD) if is_pre else x_BTD
            x_BTD = x_BTD + layer.linear2(layer.linear1(input_BTD).relu())
            x_BTD = x_BTD if is_pre else layer.norm2(x_BTD)
        hidden_BTD = model(ids_BT, segments_BT)
        assert torch.allclose(model.encoder_norm(x_BTD)[segments_BT == 1], hidden_BTD[segments_BT == 1], atol=1e-5)


def test_neighbours_are_those_of_a_search(predictor: Predictor, demo: Dataset) -> None:
    embedding_VD = predictor.model.embedding.token_embedding.embedding.weight
    (entry,) = neighbours(predictor.model, demo.tokenizer, ("movie",), 40)
    movie = demo.tokenizer.id_of("movie")
    assert movie is not None
    others = [token_id for token_id in range(FIRST_ORDINARY, FIRST_ORDINARY + 40) if token_id != movie]
    cosine = {
        demo.tokenizer.token(token_id): F.cosine_similarity(embedding_VD[token_id], embedding_VD[movie], dim=0).item()
        for token_id in others
    }
    expected = sorted(cosine, key=lambda word: -cosine[word])[:6]
    assert [near["word"] for near in entry["neighbours"]] == expected
    assert entry["neighbours"][0]["cosine"] == pytest.approx(cosine[expected[0]], rel=1e-5)
    unknown = neighbours(predictor.model, demo.tokenizer, ("xylophone", "two words"), 40)
    assert [entry["known"] for entry in unknown] == [False, False]


def test_fill_ins_agree_with_the_predictor(predictor: Predictor) -> None:
    text = "the [MASK] is superb ."
    candidates = predictor.fill_mask([text], 100)[0]["masks"][0]["candidates"]
    sensible = (candidates[3]["token"], candidates[70]["token"], "xylophone")
    (sentence,) = fill_ins(predictor.model, predictor.tokenizer, ((text, sensible),))
    assert sentence["fills"] == [candidate["token"] for candidate in candidates[:5]]
    expected = {candidate["token"]: (rank, candidate["score"]) for rank, candidate in enumerate(candidates, 1)}
    for word in sentence["sensible"][:2]:
        rank, score = expected[word["word"]]
        assert word["rank"] == rank and word["probability"] == pytest.approx(score, rel=1e-4)
    assert sentence["sensible"][2]["rank"] is None


def test_each_sentence_has_one_mask_and_lowercase_words() -> None:
    assert len(SENTENCES) == 20
    for text, words in SENTENCES:
        assert text.count("[MASK]") == 1 and words
        assert all(word == word.lower() and " " not in word for word in words)


def test_the_text_names_words_that_are_not_in_the_vocabulary(predictor: Predictor) -> None:
    text = format_look(look(predictor.model, predictor.tokenizer, ("movie", "xylophone"), 50))
    assert "not in the vocabulary" in text and "not one token" in text and "the median of the best ranks" in text


def test_bad_texts_are_refused(predictor: Predictor, demo: Dataset) -> None:
    for text in ("", "word " * 600, "half \ud800 a pair"):
        with pytest.raises(UsageError):
            encode(predictor.model, demo.tokenizer, text)
    with pytest.raises(UsageError, match="surrogate"):
        neighbours(predictor.model, demo.tokenizer, ("\ud800",), 40)


def test_odd_tokens_are_drawn(tmp_path: Path) -> None:
    tokens = ["$x^2$", "nul\x00", "\x1b[31m", "\\", "c" * 200_000]
    paths = plot_attention(tokens, np.full((1, 1, 5, 5), 0.2), tmp_path / "attention")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert paths[1].stat().st_size < 100_000


def test_the_command(capsys: pytest.CaptureFixture[str], small: Any, tmp_path: Path) -> None:
    result = pretrain(small(max_steps=2, layers=2))
    assert result is not None
    run = str(result.checkpoint)
    figure = str(tmp_path / "attention")
    assert main(["look", "--checkpoint", run, "--text", "mary is $superb$ $ .", "--plot", figure]) == 0
    assert "fill-ins" in capsys.readouterr().out
    assert (tmp_path / "attention.png").stat().st_size > 10_000 and (tmp_path / "attention.svg").is_file()
    assert main(["look", "--checkpoint", run, "--json", "--words", "movie"]) == 0
    assert [entry["word"] for entry in json.loads(capsys.readouterr().out)["neighbours"]] == ["movie"]
    assert main(["look", "--checkpoint", str(tmp_path)]) == 3
