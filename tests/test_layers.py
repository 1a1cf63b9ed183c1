"""NF-layers: the maps between rows, neurons and tensors, and message passing on them."""

from __future__ import annotations

import oracle
import pytest
import torch
from rules import perturbed
from symmetries import SYMMETRIES
from torch import Tensor

from nfn_optim.layers import Incidence, MessagePassing
from nfn_optim.rule.features import ROW_CHANNELS, TENSOR_CHANNELS
from nfn_optim.symmetry import Symmetry


@pytest.fixture(params=SYMMETRIES)
def symmetry(request: pytest.FixtureRequest) -> Symmetry:
    return SYMMETRIES[request.param]


def message_passing(rounds: int = 2) -> MessagePassing:
    torch.manual_seed(0)
    return perturbed(MessagePassing(ROW_CHANNELS, TENSOR_CHANNELS, 5, 3, rounds).double(), 0.3)


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
                if not s.masked:
                    order = symmetry.index_of(symmetry.dims[name][s.dim], permutations)
                index[s.start : s.start + s.length] = s.start + order
    return index


def with_masked_rows(incidence: Incidence, rows: Tensor) -> Tensor:
    """Give all rows of a masked dimension the same values."""
    rows = rows.clone()
    for s in (s for segments in incidence.segments for s in segments if s.masked):
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


def test_means_over_active_rows_equal_the_slow_ones(symmetry: Symmetry) -> None:
    """Idle rows have no weight; all dimensions with an active row of a neuron weigh the same."""
    incidence = Incidence(symmetry)
    rows, _ = inputs(incidence)
    active = (torch.rand(incidence.rows, generator=torch.Generator().manual_seed(2)) > 0.4).double()
    pair_weight, row_weight = incidence.mean_weights(active)
    slow = oracle.rows_to_neurons(rows, symmetry, incidence, active)
    torch.testing.assert_close(incidence.rows_to_neurons(rows, pair_weight), slow, rtol=1e-6, atol=1e-6)
    found = incidence.rows_to_tensors(rows, row_weight)
    for t, segments in enumerate(incidence.segments):
        spans = [slice(s.start, s.start + s.length) for s in segments]
        means = [rows[span][active[span] > 0].sum(0) / active[span].sum().clamp(min=1) for span in spans]
        torch.testing.assert_close(found[t], sum(means, torch.zeros_like(rows[0])) / max(len(means), 1))
    everything = incidence.mean_weights(torch.ones_like(active))
    torch.testing.assert_close(incidence.rows_to_neurons(rows, everything[0]), incidence.rows_to_neurons(rows))
    torch.testing.assert_close(incidence.rows_to_tensors(rows, everything[1]), incidence.rows_to_tensors(rows))


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
def test_message_passing_is_equivariant(symmetry: Symmetry, rounds: int) -> None:
    """Under every axis, fixed ones too: no entry has a meaning of its own."""
    incidence, made = Incidence(symmetry), message_passing(rounds)
    rows, tensors = inputs(incidence)
    symmetry = Symmetry(symmetry.dims, symmetry.sizes, nested=symmetry.nested)
    permutations = symmetry.random_permutations()
    rows = with_masked_rows(incidence, rows)
    index = moved(symmetry, incidence, permutations)
    by_row, by_tensor = made(rows, tensors, incidence)
    permuted_by_row, permuted_by_tensor = made(rows[index], tensors, incidence)
    torch.testing.assert_close(permuted_by_row, by_row[index], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(permuted_by_tensor, by_tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("rounds", "notices"), [(2, True), (0, False)])
def test_an_output_depends_on_permutations_of_one_tensor_only_with_messages(rounds: int, notices: bool) -> None:
    """An MLP's first matrix permuted without its bias is another network; with no rounds no output depends on it."""
    symmetry = SYMMETRIES["mlp"]
    incidence, made = Incidence(symmetry), message_passing(rounds)
    rows, tensors = inputs(incidence)
    index = moved(symmetry, incidence, {"h": torch.tensor([1, 2, 3, 0])}, only="w0")
    by_row, _ = made(rows, tensors, incidence)
    permuted, _ = made(rows[index], tensors, incidence)
    assert torch.allclose(permuted, by_row[index], atol=1e-9) is not notices


def test_a_batch_is_its_members(symmetry: Symmetry) -> None:
    incidence, made = Incidence(symmetry), message_passing()
    rows, tensors = inputs(incidence, 2, 3)
    by_row, by_tensor = made(rows, tensors, incidence)
    for i in range(2):
        for j in range(3):
            one_row, one_tensor = made(rows[i, j], tensors[i, j], incidence)
            torch.testing.assert_close(one_row, by_row[i, j])
            torch.testing.assert_close(one_tensor, by_tensor[i, j])


def test_outputs_start_at_zero(symmetry: Symmetry) -> None:
    incidence = Incidence(symmetry)
    made = MessagePassing(ROW_CHANNELS, TENSOR_CHANNELS, 5, 3, 2).double()
    assert all(not output.any() for output in made(*inputs(incidence), incidence))
