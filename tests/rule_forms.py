"""The kinds of update rules, and tensors of several shapes to take steps of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nfn_optim import RuleConfig, Symmetry

SYMMETRY = Symmetry(
    {"k": ("c", "in", "ky", "kx"), "kb": ("c",), "w": ("h", "(c y)"), "b": ("h",), "v": ("out", "h"), "s": ()},
    {"c": 3, "in": 2, "ky": 2, "kx": 1, "h": 4, "y": 2, "out": 2},
    frozenset({"in", "ky", "kx", "y", "out"}),
)
FORMS = ("adam", "skip only", "orthogonal", "mixture")
"""Adam's direction; the same without hidden channels; and the orthogonal direction with step-size adaptation, of a rank
so low that all matrices need a basis; and that with a mixture and whitened momentum before singular values are made
equal, and a rank at which "k" and "v" are exact and "w" needs a basis."""


def draw(seed: int, *batch: int) -> dict[str, Tensor]:
    """Normal values in float64 by name."""
    torch.manual_seed(seed)
    return {n: torch.randn((*batch, *SYMMETRY.shape_of(n)), dtype=torch.float64) for n in SYMMETRY.dims}


def config_of(form: str, **config: Any) -> RuleConfig:
    """One of `FORMS`."""
    forms: dict[str, dict[str, Any]] = {
        "adam": {},
        "skip only": {"hidden": 0, "rounds": 0},
        "orthogonal": {"direction": "orthogonal", "rank": 2, "adapt_rate": 4.0},
    }
    forms["mixture"] = forms["orthogonal"] | {
        "rank": 3,
        "exact": True,
        "mixes": True,
        "gradient_part": 0.2,
        "shrinkage": 0.2,
        "whitening": 0.4,
        "beta1": 0.8,
        "beta2": 0.99,
    }
    return RuleConfig(**config | forms[form])
