"""NF-layers: the maps between rows, neurons and tensors, and the tied stack on them."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

from nfn_optim.engine.moments import ROW_CHANNELS
from nfn_optim.layers import Incidence, TiedStack
from nfn_optim.rule.features import TENSOR_CHANNELS
from nfn_optim.symmetry import Symmetry

SYMMETRIES = {
    "mlp": Symmetry(
        {"w0": ("h", "in"), "b0": ("h",), "w1": ("out", "h"), "b1": ("out",)},
        {"h": 4, "in": 3, "out": 2},
        frozenset({"in", "out"}),
    ),
    "conv, flatten, scalar": Symmetry(
        {"k": ("c", "in", "ky", "kx"), "w": ("h", "(c y x)"), "v": ("out", "h"), "scalar": ()},
        {"c": 3, "in": 2, "ky": 2, "kx": 2, "h": 4, "y": 2, "x": 1, "out": 2},
        frozenset({"in", "ky", "kx", "y", "x", "out"}),
    ),
    "reused, squared": Symmetry(
        {"w": ("h", "h"), "b": ("h",), "u": ("(h h)", "in"), "v": ("out", "h")},
        {"h": 3, "in": 2, "out": 2},
        frozenset({"in", "out"}),
    ),
    "heads, groups, sums": Symmetry(
        {
            "qkv": ("((h > d) + (h > d) + (h > e))", "(a + b)"),
            "out": ("(a + b)", "(h > e)"),
            "kernel": ("(h > o)", "d"),
            "v": ("(3 (a + b))",),
        },
        {"h": 2, "d": 3, "e": 2, "a": 2, "b": 1, "o": 2, "3": 3},
        frozenset({"3"}),
        {"d": ("h",)},
    ),
}


@pytest.fixture(params=SYMMETRIES)
def symmetry(request: pytest.FixtureRequest) -> Symmetry:
    return SYMMETRIES[request.param]


def stack(rounds: int = 2) -> TiedStack:
    torch.manual_seed(0)
    made = TiedStack(ROW_CHANNELS, TENSOR_CHANNELS, 5, 3, rounds).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return made


def inputs(incidence: Incidence, *batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    rows = torch.randn(*batch, incidence.rows, ROW_CHANNELS, dtype=torch.float64)
    return rows, torch.randn(*batch, len(incidence.names), TENSOR_CHANNELS, dtype=torch.float64)


def moved(symmetry: Symmetry, incidence: Incidence, permutations: dict[str, Tensor], only: str = "") -> Tensor:
    """How the rows are reordered when the axes are permuted, in all tensors or in one only: `(N,)`."""
    index = torch.arange(incidence.rows)
    for t, name in enumerate(incidence.names):
        for s in incidence.segments[t]:
            if only in ("", name):
                order = torch.arange(s.length)
                if not s.mute:
                    order = symmetry.index_of(symmetry.dims[name][s.dim], permutations)
                index[s.start : s.start + s.length] = s.start + order
    return index


def spoken(incidence: Incidence, rows: Tensor) -> Tensor:
    """Let all rows of a mute dimension say the same."""
    rows = rows.clone()
    for s in (s for segments in incidence.segments for s in segments if s.mute):
        rows[..., s.start : s.start + s.length, :] = rows[..., s.start : s.start + 1, :]
    return rows


def test_means_and_sums_equal_the_slow_ones(symmetry: Symmetry) -> None:
    incidence = Incidence(symmetry)
    rows, _ = inputs(incidence)
    neurons = torch.randn(incidence.neurons, 4, dtype=torch.float64)
    slow = oracle.rows_to_neurons(rows, symmetry, incidence)
    torch.testing.assert_close(incidence.rows_to_neurons(rows), slow, rtol=1e-6, atol=1e-6)  # shares are float32
    slow = oracle.neurons_to_rows(neurons, symmetry, incidence)
    torch.testing.assert_close(incidence.neurons_to_rows(neurons), slow)


def test_means_of_ones_are_ones(symmetry: Symmetry) -> None:
    incidence = Incidence(symmetry)
    ones = torch.ones(2, incidence.rows, 1)
    torch.testing.assert_close(incidence.rows_to_neurons(ones), torch.ones(2, incidence.neurons, 1))
    whole = incidence.rows_to_tensors(ones)
    has_rows = torch.tensor([float(n > 0) for n in incidence.ndims]).reshape(1, -1, 1)
    torch.testing.assert_close(whole, has_rows.expand_as(whole))


def test_every_row_belongs_to_its_dimension(symmetry: Symmetry) -> None:
    incidence = Incidence(symmetry)
    covered = torch.zeros(incidence.rows)
    for t, name in enumerate(incidence.names):
        assert [s.dim for s in incidence.segments[t]] == list(range(incidence.ndims[t]))
        assert tuple(s.length for s in incidence.segments[t]) == symmetry.shape_of(name)
        for s in incidence.segments[t]:
            covered[s.start : s.start + s.length] += 1
            first, last = incidence.role_spans[s.role]
            assert first <= s.start <= s.start + s.length <= last
    assert torch.equal(covered, torch.ones(incidence.rows))


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_stack_is_equivariant(symmetry: Symmetry, rounds: int) -> None:
    """Under every axis, fixed ones too: the stack gives no entry a meaning of its own."""
    incidence, made = Incidence(symmetry), stack(rounds)
    rows, tensors = inputs(incidence)
    symmetry = Symmetry(symmetry.dims, symmetry.sizes, nested=symmetry.nested)
    permutations = symmetry.random_permutations()
    rows = spoken(incidence, rows)
    index = moved(symmetry, incidence, permutations)
    by_row, by_tensor = made(rows, tensors, incidence)
    permuted_by_row, permuted_by_tensor = made(rows[index], tensors, incidence)
    torch.testing.assert_close(permuted_by_row, by_row[index], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(permuted_by_tensor, by_tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("rounds", "notices"), [(2, True), (0, False)])
def test_the_stack_notices_what_moves_in_one_tensor_only(rounds: int, notices: bool) -> None:
    """An MLP's first matrix permuted without its bias is another network; with no rounds nobody hears of it."""
    symmetry = SYMMETRIES["mlp"]
    incidence, made = Incidence(symmetry), stack(rounds)
    rows, tensors = inputs(incidence)
    index = moved(symmetry, incidence, {"h": torch.tensor([1, 2, 3, 0])}, only="w0")
    by_row, _ = made(rows, tensors, incidence)
    permuted, _ = made(rows[index], tensors, incidence)
    assert torch.allclose(permuted, by_row[index], atol=1e-9) is not notices


def test_a_batch_is_its_members(symmetry: Symmetry) -> None:
    incidence, made = Incidence(symmetry), stack()
    rows, tensors = inputs(incidence, 2, 3)
    by_row, by_tensor = made(rows, tensors, incidence)
    for i in range(2):
        for j in range(3):
            one_row, one_tensor = made(rows[i, j], tensors[i, j], incidence)
            torch.testing.assert_close(one_row, by_row[i, j])
            torch.testing.assert_close(one_tensor, by_tensor[i, j])


def test_a_new_stack_says_nothing(symmetry: Symmetry) -> None:
    incidence = Incidence(symmetry)
    made = TiedStack(ROW_CHANNELS, TENSOR_CHANNELS, 5, 3, 2).double()
    assert all(not said.any() for said in made(*inputs(incidence), incidence))
