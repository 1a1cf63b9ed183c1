"""The orthogonal direction of a matrix: Adam's, with equal singular values inside of a subspace.

With X Adam's direction, `(rows, rest)`, U the basis of its subspace and Z = X U (`nfn_optim.rule.subspace`),

    P = Z (Z^T Z)^(-1/2)
    D = sqrt(max(rows, rest)) (P U^T + (X - Z U^T) / tau)

Inside of the subspace all singular values of D are equal; outside, where tau is the root mean square of those of X,
they keep their proportions. In a matrix of at most k columns D is orthogonal. The root mean square of D is about 1.
Computed from Z, O(neurons k) numbers, D costs 4 k operations per weight, and 2 k more where the basis moves, instead of
thousands. D commutes with permuting rows and columns. It is not differentiated with respect to U, on which it does not
depend where X has no more than k singular values. Vectors follow Adam's direction.

References:
    Muon (Jordan et al., 2024): the polynomial for the inverse square root, and the motivation
    Dion: Distributed Orthonormalized Updates (Ahn et al., 2025), arXiv:2504.05295: the subspace
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfn_optim.engine.blocks import constant
from nfn_optim.engine.executor import Executor, LowRank
from nfn_optim.engine.moments import State
from nfn_optim.engine.sharding import Shards
from nfn_optim.rule.direction import Direction, StepDirection
from nfn_optim.rule.subspace import STATE_KEY, Projection, Subspaces, basis_shape

POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of an odd map that takes singular values of 0.003 to 1 into 0.7 to 1.2
ITERATIONS = 5
SIZE = 0.5  # root mean square of the orthogonal direction in the update, about that of Adam's when gradients agree
MAX_RMS = 1.25  # of D
MIN_TAIL = 0.1  # what is outside of the subspace is amplified at most ten times as much as what is inside
MIN_RMS = 1e-4  # an X of smaller root mean square is not amplified: it counts as zero


@dataclass(frozen=True)
class OrthogonalFactors:
    """The orthogonal direction of a matrix, SIZE D = Z correction U^T + tail_gain X.

    Attributes:
        root: P = Z root, up to a factor; `(*batch, k, k)`.
        correction: `(*batch, k, k)`.
        tail_gain: `(*batch,)`.
    """

    root: Tensor
    correction: Tensor
    tail_gain: Tensor


class OrthogonalDirection(Direction):
    """A mixture of Adam's and the orthogonal direction, (1 - w) X + w D for matrices; w is learned and starts at 1.

    Args:
        rank: k, the largest dimension of a subspace.
    """

    terms: ClassVar[int] = 2

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.orthogonal_weight = nn.Parameter(torch.tensor(1.0))

    def init_state(self, p: Tensor, batch_dims: int) -> dict[str, Tensor]:
        """The basis, where one is needed: all zeros."""
        if (shape := basis_shape(self.rank, p.shape[batch_dims:])) is None:
            return {}
        dtype = torch.promote_types(p.dtype, torch.float32)
        return {STATE_KEY: torch.zeros((*p.shape[:batch_dims], *shape), dtype=dtype, device=p.device)}

    def terms_of(self, coefficient: Tensor, enabled: Tensor) -> list[Tensor]:
        """See `Direction`."""
        weight = enabled * self.orthogonal_weight.unsqueeze(-1)
        return [coefficient * (1 - weight), coefficient * weight]

    def rms_bound(self, adam_rms: Tensor, is_matrix: Tensor) -> Tensor:
        """See `Direction`."""
        weight = is_matrix * self.orthogonal_weight.unsqueeze(-1)
        return adam_rms * (1 - weight).abs() + SIZE * MAX_RMS * weight.abs()

    def prepare(
        self, executor: Executor, names: Sequence[str], state: State, batch_dims: int, shards: Shards | None
    ) -> StepDirection:
        """Project every matrix; see `Direction`."""
        subspaces = Subspaces(names, executor, shards)
        projections = subspaces.project(state)
        factors = orthogonal_factors(list(projections.values()), batch_dims)
        return OrthogonalStep(subspaces, projections, dict(zip(projections, factors, strict=True)))


@dataclass(frozen=True)
class OrthogonalStep(StepDirection):
    """The orthogonal directions of all matrices at one step.

    Attributes:
        subspaces: Of the network.
        projections: By index of the block.
        factors: Likewise.
    """

    subspaces: Subspaces
    projections: Mapping[int, Projection]
    factors: Mapping[int, OrthogonalFactors]

    def combine(self, index: int, coefficients: Tensor) -> tuple[Tensor, LowRank | None]:
        """See `StepDirection`."""
        adam, orthogonal, others = coefficients[..., :1], coefficients[..., 1:2], coefficients[..., 2:]
        if index not in self.factors:  # vectors
            return torch.cat([adam, others], -1), None
        factors, projection = self.factors[index], self.projections[index]
        left = orthogonal * (projection.local_projected @ factors.correction)
        adam = adam + orthogonal * factors.tail_gain[..., None, None]
        return torch.cat([adam, others], -1), (left, projection.local_basis.mT)

    def next_state(self, row_means: Mapping[int, Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `StepDirection`."""
        roots = {index: factors.root for index, factors in self.factors.items()}
        for index, basis in self.subspaces.next_bases(self.projections, roots, row_means):
            yield index, {STATE_KEY: basis}


def orthogonal_factors(projections: Sequence[Projection], batch_dims: int = 0) -> list[OrthogonalFactors]:
    """The orthogonal directions of some matrices, their k x k matrices in one batch.

    Args:
        projections: Of the matrices.
        batch_dims: How many leading dimensions are batch.
    """
    if not projections:
        return []
    k_max = max(x.projected.shape[-1] for x in projections)
    grams = [_pad_square(x.projected.mT @ x.projected, k_max) for x in projections]
    grams = [gram.reshape(*gram.shape[:batch_dims], -1, k_max, k_max) for gram in grams]
    lengths = [gram.shape[-3] for gram in grams]
    gram = torch.cat(grams, -3)  # (*batch, T, k, k)
    floors = [MIN_RMS**2 * math.prod(x.shape) for x in projections]
    repeated = [floor for floor, length in zip(floors, lengths, strict=True) for _ in range(length)]
    inside = gram.diagonal(dim1=-2, dim2=-1).sum(-1) + constant(tuple(repeated), gram.dtype, gram.device)  # (*batch, T)
    roots = inverse_root(gram / inside[..., None, None]) / inside.sqrt()[..., None, None]
    split = zip(torch.split(roots, lengths, -3), torch.split(inside, lengths, -1), strict=True)
    factors = []
    for x, floor, (x_roots, x_inside) in zip(projections, floors, split, strict=True):
        k, batch = x.projected.shape[-1], x.energy.shape
        root, energy_inside = x_roots.reshape(*batch, k_max, k_max)[..., :k, :k], x_inside.reshape(batch)
        size = SIZE * math.sqrt(max(x.shape))
        rank_outside = (min(x.shape) - x.dimension).clamp(min=1)
        tail = ((x.energy - energy_inside).clamp(min=0) / rank_outside + floor).sqrt()
        tail_gain = 1 / (tail + MIN_TAIL * (energy_inside / x.dimension.clamp(min=1)).sqrt())
        tail_gain = torch.where(x.dimension < x.shape[1] - 0.5, tail_gain, 0.0)  # where anything is outside
        correction = root - torch.diag_embed(tail_gain.unsqueeze(-1).expand(*tail_gain.shape, k))
        factors.append(OrthogonalFactors(root, size * correction, size * tail_gain))
    return factors


def inverse_root(gram: Tensor) -> Tensor:
    """Roughly A^(-1/2), by which singular values become nearly 1 whose squares are the eigenvalues of A.

    Args:
        gram: Symmetric, without negative eigenvalues, of trace at most 1; `(..., k, k)`.
    """
    a, b, c = POLYNOMIAL
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root = one
    for _ in range(ITERATIONS):
        factor = a * one + b * gram + c * (gram @ gram)
        root = factor @ root
        gram = factor @ gram @ factor
    return root


def _pad_square(gram: Tensor, size: int) -> Tensor:
    """A square matrix padded with zeros."""
    return F.pad(gram, (0, size - gram.shape[-1]) * 2)
