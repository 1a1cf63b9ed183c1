"""Random permutations of hidden neurons, another one for every network of a batch.

They are augmentation for networks over weights that are not equivariant, and a test for those that are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.expression import axes_of


def random_orbit(
    features: Mapping[str, Tensor], symmetry: Symmetry, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The same networks, the hidden neurons of each in another random order.

    Args:
        features: Name -> `(N, *shape, ...)`; channels or nothing may follow.
        symmetry: The tensors and their axes.
        generator: Of the permutations.

    Returns:
        Name -> `(N, *shape, ...)`.
    """
    count = len(next(iter(features.values())))
    if symmetry.nested:
        each = [symmetry.random_permutations(generator) for _ in range(count)]
        rows = [symmetry.permute({name: x[n] for name, x in features.items()}, each[n]) for n in range(count)]
        return {name: torch.stack([row[name] for row in rows]) for name in features}
    permutations = {  # axis -> (N, size)
        axis: torch.rand(count, symmetry.sizes[axis], generator=generator).argsort(-1) for axis in symmetry.free
    }
    return {name: _permuted(x, symmetry, name, permutations) for name, x in features.items()}


def _permuted(x: Tensor, symmetry: Symmetry, name: str, permutations: Mapping[str, Tensor]) -> Tensor:
    """One tensor, `(N, *shape, ...)`, by permutations `(N, size)`."""
    for d, expression in enumerate(symmetry.expressions_of(name), 1):
        if not any(axis in permutations for axis in axes_of(expression)):
            continue
        index = torch.arange(x.shape[d]).repeat(len(x), 1)  # (N, length)
        for o in symmetry.occurrences_of(expression):
            if o.axis in permutations:
                index[:, o.rows] += (permutations[o.axis][:, o.entries] - o.entries) * o.stride
        along = index.to(x.device).reshape(len(x), *(1,) * (d - 1), -1, *(1,) * (x.dim() - d - 1))
        x = x.gather(d, along.expand(x.shape))
    return x
