"""However a tensor is sharded, partial sums add up to the sum; two real processes are in integrations/."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from nfn_optim.engine.sharding import Shard, Shards, all_processes, local

MESH: Any = None  # nothing is communicated
CUTS = {
    "whole": ((7, 5), ([0, 7], [0, 5])),
    "rows, unevenly": ((7, 5), ([0, 4, 7], [0, 5])),
    "rows, one part empty": ((1, 5), ([0, 1, 1], [0, 5])),
    "columns": ((7, 5), ([0, 7], [0, 2, 4, 5])),
    "rows and columns": ((7, 5), ([0, 3, 7], [0, 2, 5])),
    "a vector": ((7,), ([0, 4, 7],)),
    "a kernel": ((4, 3, 3, 3), ([0, 2, 4], [0, 3], [0, 3], [0, 3])),
    "a scalar": ((), ()),
}


def pool(x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Sums of numbers and of their squares, over the rest of every dimension and over all."""
    products = torch.stack([x, x.square()], -1)
    others = [tuple(other for other in range(x.dim()) if other != d) for d in range(x.dim())]
    return [products.sum(dims) if dims else products for dims in others], products.reshape(-1, 2).sum(0)


@pytest.mark.parametrize("cut", CUTS)
def test_partial_sums_add_up(cut: str) -> None:
    shape, borders = CUTS[cut]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, whole = pool(x)
    totals = [torch.zeros_like(x) for x in (*rows, whole)]
    for spans in itertools.product(*([slice(*pair) for pair in itertools.pairwise(cuts)] for cuts in borders)):
        shard = Shard(MESH, shape, spans, is_primary=True)
        for total, part in zip(totals, shard.partial_sums(pool(x[spans])), strict=True):
            total.add_(part)
    for total, expected in zip(totals, (*rows, whole), strict=True):
        torch.testing.assert_close(total, expected)


def test_a_replica_does_not_count() -> None:
    x = torch.randn(4, 3)
    shard = Shard(MESH, (4, 3), (slice(0, 4), slice(0, 3)), is_primary=False)
    parts = shard.partial_sums(pool(x))
    assert [part.shape for part in parts] == [(4, 2), (3, 2), (2,)]
    assert not any(part.any() for part in parts)


def test_plain_tensors_are_whole() -> None:
    x = torch.randn(4, 3)
    assert Shards.of({"x": x}) is None
    assert local(x) is x
    assert all_processes(True, [x])
    assert not all_processes(False, [x])
