"""Subspace iteration: for every matrix a subspace of its columns that follows the largest singular values.

With X the mixed direction of a matrix (`nfn_optim.rule.direction`), `(rows, rest)`, and U the *basis*, `(rest, k)`,
orthonormal,

    Z = X U                                   the projection
    U <- orthonormal basis of X^T P           with P the orthogonal direction in the subspace, `(rows, k)`

The second line is a step of the power method. A matrix of at most k columns needs no basis: U is the identity. Nor does
one of at most k rows if it is to be exact: U follows from step to step, the identity needs not. Where X has fewer than
k singular values, some vectors of U are zero, until a row that lies mostly outside of the subspace is added. A step
costs 2 k operations per weight, and 2 k more where the basis is updated.

References:
    Dion: Distributed Orthonormalized Updates (Ahn et al., 2025), arXiv:2504.05295
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nfn_optim.engine.blocks import Block, Matrix, Stack, Vectors
from nfn_optim.engine.executor import Executor, Mixture
from nfn_optim.engine.moments import SQRT_EPS, State
from nfn_optim.engine.sharding import Shard, Shards
from nfn_optim.engine.weight_features import Statistics

STATE_KEY = "basis"
MIN_INDEPENDENT = 1e-3  # a column of which no larger part is new counts as dependent


@dataclass(frozen=True)
class Projection:
    """A matrix X in its subspace.

    Attributes:
        shape: Of X, rows and rest; of the whole matrix where it is sharded.
        columns: Soft count of the columns of X, `(*batch,)`, see `nfn_optim.rule.pooled`.
        projected: Z, `(*batch, rows, k)`, or `(*batch, count, rows, k)` of a stack of matrices; and so with everything.
        row_energy: Sum of the squares of X in every row, `(*batch, rows)`.
        dimension: Of the subspace, `(*batch,)`.
        local_projected: The local rows of Z, `(*batch, local rows, k)`.
        local_row_energy: Those of `row_energy`.
        local_basis: U for the columns of the local block, `(*batch, rest, k)`; None for the identity.
        basis: U as the state keeps it, `(*batch, *shape[1:], k)`; likewise.
        momentum: N, the momentum in the subspace, shaped as Z; None where it is not needed.
        whitened: Z' (`nfn_optim.rule.whitening`), shaped as Z; None for Z.
    """

    shape: tuple[int, int]
    columns: Tensor
    projected: Tensor
    row_energy: Tensor
    dimension: Tensor
    local_projected: Tensor
    local_row_energy: Tensor
    local_basis: Tensor | None
    basis: Tensor | None
    momentum: Tensor | None = None
    whitened: Tensor | None = None

    @property
    def equalised(self) -> Tensor:
        """The part in the subspace whose singular values are made equal: Z' or Z."""
        return self.projected if self.whitened is None else self.whitened

    def turn(self, basis: Tensor) -> Tensor:
        """U^T U' for another basis U' of these columns, `(*batch, k, k)`; not for the identity."""
        assert self.basis is not None
        return self._flat(self.basis).mT @ self._flat(basis)

    def _flat(self, basis: Tensor) -> Tensor:
        """`(*batch, *shape[1:], k) -> (*batch, rest, k)`."""
        return basis.reshape(*basis.shape[: self.columns.dim()], self.shape[1], basis.shape[-1])

    @property
    def is_partial(self) -> bool:
        """Whether the subspace is smaller than the space."""
        return self.basis is not None and self.basis.shape[-1] < self.shape[1]


@dataclass(frozen=True)
class Subspaces:
    """The subspaces of all matrices of a network at one step, sharded or not.

    Attributes:
        names: Of all tensors.
        executor: Of the step.
        shards: Which parts of the tensors are local.
    """

    names: Sequence[str]
    executor: Executor
    shards: Shards | None

    def project(
        self, state: State, columns: Tensor, mixture: Mixture, momentum: Collection[str] = ()
    ) -> dict[int, Projection]:
        """Project every matrix.

        Args:
            state: By name; `STATE_KEY` holds the basis, where there is one.
            columns: Soft counts of the columns of all tensors, `(*batch, T)`.
            mixture: Of which X is made, by index of the block.
            momentum: Names of the matrices whose momentum is projected too.

        Returns:
            By index of the block, of those that are matrices.
        """
        projections: dict[int, Projection] = {}
        for index, block in enumerate(self.executor.blocks):
            layout = block.layout
            if isinstance(layout, Vectors):
                continue
            name = self._name(index)
            shape = self._shape_of(name, block)
            bases = [state[self.names[i]].get(STATE_KEY) for i in layout.indices]
            known = [basis for basis in bases if basis is not None]
            basis = layout.gather_rows(known) if known else None
            count = layout.expand_to_rows(columns.unsqueeze(-1))[..., 0, 0]  # (*batch,)
            local_basis = None
            if basis is None:
                dimension = torch.full_like(count, shape[1:].numel())
            else:
                local = self._local(name, basis)
                local_basis = layout.fold_basis(local.expand(*layout.batch, *local.shape[-len(shape) :]))
                dimension = basis.flatten(-len(shape), -2).square().sum((-2, -1)).expand(count.shape)
            needed = name in momentum
            projected, energy, of_momentum = self.executor.project(index, local_basis, mixture.get(index), needed)
            matrix = (shape[0], shape[1:].numel())
            if basis is None:
                projected = self._in_order(index, projected)
                of_momentum = None if of_momentum is None else self._in_order(index, of_momentum)
            of_rows = projected, energy, dimension, projected, energy
            projections[index] = Projection(matrix, count, *of_rows, local_basis, basis, of_momentum)
        return projections if self.shards is None else self._reduced(projections, self.shards)

    def local_columns(self, index: int, value: Tensor) -> Tensor:
        """The columns of a block, as they lie in memory, from those of the whole: `(*batch, rows, rest)`."""
        name, block = self._name(index), self.executor.blocks[index]
        layout = _matrix_of(block)
        if self._shard(name) is None and not _is_permuted(layout):
            return value
        shape = self._shape_of(name, block)
        local = [slice(None)] * (value.dim() - 1) + self._local_columns(name, len(shape))
        return layout.fold([torch.unflatten(value, -1, shape[1:])[tuple(local)]])

    def _in_order(self, index: int, value: Tensor) -> Tensor:
        """The columns of a block in the order of its tensor's dimensions, `(*batch, rows, rest)`."""
        layout = _matrix_of(self.executor.blocks[index])
        return layout.unfold(value)[0].flatten(len(layout.batch) + 1) if _is_permuted(layout) else value

    def next_bases(
        self,
        projections: Mapping[int, Projection],
        roots: Mapping[int, Tensor],
        row_means: Mapping[int, Tensor],
        mixture: Mixture,
    ) -> dict[int, Tensor]:
        """The bases of the step after this one, `(*batch, *shape[1:], k)` by index of the block, where one is needed.

        Args:
            projections: Of `project`.
            roots: Index of a block -> R `(*batch, k, k)`, with P = Z' R up to a factor.
            row_means: Index of the tensor -> `Statistics` over each row of the whole matrix, packed,
                `(*batch, shape[0], STATISTICS)`.
            mixture: As of `project`.
        """
        partial = {index: projection for index, projection in projections.items() if projection.is_partial}
        images = {}
        for index, projection in partial.items():
            layout = self.executor.blocks[index].layout
            assert not isinstance(layout, Vectors)
            assert projection.basis is not None
            columns = projection.basis.flatten(-projection.basis.dim() + len(layout.batch), -2).square().sum(-2)
            means = Statistics.unpack(layout.gather_rows([row_means[i] for i in layout.indices]))
            inside = projection.projected.square().sum(-1)
            outside = (1 - inside / (projection.row_energy + SQRT_EPS)).clamp(min=0)
            polar = fill_missing(projection.equalised @ roots[index], columns, means.momentum * outside)
            image = self.executor.project_back(index, self.local_rows(index, polar), mixture.get(index))
            images[self._name(index)] = layout.unfold_basis(image)
        if self.shards is not None:
            padded = {name: [self._pad_columns(name, image)] for name, image in images.items()}
            images = {name: image for name, (image,) in self.shards.all_reduce(padded).items()}
        bases = {}
        for index in partial:
            image = images[self._name(index)]
            flat = image.reshape(*self.executor.blocks[index].layout.batch, -1, image.shape[-1])
            bases[index] = orthonormal_basis(flat.detach()).reshape(image.shape).contiguous()
        return bases

    def _reduced(self, projections: dict[int, Projection], shards: Shards) -> dict[int, Projection]:
        """Projections of whole matrices from those of their local parts."""
        partial = {
            self._name(index): self._pad_rows(self._name(index), projection)
            for index, projection in projections.items()
        }
        reduced = shards.all_reduce(partial)
        whole = {}
        for index, projection in projections.items():
            energy, projected, *momentum = reduced[self._name(index)]
            rows = shards.local_slice(self._name(index), 0)
            whole[index] = replace(
                projection,
                projected=projected,
                row_energy=energy,
                local_projected=projected[..., rows, :],
                local_row_energy=energy[..., rows],
                momentum=momentum[0] if momentum else None,
            )
        return whole

    def _name(self, index: int) -> str:
        """The name of a block's matrix, the first one of a stack."""
        return self.names[self.executor.blocks[index].layout.indices[0]]

    def _shape_of(self, name: str, block: Block) -> torch.Size:
        """The shape of the whole matrix, without batch dimensions."""
        if (shard := self._shard(name)) is not None:
            return torch.Size(shard.shape)
        return block.tensors[0][0].shape[len(block.layout.batch) if isinstance(block.layout, Matrix) else 0 :]

    def _shard(self, name: str) -> Shard | None:
        """The local part of a matrix, if it is sharded."""
        return None if self.shards is None else self.shards.by_name.get(name)

    def _local(self, name: str, basis: Tensor) -> Tensor:
        """The part of a basis that belongs to the local columns."""
        return basis if self._shard(name) is None else basis[tuple(self._local_columns(name, basis.dim()))]

    def _local_columns(self, name: str, dims: int) -> list[slice]:
        """The local entries of all dimensions of a tensor but the first."""
        return [slice(None) if self.shards is None else self.shards.local_slice(name, d) for d in range(1, dims)]

    def local_rows(self, index: int, value: Tensor) -> Tensor:
        """The local rows of `(*batch, rows, k)`."""
        return value if self.shards is None else value[..., self.shards.local_slice(self._name(index), 0), :]

    def _pad_rows(self, name: str, projection: Projection) -> list[Tensor]:
        """The contribution of this process to the energy of the rows of the whole, to Z and to N."""
        shard, matrices = self._shard(name), [projection.projected]
        matrices += [] if projection.momentum is None else [projection.momentum]
        if shard is None:
            return [projection.row_energy, *matrices]
        if projection.basis is None:  # columns are local too
            local = [span.stop - span.start for span in shard.spans]
            matrices = [shard.pad_to_whole(x.reshape(local), 0, len(local)).flatten(1) for x in matrices]
        else:
            matrices = [shard.pad_to_whole(x, 0, 1) for x in matrices]
        return [shard.pad_to_whole(projection.row_energy, 0, 1), *matrices]

    def _pad_columns(self, name: str, image: Tensor) -> Tensor:
        """The contribution of this process to X^T P of the whole."""
        shard = self._shard(name)
        return image if shard is None else shard.pad_to_whole(image, 1, len(shard.shape))


def basis_shape(rank: int, shape: Sequence[int], exact: bool = False) -> tuple[int, ...] | None:
    """The shape of a basis: the columns and taps of a tensor, and k.

    Args:
        rank: Upper limit of k.
        shape: Of the tensor.
        exact: Whether a matrix of at most `rank` rows needs no basis either.

    Returns:
        `(*shape[1:], k)`; None where no basis is needed.
    """
    rest = math.prod(shape[1:])
    needed = len(shape) > 1 and rest > rank > 0 and shape[0] > (rank if exact else 0)
    return (*shape[1:], min(rank, shape[0])) if needed else None


def fill_missing(polar: Tensor, column_norms: Tensor, row_energy: Tensor) -> Tensor:
    """P, with an indicator of one of the k rows of most energy wherever the basis has no vector.

    Args:
        polar: `(*batch, rows, k)`.
        column_norms: Squared lengths of the vectors of the basis, 0 or 1, `(*batch, k)`.
        row_energy: Energy of each row outside of the subspace, `(*batch, rows)`.
    """
    top = torch.nan_to_num(row_energy).topk(polar.shape[-1], -1).indices.unsqueeze(-2)  # (*batch, 1, k)
    indicators = torch.zeros_like(polar).scatter(-2, top, 1.0)
    return torch.where(column_norms.unsqueeze(-2) > 0.5, polar, indicators)  # noqa: PLR2004 - 0 or 1 but for rounding


@torch.no_grad()
def orthonormal_basis(image: Tensor) -> Tensor:
    """An orthonormal basis of the columns of X^T P, `(*batch, rest, k)`.

    A column that depends on those before it yields a zero vector: anything else would be rounding error.
    """
    basis, triangle = torch.linalg.qr(image)
    sizes = triangle.diagonal(dim1=-2, dim2=-1).abs()  # (*batch, k)
    independent = sizes > MIN_INDEPENDENT * sizes.amax(-1, keepdim=True)
    return torch.where(independent.unsqueeze(-2), basis, 0.0)


def _matrix_of(block: Block) -> Matrix:
    """The layout of a matrix, or of those of a stack."""
    layout = block.layout.each if isinstance(block.layout, Stack) else block.layout
    assert isinstance(layout, Matrix)
    return layout


def _is_permuted(layout: Matrix) -> bool:
    """Whether dimensions lie in memory in another order."""
    return layout.order != tuple(range(len(layout.order)))
