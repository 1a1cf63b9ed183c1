"""The orthogonal direction of a matrix: X, with equal singular values inside of a subspace.

With X the mixed direction (`nfn_optim.rule.direction`), `(rows, rest)`, U the basis of its subspace and Z = X U
(`nfn_optim.rule.subspace`),

    P = Z (Z^T Z)^(-1/2)
    D = sqrt(max(rows, rest)) (P U^T + (X - Z U^T) / tau)

Inside of the subspace all singular values of D are equal; outside, where tau is the root mean square of those of X,
they keep their proportions. In a matrix of at most k columns D is orthogonal; if it has fewer rows than columns,
P = (Z Z^T)^(-1/2) Z, which is the same. The root mean square of D is about 1, and that of a row at most MAX_ROW_RMS: a
longer row is shortened. Rows and columns without gradients do not count (`nfn_optim.rule.pooled`).
Computed from Z, O(neurons k) numbers, D costs 4 k operations per weight, and 2 k more where the basis moves, instead of
thousands. D commutes with permuting rows and columns. It is not differentiated with respect to U, on which it does not
depend where X has no more than k singular values. Vectors follow X.

References:
    Muon (Jordan et al., 2024): the polynomial for the inverse square root, and the motivation
    Dion: Distributed Orthonormalized Updates (Ahn et al., 2025), arXiv:2504.05295: the subspace
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfn_optim.engine.executor import Executor, LowRank, Mixture
from nfn_optim.engine.sharding import Shards
from nfn_optim.rule.direction import Direction, StepDirection, mixed
from nfn_optim.rule.pooled import Pooled, soft_count
from nfn_optim.rule.step import Step
from nfn_optim.rule.subspace import STATE_KEY, Projection, Subspaces, basis_shape

POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of an odd map that takes singular values of 0.003 to 1 into 0.7 to 1.2
ITERATIONS = 5
COLUMNS = "active_columns"
SIZE = 0.5  # root mean square of the orthogonal direction in the update, about that of Adam's when gradients agree
MAX_ROW_RMS = 2.5  # of a row of D
MIN_TAIL = 0.1  # what is outside of the subspace is amplified at most ten times as much as what is inside
MIN_PADDED = 32  # smaller Gram matrices are padded to one size; above, those of up to twice the size
MIN_RMS = 1e-4  # an X of smaller root mean square is not amplified: it counts as zero


@dataclass(frozen=True)
class OrthogonalFactors:
    """The orthogonal direction of a matrix, SIZE D = Z correction U^T + tail_gain X.

    Attributes:
        root: P = Z root, up to a factor; `(*batch, k, k)`.
        correction: `(*batch, k, k)`.
        tail_gain: `(*batch,)`.
        of_rows: Whether P = root Z and SIZE D = correction Z instead, both `(*batch, rows, rows)`.
    """

    root: Tensor
    correction: Tensor
    tail_gain: Tensor
    of_rows: bool

    def correct(self, projected: Tensor) -> Tensor:
        """Z correction, or correction Z: `(*batch, rows, k)`."""
        return self.correction @ projected if self.of_rows else projected @ self.correction


class OrthogonalDirection(Direction):
    """A mean of X and the orthogonal direction, (1 - w) X + w D for matrices; w is learned and starts at 1.

    Args:
        rank: k, the largest dimension of a subspace.
    """

    terms: ClassVar[int] = 2

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.orthogonal_weight = nn.Parameter(torch.tensor(1.0))

    def init_state(self, p: Tensor, batch_dims: int) -> dict[str, Tensor]:
        """Of a matrix the number of its columns; and the basis, where one is needed: all zeros."""
        batch, shape = p.shape[:batch_dims], p.shape[batch_dims:]
        if len(shape) < 2:  # noqa: PLR2004 - a matrix has two dimensions
            return {}
        dtype = torch.promote_types(p.dtype, torch.float32)
        state = {COLUMNS: torch.full(batch, float(shape[1:].numel()), dtype=dtype, device=p.device)}
        if (basis := basis_shape(self.rank, shape)) is not None:
            state[STATE_KEY] = torch.zeros((*batch, *basis), dtype=dtype, device=p.device)
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
        projections = subspaces.project(state, columns, mixture)
        factors = orthogonal_factors(list(projections.values()), step.batch_dims)
        return OrthogonalStep(columns, mixture, subspaces, projections, dict(zip(projections, factors, strict=True)))


@dataclass(frozen=True)
class OrthogonalStep(StepDirection):
    """The orthogonal directions of all matrices at one step.

    Attributes:
        columns: Soft counts of the columns of all tensors, `(*batch, T)`.
        mixture: Of which X is made, by index of the block.
        subspaces: Of the network.
        projections: By index of the block.
        factors: Likewise.
    """

    columns: Tensor
    mixture: Mixture
    subspaces: Subspaces
    projections: Mapping[int, Projection]
    factors: Mapping[int, OrthogonalFactors]

    def combine(self, index: int, coefficients: Tensor) -> tuple[Tensor, LowRank | None]:
        """See `StepDirection`."""
        x, orthogonal, others = coefficients[..., :1], coefficients[..., 1:2], coefficients[..., 2:]
        if index not in self.factors:  # vectors
            return mixed(torch.cat([x, others], -1)), None
        factors, projection = self.factors[index], self.projections[index]
        if factors.of_rows:  # a row of the product takes all rows of Z
            left = self.subspaces.local_rows(index, factors.correct(projection.projected))
        else:
            left = factors.correct(projection.local_projected)
        tail_gain = factors.tail_gain[..., None]
        tail = projection.local_row_energy * tail_gain + 2 * (projection.local_projected * left).sum(-1)
        squares = (left.square().sum(-1) + tail_gain * tail) / projection.columns.clamp(min=1)[..., None]
        orthogonal = orthogonal * (squares / (SIZE * MAX_ROW_RMS) ** 2).clamp(min=1).rsqrt().unsqueeze(-1)
        left = orthogonal * left
        x = x + orthogonal * tail_gain.unsqueeze(-1)
        return mixed(torch.cat([x, others], -1)), (left, projection.local_basis.mT)

    def next_state(self, row_means: Mapping[int, Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `StepDirection`."""
        for index in self.projections:
            for i in self.subspaces.executor.blocks[index].layout.indices:
                yield i, {COLUMNS: self.columns[..., i]}
        roots = {index: factors.root for index, factors in self.factors.items()}
        for index, basis in self.subspaces.next_bases(self.projections, roots, row_means, self.mixture):
            yield index, {STATE_KEY: basis}


def orthogonal_factors(projections: Sequence[Projection], batch_dims: int = 0) -> list[OrthogonalFactors]:
    """The orthogonal directions of some matrices, their Gram matrices of similar size in one batch.

    Args:
        projections: Of the matrices.
        batch_dims: How many leading dimensions are batch.
    """
    by_size: dict[int, list[int]] = {}
    for i, projection in enumerate(projections):
        size = min(projection.projected.shape[-2:])
        by_size.setdefault(max(MIN_PADDED, 1 << (size - 1).bit_length()), []).append(i)
    factors: dict[int, OrthogonalFactors] = {}
    for group in by_size.values():
        together = _factors_of_group([projections[i] for i in group], batch_dims)
        factors |= zip(group, together, strict=True)
    return [factors[i] for i in range(len(projections))]


def _factors_of_group(projections: Sequence[Projection], batch_dims: int) -> list[OrthogonalFactors]:
    """`orthogonal_factors` in one batch."""
    of_rows = [x.projected.shape[-2] < x.projected.shape[-1] for x in projections]
    sizes = [min(x.projected.shape[-2:]) for x in projections]
    zs = [x.projected.mT if short else x.projected for x, short in zip(projections, of_rows, strict=True)]
    grams = [_pad_square(z.mT @ z, max(sizes)) for z in zs]
    grams = [gram.reshape(*gram.shape[:batch_dims], -1, *gram.shape[-2:]) for gram in grams]
    lengths = [gram.shape[-3] for gram in grams]
    gram = torch.cat(grams, -3)  # (*batch, T, size, size)
    rows = [soft_count(x.row_energy) for x in projections]
    floors = [MIN_RMS**2 * (n * x.columns).clamp(min=1) for n, x in zip(rows, projections, strict=True)]
    floor = torch.cat([x.reshape(*x.shape[:batch_dims], -1) for x in floors], -1)
    inside = gram.diagonal(dim1=-2, dim2=-1).sum(-1) + floor  # (*batch, T)
    roots = inverse_root(gram / inside[..., None, None]) / inside.sqrt()[..., None, None]
    split = zip(torch.split(roots, lengths, -3), torch.split(inside, lengths, -1), strict=True)
    factors = []
    for x, n, floor, k, short, (x_roots, x_inside) in zip(
        projections, rows, floors, sizes, of_rows, split, strict=True
    ):
        batch = n.shape
        root, energy_inside = x_roots.reshape(*batch, *gram.shape[-2:])[..., :k, :k], x_inside.reshape(batch)
        size = SIZE * torch.maximum(n, x.columns).clamp(min=1).sqrt()
        rank_outside = (torch.minimum(n, x.columns) - x.dimension).clamp(min=1)
        tail = ((x.row_energy.sum(-1) - energy_inside).clamp(min=0) / rank_outside + floor).sqrt()
        tail_gain = 1 / (tail + MIN_TAIL * (energy_inside / x.dimension.clamp(min=1)).sqrt())
        tail_gain = torch.where(x.dimension < x.shape[1] - 0.5, tail_gain, 0.0)  # where anything is outside
        correction = root - torch.diag_embed(tail_gain.unsqueeze(-1).expand(*tail_gain.shape, k))
        factors.append(OrthogonalFactors(root, size[..., None, None] * correction, size * tail_gain, short))
    return factors


def inverse_root(gram: Tensor) -> Tensor:
    """Roughly A^(-1/2), by which singular values become nearly 1 whose squares are the eigenvalues of A.

    Args:
        gram: Symmetric, without negative eigenvalues, of trace at most 1; `(..., k, k)`.
    """
    a, b, c = POLYNOMIAL
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root = a * one + b * gram + c * (gram @ gram)
    factor = root
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = a * one + b * gram + c * (gram @ gram)
        root = factor @ root
    return root


def _pad_square(gram: Tensor, size: int) -> Tensor:
    """A square matrix padded with zeros."""
    return F.pad(gram, (0, size - gram.shape[-1]) * 2)
