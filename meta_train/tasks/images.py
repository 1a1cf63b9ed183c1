"""Small real images that travel inside packages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images with labels.

    Attributes:
        images: `(count, channels, height, width)`, float32, zero mean and unit variance over the set.
        labels: `(count,)`, int64.
        classes: Number of classes.
    """

    images: Tensor
    labels: Tensor
    classes: int


@lru_cache(maxsize=1)
def digits() -> ImageSet:
    """The first 1,500 of the 1,797 handwritten digits of 8x8 pixels in scikit-learn; the others are never trained on.

    Source: Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), UCI, CC BY 4.0.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra, needed by this data set only

    found = load_digits()
    images = torch.as_tensor(found.images[:1500], dtype=torch.float32).unsqueeze(1)
    return ImageSet((images - images.mean()) / images.std(), torch.as_tensor(found.target[:1500]), 10)
