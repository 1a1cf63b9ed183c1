"""Text by characters.

prose          reference documentation in Python's library (`pydoc_data.topics`), PSF licence
code           sources of Python's library, PSF licence
shakespeare    `tinyshakespeare.txt` in the data folder (`meta_train.tasks.folder`), public domain
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from meta_train.tasks.data import Data
from meta_train.tasks.folder import in_folder
from meta_train.tasks.task import Tensors

SOURCES = (
    "argparse",
    "doctest",
    "inspect",
    "optparse",
    "pdb",
    "tarfile",
    "turtle",
    "typing",
    "unittest.mock",
    "zipfile",
)
VOCABULARY = 64  # distinct characters; rare ones share the last index


def prose() -> str:
    """Technical English."""
    from pydoc_data.topics import topics  # noqa: PLC0415 - large, needed by this text only

    return "\n".join(topics.values())


def code() -> str:
    """Python."""
    origins = [spec.origin for name in SOURCES if (spec := find_spec(name)) and spec.origin]
    return "\n".join(Path(path).read_text(encoding="utf-8") for path in origins if path.endswith(".py"))


def shakespeare() -> str:
    """Plays.

    Raises:
        FileNotFoundError: There is no data folder, or it has no `tinyshakespeare.txt`.
    """
    return in_folder("tinyshakespeare.txt").read_text(encoding="utf-8")


TEXTS: dict[str, Callable[[], str]] = {text.__name__: text for text in (prose, code, shakespeare)}


@lru_cache(maxsize=8)
def tokens_of(name: str, vocabulary: int = VOCABULARY, device: str = "cpu") -> Tensor:
    """A text as indices `(length,)`, int64: the frequency rank of a character, the last one for all rare ones."""
    if device != "cpu":
        return tokens_of(name, vocabulary).to(device)
    text = TEXTS[name]()
    rank = {character: i for i, (character, _) in enumerate(Counter(text).most_common(vocabulary - 1))}
    return torch.tensor([rank.get(character, vocabulary - 1) for character in text])


@dataclass(frozen=True)
class Text(Data):
    """Passages of a text with the following characters as targets.

    Args:
        name: One of `TEXTS`. The last tenth of the text is held out.
        context: Characters per passage.
        every_position: Whether every position has a target, its next character, or only the last one.
        classes: Vocabulary size; all rare characters share one class.
        device: Device of the text.

    Example:
        >>> batch = Text("prose", context=8).batch((2, 3), torch.Generator().manual_seed(0))
        >>> batch["x"].shape, bool((batch["x"][..., 1:] == batch["y"][..., :-1]).all())
        (torch.Size([2, 3, 8]), True)
    """

    name: str
    context: int
    every_position: bool = True
    classes: int = VOCABULARY
    device: str = "cpu"

    def batch(self, size: tuple[int, int], generator: torch.Generator, *, held_out: bool = False) -> Tensors:
        """Draw passages: `x` `(*size, context)`; `y` the same or, if not `every_position`, `(*size,)`."""
        tokens = tokens_of(self.name, self.classes, self.device)
        border = len(tokens) * 9 // 10
        tokens = tokens[border:] if held_out else tokens[:border]
        start = torch.randint(len(tokens) - self.context, size, generator=generator)
        index = start.unsqueeze(-1) + torch.arange(self.context + 1)
        passage = tokens[index.to(self.device)]  # (*size, context + 1)
        return {"x": passage[..., :-1], "y": passage[..., 1:] if self.every_position else passage[..., -1]}

    def to(self, device: torch.device) -> Text:
        """The same text on a device."""
        return replace(self, device=str(device))
