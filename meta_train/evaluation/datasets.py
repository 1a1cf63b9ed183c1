"""Data sets of benchmark tasks. No recipe of meta-training may read them; `tests/test_evaluation.py` checks this.

    fashion_mnist.npz, cifar10.npz    images, from the data folder
    china, flower                     two photographs that scikit-learn ships
    grace_hopper                      one that matplotlib ships
    auto_mpg                          a table that mlxtend ships
    scipy, torch, sympy               docstrings of the exports of these packages, by characters

References:
    Fashion-MNIST (Xiao et al., 2017), MIT; CIFAR-10 (Krizhevsky, 2009); Auto MPG (Quinlan, 1993), UCI, CC BY 4.0
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 20_000  # default number of training images
HELD = 2000  # default number of held-out images
CHARACTERS = 96  # vocabulary size; the last index is for all rare ones
TEXT = 1_000_000  # maximum characters of a text
NOISY = ("this", "conftest")  # modules that print when imported


@dataclass(frozen=True)
class Examples:
    """Inputs and targets, to train on and held out.

    Attributes:
        x: Inputs `(count, ...)`.
        y: Targets `(count, ...)`.
        held_x: Inputs `(held, ...)`.
        held_y: Targets `(held, ...)`.
    """

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor


@lru_cache(maxsize=4)
def images(folder: Path, file: str, side: int, most: int = MOST, held: int = HELD) -> Examples:
    """Standardised images `(count, channels, side, side)` and labels `(count,)`.

    Args:
        folder: The data folder.
        file: Its file with arrays `train_xSIDE`, `train_y`, `test_xSIDE` and `test_y`.
        side: Pixels.
        most: Maximum number of training images.
        held: Maximum number of test images, which are held out.
    """
    counts = {"train": most, "test": held}
    with np.load(folder / file) as found:
        shown, hidden = (torch.as_tensor(found[f"{p}_x{side}"][:n], dtype=torch.float32) for p, n in counts.items())
        labels, held_labels = (torch.as_tensor(found[f"{p}_y"][:n].astype(np.int64)) for p, n in counts.items())
    mean, deviation = shown.mean(), shown.std()
    shown, hidden = ((x - mean) / deviation for x in (shown, hidden))
    if shown.dim() == 3:  # noqa: PLR2004 - grey
        shown, hidden = shown.unsqueeze(1), hidden.unsqueeze(1)
    else:
        shown, hidden = shown.permute(0, 3, 1, 2).contiguous(), hidden.permute(0, 3, 1, 2).contiguous()
    return Examples(shown, labels[: len(shown)], hidden, held_labels[: len(hidden)])


@lru_cache(maxsize=2)
def docstrings(package: str) -> str:
    """The docstrings of the direct submodules of a package, at most a million characters."""
    found: dict[str, None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in sorted(pkgutil.iter_modules(importlib.import_module(package).__path__), key=lambda i: i.name):
            if info.name.startswith("_") or info.name in NOISY:
                continue
            try:
                module = importlib.import_module(f"{package}.{info.name}")
            except Exception:  # a dependency of the module is not installed
                continue
            exported = (vars(module)[name] for name in sorted(vars(module)) if not name.startswith("_"))
            found |= dict.fromkeys(text for thing in exported if callable(thing) and (text := inspect.getdoc(thing)))
    text = "\n".join(found)[:TEXT]
    assert len(text) > TEXT // 4, f"{package} has too few docstrings; was it compiled with -OO?"
    return text


@lru_cache(maxsize=2)
def characters(package: str) -> Tensor:
    """The docstrings of a package as character indices `(count,)` by falling frequency."""
    text = docstrings(package)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    values, counts = np.unique(codes, return_counts=True)
    ranks = np.full(int(values.max()) + 1, CHARACTERS - 1)
    common = values[np.lexsort((values, -counts))][: CHARACTERS - 1]
    ranks[common] = np.arange(len(common))
    return torch.as_tensor(ranks[codes])


@lru_cache(maxsize=2)
def photograph(name: str, side: int) -> Examples:
    """The pixels of a photograph with their positions as inputs; a tenth is held out.

    Args:
        name: "china", "flower" or "grace_hopper".
        side: Height and width after averaging, in pixels.

    Returns:
        Positions `(count, 2)` between -1 and 1, and colours `(count, 3)` of zero mean and unit variance.
    """
    image = torch.as_tensor(_photograph(f"{name}.jpg"), dtype=torch.float32).permute(2, 0, 1)
    small = F.adaptive_avg_pool2d(image, side).flatten(1).T  # (pixels, 3)
    axis = torch.linspace(-1, 1, side)
    order = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))
    x, y = torch.cartesian_prod(axis, axis)[order], ((small - small.mean(0)) / small.std(0))[order]
    train = side * side * 9 // 10
    return Examples(x[:train], y[:train], x[train:], y[train:])


def _photograph(file: str) -> npt.NDArray[np.uint8]:
    """The pixels of a photograph, `(height, width, 3)`."""
    if file == "grace_hopper.jpg":
        from matplotlib import cbook, image  # noqa: PLC0415 - an extra, needed by this photograph only

        return np.array(image.imread(cbook.get_sample_data(file, asfileobj=False)))
    from sklearn.datasets import load_sample_image  # noqa: PLC0415 - an extra, needed by the others only

    return np.array(load_sample_image(file))


@lru_cache(maxsize=1)
def auto_mpg() -> Examples:
    """Seven properties of 392 cars and their mileage, standardised."""
    from mlxtend.data import autompg_data  # noqa: PLC0415 - an extra, needed by this data set only

    found, miles = autompg_data()  # the last column is a name
    x, y = (torch.as_tensor(part, dtype=torch.float32) for part in (found[:, :7], miles))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order].unsqueeze(-1)
    x, y = ((part - part[:312].mean(0)) / part[:312].std(0) for part in (x, y))
    return Examples(x[:312], y[:312], x[312:], y[312:])


@lru_cache(maxsize=1)
def clusters() -> Examples:
    """8,000 points in 24 dimensions, of 8 classes of four clusters each, a tenth with a wrong label."""
    from sklearn.datasets import make_classification  # noqa: PLC0415 - an extra, needed by this data set only

    x, y = make_classification(
        8000,
        24,
        n_informative=12,
        n_redundant=6,
        n_classes=8,
        n_clusters_per_class=4,
        flip_y=0.1,
        class_sep=1.5,
        random_state=0,
    )
    inputs, labels = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)
    return Examples(inputs[:7000], labels[:7000], inputs[7000:], labels[7000:])
