"""Sequence models built from the layers of torch."""

from __future__ import annotations

import torch
from real_model import BATCH, TOKENS, WORDS, RealModel
from torch import Tensor, nn
from torch.nn import functional as F


def _ids() -> Tensor:
    return torch.randint(0, WORDS, (BATCH, TOKENS))


class RecurrentLanguageModel(nn.Module):
    """Predicts the next word with an embedding and two recurrent layers."""

    def __init__(self, recurrent: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12)
        self.recurrent = recurrent(12, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.embed(ids))
        logits: Tensor = self.head(hidden)  # (batch, token, word)
        return logits


class Translator(nn.Module):
    """nn.Transformer between an embedding and an output layer, as in PyTorch's translation tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.position = nn.Parameter(torch.randn(TOKENS, 16))
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
        self.head = nn.Linear(16, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position  # (batch, token, channel)
        mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
        logits: Tensor = self.head(self.transformer(x, x, tgt_mask=mask, tgt_is_causal=True))
        return logits


def _words(logits: Tensor) -> Tensor:
    """Cross-entropy of logits (batch, token, word) with the words 0, 1, ..."""
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(BATCH * TOKENS) % WORDS)


TORCH = (
    RealModel("torch.LSTM", lambda: RecurrentLanguageModel(nn.LSTM), _ids, _words),
    RealModel("torch.GRU", lambda: RecurrentLanguageModel(nn.GRU), _ids, _words),
    RealModel("torch.RNN", lambda: RecurrentLanguageModel(nn.RNN), _ids, _words),
    RealModel("torch.Transformer", Translator, _ids, _words),
)
