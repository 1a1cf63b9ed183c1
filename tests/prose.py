"""Text that everybody has, and a language model that begins to learn it in a few steps."""

from __future__ import annotations

import argparse
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TOKENS = 32


@cache
def windows() -> Tensor:
    """The source of a module of the standard library as bytes, `(windows, TOKENS)`."""
    source = Path(argparse.__file__).read_bytes()
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long()[: 256 * TOKENS].reshape(-1, TOKENS)


class Prose(Dataset[dict[str, Tensor]]):
    """What `transformers.Trainer` takes."""

    def __len__(self) -> int:
        return len(windows())

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": windows()[index], "labels": windows()[index]}


def language_model() -> nn.Module:
    """GPT-2 over bytes with one layer, always with the same weights."""
    import transformers  # seconds, so not before it is needed

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=TOKENS, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model
