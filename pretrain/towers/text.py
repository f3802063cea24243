"""The text tower: a transformers text encoder and the mean over its tokens."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from data_pipeline.settings import UserError
from pretrain.config import TextTowerConfig, TransformerConfig
from pretrain.towers.masks import at_least_one, masked_mean
from pretrain.towers.published import transformers_model
from pretrain.towers.torchvision_ops import allow_torchvision


class TextTower(nn.Module):
    """Tokens -> features [n, width]: the mean of the last layer over the tokens of a text.

    Raises:
        UserError: a published encoder whose vocabulary is smaller than the tokenizer's, or that takes fewer tokens.
    """

    def __init__(self, config: TextTowerConfig, vocab_size: int) -> None:
        super().__init__()
        if isinstance(config.encoder, TransformerConfig):
            self.encoder: Any = _bert(config.encoder, config.max_tokens, vocab_size)
        else:
            self.encoder = transformers_model(
                config.encoder.removeprefix("hf:"), config.pretrained, "towers.text.encoder"
            )
            _check_fits(self.encoder.config, config, vocab_size)
        self.width = int(self.encoder.config.hidden_size)

    def forward(
        self, token_ids: Int64[Tensor, "texts tokens"], token_mask: Bool[Tensor, "texts tokens"]
    ) -> Float[Tensor, "texts features"]:
        """Token ids and which of them count; a row where none does gives the features of the token 0."""
        token_ids = token_ids.masked_fill(~token_mask, 0)
        token_mask = at_least_one(token_mask)
        output = self.encoder(input_ids=token_ids, attention_mask=token_mask.long()).last_hidden_state
        return masked_mean(output, token_mask)


def _check_fits(published: object, config: TextTowerConfig, vocab_size: int) -> None:
    known, longest = getattr(published, "vocab_size", 0), getattr(published, "max_position_embeddings", None)
    if known < vocab_size:
        raise UserError(
            f"towers.text.tokenizer {config.tokenizer} has {vocab_size} tokens, {config.encoder} knows {known}: "
            f"expected the encoder's own tokenizer, {config.encoder}"
        )
    if longest is not None and config.max_tokens > longest:
        raise UserError(f"towers.text.max_tokens {config.max_tokens}: {config.encoder} takes at most {longest}")


def _bert(config: TransformerConfig, max_tokens: int, vocab_size: int) -> nn.Module:
    allow_torchvision()
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=round(config.width * config.mlp_ratio),
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=max_tokens,
            type_vocab_size=1,
        ),
        add_pooling_layer=False,
    )
    assert isinstance(model, nn.Module)
    return model
