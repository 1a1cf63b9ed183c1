"""Small tables from scikit-learn, and random teacher networks.

References:
    Breast Cancer Wisconsin (Wolberg et al., 1995) and Wine (Aeberhard and Forina, 1992), UCI, CC BY 4.0
    Least Angle Regression (Efron et al., 2004): diabetes
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from meta_train.tasks.activation import ACTIVATIONS
from meta_train.tasks.data import Examples
from meta_train.tasks.perceptron import Perceptron

TEACHER_EXAMPLES = 4096


@lru_cache(maxsize=1)
def breast_cancer() -> Examples:
    """30 measurements of 569 tumours, 2 classes."""
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415 - an extra, needed by this data set only

    return _table("breast_cancer", load_breast_cancer(), 2)


@lru_cache(maxsize=1)
def wine() -> Examples:
    """13 measurements of 178 wines, 3 classes."""
    from sklearn.datasets import load_wine  # noqa: PLC0415 - an extra, needed by this data set only

    return _table("wine", load_wine(), 3)


@lru_cache(maxsize=1)
def diabetes() -> Examples:
    """10 measurements of 442 patients; disease progression, standardised."""
    from sklearn.datasets import load_diabetes  # noqa: PLC0415 - an extra, needed by this data set only

    return _table("diabetes", load_diabetes(), 0)


TABLES: dict[str, Callable[[], Examples]] = {t.__name__: t for t in (breast_cancer, wine, diabetes)}


def teacher(seed: int) -> Examples:
    """A random teacher network on normal inputs: 4 to 32 inputs, 1 to 4 standardised outputs.

    Args:
        seed: Of the network and the inputs.

    Example:
        >>> teacher(0).y.std(0).round(decimals=3)
        tensor([1.])
    """
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    sizes = (integer(4, 32), integer(4, 32), integer(4, 32), integer(1, 4))
    network = Perceptron(sizes, list(ACTIVATIONS)[integer(0, len(ACTIVATIONS) - 1)])
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (3 / p.shape[-1]) ** 0.5)
        x = torch.randn(TEACHER_EXAMPLES, sizes[0], generator=generator)
        return Examples(f"teacher-{seed}", x, _standardised(network(x)), 0, TEACHER_EXAMPLES * 4 // 5)


def _table(name: str, bunch: Any, classes: int) -> Examples:
    """A shuffled table; the last fifth is held out."""
    order = torch.randperm(len(bunch.data), generator=torch.Generator().manual_seed(0))
    x = _standardised(torch.as_tensor(bunch.data, dtype=torch.float32)[order])
    y = torch.as_tensor(bunch.target)[order]
    y = y.to(torch.int64) if classes else _standardised(y.to(torch.float32).unsqueeze(1))
    return Examples(name, x, y, classes, len(x) * 4 // 5)


def _standardised(columns: Tensor) -> Tensor:
    """Every column with zero mean and unit variance. `(count, columns)`."""
    return (columns - columns.mean(0)) / columns.std(0).clamp(min=1e-6)
