"""Orthogonal directions agree with the singular value decomposition, at none of its cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nfn_optim.rule.inverse_root import MINIMAX, REPEATED, Polynomials, inverse_root
from nfn_optim.rule.orthogonal import SIZE, OrthogonalFactors, orthogonal_factors
from nfn_optim.rule.pooled import soft_count
from nfn_optim.rule.subspace import Projection, basis_shape, fill_missing, orthonormal_basis

MAX_RMS = 1.25  # of D, and of what the polynomial makes of a singular value


def draw(rows: int, rest: int, seed: int = 0) -> Tensor:
    """A matrix with singular values 1, 1/2, 1/4 ... but not below 1e-2."""
    torch.manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(rows, rest, dtype=torch.float64), full_matrices=False)
    values = (0.5 ** torch.arange(min(rows, rest), dtype=torch.float64)).clamp(min=1e-2)
    return (u * values) @ vh


def projected(x: Tensor, basis: Tensor) -> Projection:
    """A matrix in a subspace."""
    z, dimension = x @ basis, basis.square().sum()
    energy, columns = x.square().sum(1), torch.tensor(float(x.shape[1]), dtype=x.dtype)
    return Projection((x.shape[0], x.shape[1]), columns, z, energy, dimension, z, energy, basis, basis)


def direction_of(x: Tensor, basis: Tensor) -> tuple[Tensor, OrthogonalFactors]:
    """D, and its factors."""
    projection = projected(x, basis)
    (factors,) = orthogonal_factors([projection])
    tail = 0.0 if factors.tail_gain is None else factors.tail_gain * x
    return (factors.left(projection.equalised, projection.projected) @ basis.mT + tail) / SIZE, factors


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 5), (5, 1)])
def test_in_the_whole_space_all_singular_values_are_equal(shape: tuple[int, int]) -> None:
    x = draw(*shape)
    d, factors = direction_of(x, torch.eye(shape[1], dtype=torch.float64))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ d @ vh.mT / max(soft_count(x.square().sum(1)).item(), shape[1]) ** 0.5
    assert factors.tail_gain is None
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-6)
    assert ((inside.diagonal() > 0.6) & (inside.diagonal() < MAX_RMS)).all()
    assert d.square().mean().sqrt() < MAX_RMS


def test_outside_of_the_subspace_singular_values_keep_their_proportions() -> None:
    x, k = draw(9, 8), 3
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    d, factors = direction_of(x, vh[:k].mT)
    inside = (u.mT @ d @ vh.mT).diagonal() / 3
    assert ((inside[:k] > 0.6) & (inside[:k] < MAX_RMS)).all()
    torch.testing.assert_close(inside[k:], values[k:] * factors.tail_gain / SIZE / 3)
    assert 0.1 < inside[k:].square().mean().sqrt() < 1


def test_it_commutes_with_permutations_and_rotations_and_is_free_of_scale() -> None:
    x, basis = draw(9, 8), torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0]
    rows, columns = torch.randperm(9), torch.randperm(8)
    d, _ = direction_of(x, basis)
    torch.testing.assert_close(direction_of(x[rows][:, columns], basis[columns])[0], d[rows][:, columns])
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    torch.testing.assert_close(direction_of(x, basis @ turn)[0], d)
    torch.testing.assert_close(direction_of(100 * x, basis)[0], d, rtol=1e-4, atol=1e-4)


def test_matrices_of_several_sizes_do_not_disturb_each_other() -> None:
    xs = [draw(9, 8), draw(2, 30), draw(4, 1)]
    bases = [torch.linalg.qr(torch.randn(x.shape[1], min(3, *x.shape), dtype=torch.float64))[0] for x in xs]
    together = orthogonal_factors([projected(x, basis) for x, basis in zip(xs, bases, strict=True)])
    for x, basis, factors in zip(xs, bases, together, strict=True):
        alone = direction_of(x, basis)[1]
        torch.testing.assert_close(factors.equaliser, alone.equaliser)
        torch.testing.assert_close(factors.tail_gain, alone.tail_gain)
    assert orthogonal_factors([]) == []


def test_the_subspace_becomes_that_of_the_largest_singular_values() -> None:
    x, k = draw(9, 8), 3
    basis = torch.zeros(8, k, dtype=torch.float64)
    for _ in range(20):
        d, factors = direction_of(x, basis)
        assert 0.5 < d.square().mean().sqrt() < MAX_RMS  # from the first step on
        basis = orthonormal_basis(
            x.mT @ fill_missing(x @ basis @ factors.root, basis.square().sum(0), x.square().sum(1))
        )
        torch.testing.assert_close(basis.mT @ basis, torch.eye(k, dtype=torch.float64))
    best = torch.linalg.svd(x)[2][:k].mT
    torch.testing.assert_close(basis @ basis.mT, best @ best.mT, rtol=0, atol=1e-8)


def test_missing_singular_values_have_no_vectors() -> None:
    """Two singular values give two vectors, whatever is asked for; a third row that comes to life is taken in."""
    torch.manual_seed(0)
    x = torch.zeros(5, 9)
    x[:2] = torch.randn(2, 9)
    chosen = fill_missing(torch.zeros(5, 4), torch.zeros(4), x.square().sum(1))
    basis = orthonormal_basis(x.mT @ chosen)
    assert basis.square().sum(0).round().tolist() == [1, 1, 0, 0]
    x[3] = torch.randn(9)
    for _ in range(3):
        _, factors = direction_of(x, basis)
        outside = x.square().sum(1) - (x @ basis).square().sum(1)
        basis = orthonormal_basis(x.mT @ fill_missing(x @ basis @ factors.root, basis.square().sum(0), outside))
    assert basis.square().sum().round().item() == 3
    torch.testing.assert_close(x @ basis @ basis.mT, x, rtol=0, atol=1e-4)


def test_zero_stays_zero() -> None:
    """A direction without size has none; and a matrix of zeros does not become one of NaN."""
    basis = torch.eye(4, dtype=torch.float32)[:, :2]
    for x in (torch.zeros(3, 4), 1e-12 * torch.randn(3, 4)):
        d, factors = direction_of(x, basis)
        assert d.abs().max() < 1e-4
        assert all(value.isfinite().all() for value in (factors.root, factors.equaliser, factors.tail_gain))


def test_the_inverse_root_of_many_at_once() -> None:
    values = torch.rand(5, 2, 4, dtype=torch.float64)
    values = values / values.sum(-1, keepdim=True)
    turns = torch.linalg.qr(torch.randn(5, 2, 4, 4, dtype=torch.float64))[0]
    grams = turns @ torch.diag_embed(values) @ turns.mT
    found = turns.mT @ inverse_root(grams) @ turns
    equal = found.diagonal(dim1=-2, dim2=-1) * values.sqrt()
    assert ((equal > 0.6) & (equal < MAX_RMS)).all()


@pytest.mark.parametrize(
    ("polynomials", "smallest", "low", "high"),
    [(REPEATED, 0.003, 0.68, 1.21), (MINIMAX, 0.005, 0.91, 1.09), (MINIMAX, 0.003, 0.62, 1.09)],
)
def test_polynomials_bring_singular_values_near_one(
    polynomials: Polynomials, smallest: float, low: float, high: float
) -> None:
    values = torch.linspace(smallest, 1, 2000, dtype=torch.float64)
    equal = values * inverse_root(values.square()[:, None, None], polynomials).flatten()
    assert low < equal.min() < equal.max() < high


def test_which_tensors_need_a_basis() -> None:
    assert basis_shape(32, (64, 3, 5, 5)) == (3, 5, 5, 32)
    assert basis_shape(32, (10, 100)) == (100, 10)
    assert basis_shape(32, (100, 32)) is None
    assert basis_shape(32, (100,)) is None
    assert basis_shape(0, (100, 100)) is None
