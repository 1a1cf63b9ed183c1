"""The orthogonal direction of a matrix: X, with equal singular values inside of a subspace.

With X the mixed direction (`nfn_optim.rule.direction`), `(rows, rest)`, U the basis of its subspace and Z = X U
(`nfn_optim.rule.subspace`),

    P = Z' (Z'^T Z')^(-1/2)                   with Z' = Z, or with whitened momentum mixed in (`whitening`)
    D = sqrt(max(rows, rest)) (P U^T + (X - Z U^T) / tau)

Inside of the subspace all singular values of D are equal; outside, where tau is the root mean square of those of X,
they keep their proportions. In a matrix of at most k columns D is orthogonal, if the direction is `exact` in one of at
most k rows too; if it has fewer rows than columns,
P = (Z' Z'^T)^(-1/2) Z', which is the same. The root mean square of D is about 1, and that of a row at most MAX_ROW_RMS:
a longer row is shortened. Rows and columns without gradients do not count (`nfn_optim.rule.pooled`).
Computed from Z, O(neurons k) numbers, D costs 4 k operations per weight, 2 k more with whitening and 2 k more where the
basis moves, instead of thousands. D commutes with permuting rows and columns. It is not differentiated with respect to
U, on which it does not depend where X has no more than k singular values. Vectors follow X.

References:
    Muon (Jordan et al., 2024): the motivation
    Dion: Distributed Orthonormalized Updates (Ahn et al., 2025), arXiv:2504.05295: the subspace
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from nfn_optim.engine.blocks import Stack
from nfn_optim.engine.executor import Executor, LowRank, Mixture
from nfn_optim.engine.sharding import Shards
from nfn_optim.rule.direction import Direction, StepDirection, mixed
from nfn_optim.rule.inverse_root import MINIMAX, REPEATED, Polynomials, inverse_roots
from nfn_optim.rule.pooled import Pooled, soft_count
from nfn_optim.rule.step import Step
from nfn_optim.rule.subspace import STATE_KEY, Projection, Subspaces, basis_shape
from nfn_optim.rule.whitening import GRAM, MAX_COLUMNS, WHITENER, init_whitener, next_whiteners, whiten

COLUMNS = "active_columns"
SIZE = 0.5  # root mean square of the orthogonal direction in the update, about that of Adam's when gradients agree
MAX_ROW_RMS = 2.5  # of a row of D
MIN_TAIL = 0.1  # what is outside of the subspace is amplified at most ten times as much as what is inside
MIN_RMS = 1e-4  # an X of smaller root mean square is not amplified: it counts as zero


@dataclass(frozen=True)
class OrthogonalFactors:
    """The orthogonal direction of a matrix, SIZE D = left U^T + tail_gain X.

    Attributes:
        root: P = Z' root, up to a factor; `(*batch, k, k)`.
        equaliser: SIZE sqrt(max(rows, rest)) root.
        tail_gain: `(*batch,)`; None where nothing is outside of the subspace.
        of_rows: Whether P = root Z' instead, root `(*batch, rows, rows)`.
    """

    root: Tensor
    equaliser: Tensor
    tail_gain: Tensor | None
    of_rows: bool

    def left(self, equalised: Tensor, projected: Tensor) -> Tensor:
        """Of some rows, `(*batch, rows, k)`; of all, if `of_rows`.

        Args:
            equalised: Z', `(*batch, rows, k)`.
            projected: Z, the same shape.
        """
        left = self.equaliser @ equalised if self.of_rows else equalised @ self.equaliser
        return left if self.tail_gain is None else left - self.tail_gain[..., None, None] * projected


class OrthogonalDirection(Direction):
    """A mean of X and the orthogonal direction, (1 - w) X + w D for matrices; w is learned and starts at 1.

    Args:
        rank: k, the largest dimension of a subspace.
        exact: Whether a matrix of at most k rows needs no subspace either.
        whitening: a, initial part of the whitened momentum in Z' (`nfn_optim.rule.whitening`); learned. 0 leaves it
            out.
        minimax: Whether inverse roots are computed by `MINIMAX` polynomials, else by `REPEATED` ones.
    """

    terms: ClassVar[int] = 2

    def __init__(self, rank: int, exact: bool = False, whitening: float = 0.0, minimax: bool = False) -> None:
        super().__init__()
        self.rank, self.exact, self.polynomials = rank, exact, MINIMAX if minimax else REPEATED
        self.orthogonal_weight = nn.Parameter(torch.tensor(1.0))
        self.whitening = nn.Parameter(torch.tensor(whitening)) if whitening else None

    def init_state(self, p: Tensor, batch_dims: int) -> dict[str, Tensor]:
        """Of a matrix the number of its columns; the basis, where one is needed, and of whitening: all zeros."""
        batch, shape = p.shape[:batch_dims], p.shape[batch_dims:]
        if len(shape) < 2:  # noqa: PLR2004 - a matrix has two dimensions
            return {}
        dtype = torch.promote_types(p.dtype, torch.float32)
        state = {COLUMNS: torch.full(batch, float(shape[1:].numel()), dtype=dtype, device=p.device)}
        if (basis := basis_shape(self.rank, shape, self.exact)) is not None:
            state[STATE_KEY] = torch.zeros((*batch, *basis), dtype=dtype, device=p.device)
        size = shape[1:].numel() if basis is None else basis[-1]
        if self.whitening is not None and size <= MAX_COLUMNS * self.rank:
            state |= init_whitener(p, batch, size)
        return state

    def terms_of(self, coefficient: Tensor, enabled: Tensor) -> list[Tensor]:
        """See `Direction`."""
        weight = enabled * self.orthogonal_weight.unsqueeze(-1)
        return [coefficient * (1 - weight), coefficient * weight]

    def rms_bound(self, rms: Tensor, is_matrix: Tensor) -> Tensor:
        """See `Direction`."""
        weight = is_matrix * self.orthogonal_weight.unsqueeze(-1)
        return rms * (1 - weight).abs() + SIZE * MAX_ROW_RMS * weight.abs()

    def prepare(
        self,
        executor: Executor,
        step: Step,
        shards: Shards | None,
        pooled: Pooled | None,
        mixture: Mixture,
    ) -> StepDirection:
        """Project every matrix; see `Direction`."""
        names, state = step.names, step.state
        subspaces = Subspaces(names, executor, shards)
        if pooled is not None:
            columns = pooled.columns()
        else:
            columns = torch.stack([state[name].get(COLUMNS, state[name]["step"]) for name in names], -1)
        whitened = {name for name in names if WHITENER in state[name]}
        projections = subspaces.project(state, columns, mixture, whitened)
        for index, x in projections.items():
            if x.momentum is not None and self.whitening is not None:
                layout = executor.blocks[index].layout
                whitener = layout.gather_rows([state[names[i]][WHITENER] for i in layout.indices])
                projections[index] = replace(x, whitened=whiten(x.projected, x.momentum, whitener, self.whitening))
        factors = orthogonal_factors(list(projections.values()), step.batch_dims, self.polynomials)
        factors_of = dict(zip(projections, factors, strict=True))
        return OrthogonalStep(step, columns, mixture, subspaces, projections, factors_of, self.polynomials)


@dataclass(frozen=True)
class OrthogonalStep(StepDirection):
    """The orthogonal directions of all matrices at one step.

    Attributes:
        step: The step.
        columns: Soft counts of the columns of all tensors, `(*batch, T)`.
        mixture: Of which X is made, by index of the block.
        subspaces: Of the network.
        projections: By index of the block.
        factors: Likewise.
        polynomials: Of inverse roots.
    """

    step: Step
    columns: Tensor
    mixture: Mixture
    subspaces: Subspaces
    projections: Mapping[int, Projection]
    factors: Mapping[int, OrthogonalFactors]
    polynomials: Polynomials

    def combine(self, index: int, coefficients: Tensor) -> tuple[Tensor, LowRank | None]:
        """See `StepDirection`."""
        x, orthogonal, others = coefficients[..., :1], coefficients[..., 1:2], coefficients[..., 2:]
        if index not in self.factors:  # vectors
            return mixed(torch.cat([x, others], -1)), None
        factors, projection = self.factors[index], self.projections[index]
        equalised, projected, local = projection.equalised, projection.projected, projection.local_projected
        if factors.of_rows:  # a row of the product takes all rows of Z'
            left = self.subspaces.local_rows(index, factors.left(equalised, projected))
        else:
            left = factors.left(self.subspaces.local_rows(index, equalised), local)
        squares = left.square().sum(-1)
        if factors.tail_gain is not None:
            tail_gain = factors.tail_gain[..., None]
            squares = squares + tail_gain * (projection.local_row_energy * tail_gain + 2 * (local * left).sum(-1))
        squares = squares / projection.columns.clamp(min=1)[..., None]
        orthogonal = orthogonal * (squares / (SIZE * MAX_ROW_RMS) ** 2).clamp(min=1).rsqrt().unsqueeze(-1)
        left = orthogonal * left
        if projection.local_basis is None:  # then X is known
            whole = torch.addcmul(left, local, x)
            return mixed(torch.cat([0 * x, others], -1)), (self.subspaces.local_columns(index, whole), None)
        x = x if factors.tail_gain is None else x + orthogonal * factors.tail_gain[..., None, None]
        return mixed(torch.cat([x, others], -1)), (left, projection.local_basis.mT)

    def next_state(self, row_means: Mapping[int, Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `StepDirection`."""
        for index in self.projections:
            for i in self.subspaces.executor.blocks[index].layout.indices:
                yield i, {COLUMNS: self.columns[..., i]}
        roots = {index: factors.root for index, factors in self.factors.items()}
        bases = self.subspaces.next_bases(self.projections, roots, row_means, self.mixture)
        for index, basis in bases.items():
            yield from self._by_tensor(index, STATE_KEY, basis)
        yield from self._next_whiteners(bases)

    def _next_whiteners(self, bases: Mapping[int, Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """What whitening remembers; `bases` by index of the block, of those whose basis changes."""
        grams, momenta, counts, turns = [], [], [], []
        whitened = [(k, x, x.momentum) for k, x in self.projections.items() if x.momentum is not None]
        for index, x, momentum in whitened:
            layout = self.step.blocks[index].layout
            grams.append(layout.gather_rows([self.step.state[self.step.names[i]][GRAM] for i in layout.indices]))
            momenta.append(momentum)
            counts.append(torch.minimum(x.columns, x.dimension))
            turns.append(x.turn(bases[index]) if index in bases else None)
        new = next_whiteners(grams, momenta, counts, turns, self.step.batch_dims, self.polynomials)
        for (index, *_), (gram, whitener) in zip(whitened, new, strict=True):
            yield from self._by_tensor(index, GRAM, gram)
            yield from self._by_tensor(index, WHITENER, whitener)

    def _by_tensor(self, index: int, key: str, value: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """An entry of the state of every tensor of a block."""
        layout = self.step.blocks[index].layout
        values = value.unbind() if isinstance(layout, Stack) else [value]
        for i, of_tensor in zip(layout.indices, values, strict=True):
            yield i, {key: of_tensor}


def orthogonal_factors(
    projections: Sequence[Projection], batch_dims: int = 0, polynomials: Polynomials = REPEATED
) -> list[OrthogonalFactors]:
    """The orthogonal directions of some matrices, their Gram matrices of similar size in one batch.

    Args:
        projections: Of the matrices.
        batch_dims: How many leading dimensions are batch.
        polynomials: Of inverse roots.
    """
    of_rows = [x.projected.shape[-2] < x.projected.shape[-1] for x in projections]
    zs = [x.equalised.mT if short else x.equalised for x, short in zip(projections, of_rows, strict=True)]
    grams = [z.mT @ z for z in zs]
    rows = [soft_count(x.row_energy) for x in projections]
    floors = [MIN_RMS**2 * (n * x.columns).clamp(min=1) for n, x in zip(rows, projections, strict=True)]
    traces = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) + floor for gram, floor in zip(grams, floors, strict=True)]
    roots = inverse_roots(grams, traces, batch_dims, polynomials)
    factors = []
    for x, n, floor, root, inside, short in zip(projections, rows, floors, roots, traces, of_rows, strict=True):
        size = SIZE * torch.maximum(n, x.columns).clamp(min=1).sqrt()
        tail_gain = size * _tail_gain(x, n, floor, inside) if x.is_partial else None
        factors.append(OrthogonalFactors(root, size[..., None, None] * root, tail_gain, short))
    return factors


def _tail_gain(x: Projection, rows: Tensor, floor: Tensor, inside: Tensor) -> Tensor:
    """1 / tau, `(*batch,)`; 0 where nothing is outside of the subspace.

    Args:
        x: The matrix in its subspace.
        rows: Soft count of its rows.
        floor: Added to its energy.
        inside: The energy of what is made equal, the floor included.
    """
    energy = inside if x.whitened is None else x.projected.square().sum((-2, -1)) + floor
    rank_outside = (torch.minimum(rows, x.columns) - x.dimension).clamp(min=1)
    tail = ((x.row_energy.sum(-1) - energy).clamp(min=0) / rank_outside + floor).sqrt()
    gain = 1 / (tail + MIN_TAIL * (energy / x.dimension.clamp(min=1)).sqrt())
    return torch.where(x.dimension < x.shape[1] - 0.5, gain, 0.0)
