"""Executors: the passes of one step over all blocks of a network, pure or in place.

`PureExecutor` computes moments and features once and keeps them; everything is differentiable and batched.
`InPlaceExecutor` writes into parameters and moments. It goes over a tensor in tiles of rows, which bounds the memory
held at a time whatever the size of the tensor, and recomputes features in every pass; only those of the smallest blocks
are cached. Compiled, each pass over a tile is one loop over its weights: a few graphs for each kind of array (matrices,
vectors, an odd last tile) and dtype, whatever the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from nfn_optim.engine import passes
from nfn_optim.engine.blocks import Block
from nfn_optim.engine.inductor import Run, run
from nfn_optim.engine.passes import ALL_TERMS, Terms
from nfn_optim.engine.weight_features import Features

ROW_UNROLL = 2  # rows that are added up in registers before their sum is stored; divides the size of tiles
LowRank = tuple[Tensor, Tensor | None]
"""A direction of low rank as two factors, `(*batch, rows, k)` and `(*batch, k, rest)`; None for the identity: then X is
included."""

Mixture = Mapping[int, Tensor]
"""By index of the block: parts of the slow direction and of the newest gradient in X, see `passes.mix`."""


class Executor(Protocol):
    """The reading passes of one step; `index` is that of a block."""

    blocks: Sequence[Block]

    def sums(self, index: int) -> tuple[Tensor, Tensor]:
        """Sums of `Statistics` over rows and over columns, see `passes.sums_of`."""

    def project(
        self, index: int, basis: Tensor | None, mixture: Tensor | None, momentum: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The direction X in a subspace, X basis, `(*batch, rows, k)`; sums of squares of X, `(*batch, rows)`.

        Args:
            index: Of the block.
            basis: `(*batch, rest, k)`; None for the identity.
            mixture: Of which X is made, see `passes.mix`.
            momentum: Whether a third result is the momentum in the subspace, shaped as the first; else it is None.
        """

    def project_back(self, index: int, left: Tensor, mixture: Tensor | None) -> Tensor:
        """X^T left, `(*batch, rest, k)`, for a matrix `(*batch, rows, k)`; X as in `project`."""

    def compiles(self, size: int) -> bool:
        """Whether functions of O(neurons) tensors over this many numbers are to be compiled."""

    def run(self, function: Callable[..., Any], *args: Any, dynamic: bool = True) -> Any:
        """Call a function that is to be compiled, see `nfn_optim.engine.inductor.run`."""


class PureExecutor:
    """Differentiable passes over batched blocks.

    Args:
        blocks: All blocks of the network.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._cache = [passes.moments_and_features(*block.arrays) for block in blocks]

    def sums(self, index: int) -> tuple[Tensor, Tensor]:
        """See `Executor`."""
        return passes.sums_of(self._cache[index][1].all())

    def project(
        self, index: int, basis: Tensor | None, mixture: Tensor | None, momentum: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Executor`."""
        x = passes.mix(self._cache[index][1], mixture)
        return _project(x, self._cache[index][1], self.blocks[index].arrays[1], basis, mixture, momentum)

    def project_back(self, index: int, left: Tensor, mixture: Tensor | None) -> Tensor:
        """See `Executor`."""
        return passes.mix(self._cache[index][1], mixture).mT @ left

    def compiles(self, size: int) -> bool:
        """See `Executor`; a pure step is never compiled."""
        del size
        return False

    def run(self, function: Callable[..., Any], *args: Any, dynamic: bool = True) -> Any:
        """See `Executor`."""
        del dynamic
        return function(*args)

    def update(
        self, index: int, row_coeffs: Tensor, column_gain: Tensor | None, low_rank: LowRank | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The update and the new moments of a block; arguments as of `passes.compute_update`."""
        moments, features = self._cache[index]
        p = self.blocks[index].arrays[0]
        return passes.compute_update(features, p, row_coeffs, column_gain, _whole(low_rank)), moments


@dataclass(frozen=True)
class Execution:
    """How passes in place are run.

    Args:
        compiled: Compile them at their first use; needs a C++ compiler on a CPU. Where compilation fails, one warning,
            and everything continues uncompiled.
        background: Compile in the background; uncompiled until then.
        run: How a function to be compiled is called.
        terms: Of which updates may be made.
        tile: Weights per tile; some 16 numbers are held for each.
        compile_from: Arrays of fewer weights are not compiled, since calls dominate their cost; those of one shape are
            stacked.
        grads_finite: 0-d; where False the step changes nothing. None: True.
    """

    compiled: bool = False
    tile: int = 2**18
    compile_from: int = 2**14
    grads_finite: Tensor | None = None
    background: bool = False
    run: Run = run
    terms: Terms = ALL_TERMS

    def pays(self, size: int) -> bool:
        """Whether a function over this many numbers is compiled."""
        return self.compiled and size >= self.compile_from


class InPlaceExecutor:
    """Passes that change parameters and moments; without batch dimensions, nothing is differentiated.

    Args:
        blocks: All blocks of the network. Small matrices may be stacks, `(count, rows, rest)` for `(rows, rest)`.
        execution: How passes are run.
    """

    def __init__(self, blocks: Sequence[Block], execution: Execution) -> None:
        self.blocks = blocks
        self._execution = execution
        self._cache = {index: passes.moments_and_features(*blocks[index].arrays) for index in self._cached()}

    def sums(self, index: int) -> tuple[Tensor, Tensor]:
        """See `Executor`."""
        if index in self._cache:
            return passes.sums_of(self._cache[index][1].all())
        p, g, moments, constants = self.blocks[index].arrays
        by_row, by_column, compiles = [], [], self._compiles(p)
        for rows in self._tiles(p):
            tile_p, tile_g, *tile_moments = (_dense(x[rows]) if compiles else x[rows] for x in (p, g, *moments))
            tile_constants = _rows(constants, rows)
            if compiles:
                row_unroll = ROW_UNROLL if len(tile_p) % ROW_UNROLL == 0 and len(constants) == 1 else 1
                partial_sums = self.run(passes.reduce_pass, tile_p, tile_g, tile_moments, tile_constants, row_unroll)
                row_sums, column_sums = passes.finish_sums(*partial_sums)
            else:
                features = passes.moments_and_features(tile_p, tile_g, tile_moments, tile_constants)[1]
                row_sums, column_sums = passes.sums_of(features.all())
            by_row.append(row_sums)
            by_column.append(column_sums)
        return by_row[0] if len(by_row) == 1 else torch.cat(by_row), sum(by_column[1:], by_column[0])

    def project(
        self, index: int, basis: Tensor | None, mixture: Tensor | None, momentum: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Executor`."""
        p, g, _, constants = self.blocks[index].arrays
        if index in self._cache:
            x = passes.mix(self._cache[index][1], mixture, self._execution.terms)
            return _project(x, self._cache[index][1], g, basis, mixture, momentum)
        projected = constants.new_empty((*p.shape[:-1], (p if basis is None else basis).shape[-1]))
        energy = constants.new_empty(p.shape[:-1])
        of_momentum = torch.empty_like(projected) if momentum else None
        for rows, x, squares, m in self._directions(index, mixture, momentum):
            _into(projected[rows], x, basis)
            energy[rows] = squares
            if of_momentum is not None and m is not None:
                _into(of_momentum[rows], m, basis)
        return projected, energy, of_momentum

    def project_back(self, index: int, left: Tensor, mixture: Tensor | None) -> Tensor:
        """See `Executor`."""
        if index in self._cache:
            return passes.mix(self._cache[index][1], mixture, self._execution.terms).mT @ left
        p = self.blocks[index].arrays[0]
        result = left.new_zeros((*p.shape[:-2], p.shape[-1], left.shape[-1]))
        for rows, x, *_ in self._directions(index, mixture, False):
            result += (left[rows].mT @ x).mT  # in this order the product is faster
        return result

    def compiles(self, size: int) -> bool:
        """See `Executor`."""
        return self._execution.pays(size)

    def run(self, function: Callable[..., Any], *args: Any, dynamic: bool = True) -> Any:
        """See `Executor`."""
        return self._execution.run(function, *args, dynamic=dynamic)

    def apply_(
        self,
        index: int,
        row_coeffs: Tensor,
        column_gain: Tensor | None,
        low_rank: LowRank | None,
        frozen: bool,
        covered: Terms = frozenset(),
    ) -> None:
        """Change a block's arrays, but the parameters not if `frozen`; arguments as of `passes.compute_update`.

        Features in `covered` are in the direction already.
        """
        p, g, moments, constants = self.blocks[index].arrays
        grads_finite, terms = self._execution.grads_finite, self._execution.terms - covered
        if index in self._cache:
            new, features = self._cache[index]
            direction = _whole(low_rank)
            update = None
            if not frozen:
                update = passes.compute_update(features, p, row_coeffs, column_gain, direction, terms)
            passes.store_(p, g, moments, constants, update, new, grads_finite)
            return
        compiles = self._compiles(p)
        apply_ = partial(self.run, passes.apply_) if compiles else passes.apply_
        holds = low_rank is not None or not compiles or not p.is_contiguous()
        tiles = [*self._tiles(p)] if holds else [slice(None)]
        right = None if low_rank is None else low_rank[1]
        buffer = constants.new_empty(0 if right is None else p[tiles[0]].shape)  # the first is the largest
        for rows in tiles:
            views = [x[rows] for x in (p, g, *moments)]
            tile = [_dense(x) for x in views] if compiles else views
            tile_p, tile_g, *tile_moments = tile
            direction = None if low_rank is None else low_rank[0][rows]
            if direction is not None and right is not None:
                direction = torch.matmul(direction, right, out=buffer[: len(tile_p)])
            arrays = tile_p, tile_g, tile_moments, _rows(constants, rows), _rows(row_coeffs, rows)
            apply_(*arrays, column_gain, direction, frozen, terms, grads_finite, not compiles)
            for view, value in zip((views[0], *views[2:]), (tile_p, *tile_moments), strict=True):
                if value is not view:
                    view.copy_(value)

    def _directions(
        self, index: int, mixture: Tensor | None, momentum: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Tile by tile: which rows, and `passes.mixed_direction` of them."""
        p, g, moments, constants = self.blocks[index].arrays
        compiles = self._compiles(p)
        direction = partial(self.run, passes.mixed_direction) if compiles else passes.mixed_direction
        mixture = _dense(mixture) if compiles and mixture is not None else mixture
        for rows in self._tiles(p):
            tile_p, tile_g, *tile_moments = (_dense(x[rows]) if compiles else x[rows] for x in (p, g, *moments))
            of_rows = _rows(constants, rows), None if mixture is None else _rows(mixture, rows)
            yield rows, *direction(tile_p, tile_g, tile_moments, *of_rows, momentum, self._execution.terms)

    def _cached(self) -> list[int]:
        """Indices of the smallest blocks, whose features are cached instead of recomputed; at most `tile` weights."""
        params = [block.arrays[0] for block in self.blocks]
        cached, weights = [], 0
        for index in sorted(range(len(params)), key=lambda index: params[index].numel()):
            weights += params[index].numel()
            if weights > self._execution.tile or self._compiles(params[index]):
                break
            cached.append(index)
        return cached

    def _tiles(self, p: Tensor) -> Iterator[slice]:
        """Tiles of the rows of an array, of at least `ROW_UNROLL` rows; a stack is one tile."""
        if p.dim() > 2:  # noqa: PLR2004 - rows and rest
            yield slice(None)
            return
        rows, rest = p.shape
        step = max(self._execution.tile // max(rest, 1) // ROW_UNROLL, 1) * ROW_UNROLL
        for start in range(0, rows, step) or (0,):  # an empty shard is one empty tile
            yield slice(start, min(start + step, rows))

    def _compiles(self, p: Tensor) -> bool:
        """Whether passes over these weights are compiled."""
        return p.dim() == 2 and self._execution.pays(p.numel())  # noqa: PLR2004 - no stack


def _project(
    x: Tensor, features: Features, g: Tensor, basis: Tensor | None, mixture: Tensor | None, momentum: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Executor.project` of a block with this direction, these features and gradients."""
    m = passes.mix_momentum(features, g, mixture) if momentum else None
    squares = x.square().sum(-1)
    return (x, squares, m) if basis is None else (x @ basis, squares, None if m is None else m @ basis)


def _into(result: Tensor, x: Tensor, basis: Tensor | None) -> None:
    """Write X basis; X where the basis is the identity."""
    if basis is None:
        result.copy_(x)
    else:
        torch.matmul(x, basis, out=result)


def _whole(low_rank: LowRank | None) -> Tensor | None:
    """The product of both factors."""
    return None if low_rank is None else low_rank[0] if low_rank[1] is None else low_rank[0] @ low_rank[1]


def _dense(x: Tensor) -> Tensor:
    """The same, contiguous: compiled passes need that, and some columns, or the gradient of a sum, are not."""
    return x if x.is_contiguous() else x.contiguous()


def _rows(value: Tensor, rows: slice) -> Tensor:
    """Some rows of `(rows or 1, channels)`; a single row is for all."""
    return value[rows] if len(value) > 1 else value
