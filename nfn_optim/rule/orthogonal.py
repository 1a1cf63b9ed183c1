"""The orthogonal direction of a matrix: Adam's, with its singular values made equal. Neurons hear each other in it.

With X the raw channel 0 of a matrix, `(rows, rest)`, and U the *basis* of a subspace, `(rest, k)`, orthonormal,

    Z = X U
    P = Z (Z^T Z)^(-1/2)
    D = sqrt(max(rows, rest)) (P U^T + (X - Z U^T) / tau)
    U <- orthonormal basis of X^T P

Inside the subspace all singular values of D are the same, outside of it, where tau is the root mean square of those of
X, they keep their proportions. The last line, a step of the power method, makes the subspace that of the k largest ones
and keeps it there. Where a matrix has no more than k columns there is nothing to follow: U is the identity, and D is
orthogonal. Where X has fewer than k singular values, some vectors of U are zero, until one of the rows of which most
lies outside is taken in. The root mean square of D is about 1.

What rows say to each other is Z, O(neurons k) numbers; so it costs 4 k operations a weight at a step and 2 k more at
one at which the basis moves, instead of thousands. D commutes with permuting rows and columns, and D is not
differentiated with respect to U, on which it does not depend where X has no more than k singular values.

References:
    Muon (Jordan et al., 2024): the polynomial for the inverse square root, and what it is good for
    Dion: Distributed Orthonormalized Updates (Ahn et al., 2025), arXiv:2504.05295: the subspace
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nfn_optim.engine.blocks import constant

POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of an odd map that takes singular values of 0.003 to 1 into 0.7 to 1.2
ITERATIONS = 5
SIZE = 0.5  # root mean square of the orthogonal direction in the update, about that of Adam's when gradients agree
LARGEST = 1.25  # root mean square of D is never larger
LEAST_TAIL = 0.1  # what is outside of the subspace is not enlarged more than ten times what is inside
DEPENDENT = 1e-3  # a vector of which no larger part is new depends on the others
LEAST = 1e-4  # a direction of smaller root mean square is not enlarged: there is none


@dataclass(frozen=True)
class Sketch:
    """A matrix X as it is seen from its subspace.

    Attributes:
        shape: Of X, rows and rest; of the whole where it is divided among processes.
        seen: Z, `(*batch, rows, k)`, or `(*batch, count, rows, k)` of a stack of matrices; and so with everything.
        energy: Sum of the squares of X, `(*batch,)`.
        dimension: Of the subspace, `(*batch,)`.
    """

    shape: tuple[int, int]
    seen: Tensor
    energy: Tensor
    dimension: Tensor


@dataclass(frozen=True)
class Aim:
    """The orthogonal direction of a matrix, as SIZE D = Z turn U^T + rest X.

    Attributes:
        root: P = Z root, up to a factor; `(*batch, k, k)`.
        turn: `(*batch, k, k)`.
        rest: `(*batch,)`.
    """

    root: Tensor
    turn: Tensor
    rest: Tensor


def basis_shape(rank: int, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of a basis: the columns and taps of a tensor, and k.

    Args:
        rank: The most that k may be.
        shape: Of the tensor.

    Returns:
        `(*shape[1:], k)`; None where there is no need for one.
    """
    rest = math.prod(shape[1:])
    return (*shape[1:], min(rank, shape[0])) if len(shape) > 1 and rest > rank > 0 and shape[0] > 0 else None


def aims_of(sketches: Sequence[Sketch], batch_dims: int = 0) -> list[Aim]:
    """The orthogonal directions of some matrices, their small matrices in one batch.

    Args:
        sketches: Of the matrices.
        batch_dims: How many leading dimensions are batch.
    """
    if not sketches:
        return []
    most = max(sketch.seen.shape[-1] for sketch in sketches)
    parts = [_padded(x.seen.mT @ x.seen, most) for x in sketches]
    parts = [part.reshape(*part.shape[:batch_dims], -1, most, most) for part in parts]
    lengths = [part.shape[-3] for part in parts]
    grams = torch.cat(parts, -3)  # (*batch, T, k, k)
    floors = [LEAST**2 * math.prod(x.shape) for x in sketches]
    every = [floor for floor, length in zip(floors, lengths, strict=True) for _ in range(length)]
    inside = grams.diagonal(dim1=-2, dim2=-1).sum(-1) + constant(tuple(every), grams.dtype, grams.device)  # (*batch, T)
    roots = inverse_root(grams / inside[..., None, None]) / inside.sqrt()[..., None, None]
    found = []
    split = zip(torch.split(roots, lengths, -3), torch.split(inside, lengths, -1), strict=True)
    for sketch, floor, (several, withins) in zip(sketches, floors, split, strict=True):
        k, where = sketch.seen.shape[-1], sketch.energy.shape
        root, within = several.reshape(*where, most, most)[..., :k, :k], withins.reshape(where)
        size = SIZE * math.sqrt(max(sketch.shape))
        left_over = (min(sketch.shape) - sketch.dimension).clamp(min=1)
        tail = ((sketch.energy - within).clamp(min=0) / left_over + floor).sqrt()
        rest = 1 / (tail + LEAST_TAIL * (within / sketch.dimension.clamp(min=1)).sqrt())
        rest = torch.where(sketch.dimension < sketch.shape[1] - 0.5, rest, 0.0)  # where there is anything outside
        turn = root - torch.diag_embed(rest.unsqueeze(-1).expand(*rest.shape, k))
        found.append(Aim(root, size * turn, size * rest))
    return found


def inverse_root(grams: Tensor) -> Tensor:
    """Roughly A^(-1/2): what takes singular values to nearly 1, of those whose squares are the eigenvalues of A.

    Args:
        grams: Symmetric, without negative eigenvalues, of trace at most 1; `(..., k, k)`.
    """
    a, b, c = POLYNOMIAL
    one = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    root = one
    for _ in range(ITERATIONS):
        factor = a * one + b * grams + c * (grams @ grams)
        root = factor @ root
        grams = factor @ grams @ factor
    return root


def completed(polar: Tensor, basis_columns: Tensor, size: Tensor) -> Tensor:
    """P, and where the basis has no vector the choice of a row: of one of the k largest.

    Args:
        polar: `(*batch, rows, k)`.
        basis_columns: Squared lengths of the vectors of the basis, 0 or 1, `(*batch, k)`.
        size: How much there is to choose a row for, `(*batch, rows)`.
    """
    chosen = torch.nan_to_num(size).topk(polar.shape[-1], -1).indices.unsqueeze(-2)  # (*batch, 1, k)
    rows = torch.zeros_like(polar).scatter(-2, chosen, 1.0)
    return torch.where(basis_columns.unsqueeze(-2) > 0.5, polar, rows)  # noqa: PLR2004 - 0 or 1 but for rounding


@torch.no_grad()
def next_basis(image: Tensor) -> Tensor:
    """An orthonormal basis of the columns of X^T P, `(*batch, rest, k)`.

    A column that depends on those before it gives a vector of zeros: whatever else stood there would be rounding.
    """
    basis, triangle = torch.linalg.qr(image)
    sizes = triangle.diagonal(dim1=-2, dim2=-1).abs()  # (*batch, k)
    apart = sizes > DEPENDENT * sizes.amax(-1, keepdim=True)
    return torch.where(apart.unsqueeze(-2), basis, 0.0)


def _padded(gram: Tensor, size: int) -> Tensor:
    """A square matrix with zeros added up to a size."""
    return F.pad(gram, (0, size - gram.shape[-1]) * 2)
