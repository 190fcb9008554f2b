"""The configuration of a BabyBERT for Hugging Face Transformers. It is copied into each exported folder."""

from typing import Any

from transformers import PretrainedConfig


class BabyBertConfig(PretrainedConfig):
    """The sizes and the shape of the network, under the names that Transformers uses for BERT.

    Args:
        vocab_size: tokens, including the special ones.
        hidden_size: width of a hidden state.
        num_hidden_layers: Transformer layers.
        num_attention_heads: heads of each layer; they share the width.
        intermediate_size: hidden units of each feed-forward.
        hidden_act: "relu" or "gelu", of the feed-forward.
        hidden_dropout_prob: dropout everywhere.
        max_position_embeddings: longest input in tokens, special tokens included.
        norm: "post" for layer norms after each residual sum, "pre" for layer norms before each sublayer.
        pad_token_id: positions with this token are ignored if there is no attention mask.
        tie_word_embeddings: whether the MLM decoder is the table of token embeddings.
    """

    model_type = "babybert"

    def __init__(
        self,
        vocab_size: int = 147_161,
        hidden_size: int = 10,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        intermediate_size: int = 2048,
        hidden_act: str = "relu",
        hidden_dropout_prob: float = 0.1,
        max_position_embeddings: int = 512,
        norm: str = "post",
        pad_token_id: int = 0,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.norm = norm
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)
