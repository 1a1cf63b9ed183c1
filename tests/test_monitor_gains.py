"""The monitor's gains from the optimizer's state, against products of the factors written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nfn_optim import NFNOptimizer, Symmetry
from nfn_optim.monitor import sampling
from nfn_optim.monitor.gains import LogGains
from nfn_optim.monitor.sampling import Sample, local_real_view

DIMS = {"conv": ("h", "in", "y", "x"), "matrix": ("k", "h"), "vector": ("k",), "scalar": (), "wave": ("k", "out")}
SIZES = {"h": 3, "in": 2, "y": 2, "x": 1, "k": 4, "out": 2}
SYMMETRY = Symmetry(DIMS, SIZES, frozenset({"in", "y", "x", "out"}))
NAMES = tuple(DIMS)


def optimizer_after_a_step() -> NFNOptimizer:
    """Gradients, and factors drawn at random in the state of every tensor; `wave` is complex."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.exp(torch.randn(shape, generator=generator))

    params = []
    for name, dims in DIMS.items():
        shape = tuple(SIZES[axis] for axis in dims)
        params.append((name, nn.Parameter(torch.ones(shape, dtype=torch.complex64 if name == "wave" else None))))
    optimizer = NFNOptimizer(params, rule="adamw", symmetry=SYMMETRY)
    for _, p in params:
        p.grad = torch.ones_like(p)
        first, *others = (local_real_view(p).shape) or (1,)
        gains = draw(1), draw(first) if p.dim() else torch.ones(1), draw(sum(others))
        optimizer.state[p] = {"gains": torch.cat(gains), "row_coeffs": draw(first, 5)}
    return optimizer


def params_of(optimizer: NFNOptimizer) -> dict[str, nn.Parameter]:
    """By name."""
    return dict(zip(NAMES, optimizer.param_groups[0]["params"], strict=True))


def factors_of(optimizer: NFNOptimizer, name: str) -> tuple[Tensor, ...]:
    """The gains of a tensor, of its rows and of its other dimensions."""
    p = params_of(optimizer)[name]
    return optimizer.state[p]["gains"].split([1, *(local_real_view(p).shape or (1,))])


def gains_of(optimizer: NFNOptimizer, name: str) -> Tensor:
    """The gain of every weight of a tensor, by the definition."""
    view = local_real_view(params_of(optimizer)[name])
    tensor_gain, *factors = factors_of(optimizer, name)
    gains = tensor_gain.reshape(()).expand(view.shape).clone()
    for dim in range(view.dim()):
        shape = [-1 if d == dim else 1 for d in range(view.dim())]
        gains = gains * factors[dim].reshape(shape)
    return gains


def test_the_gain_of_a_tensor_is_the_geometric_mean_over_its_weights() -> None:
    optimizer = optimizer_after_a_step()
    expected = [gains_of(optimizer, name).log().mean().item() for name in NAMES]
    np.testing.assert_allclose(LogGains(optimizer).by_tensor(NAMES), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_entries", [5, 2048])
def test_the_gain_of_a_weight_is_the_product_of_its_factors(max_entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MAX_ENTRIES", max_entries)
    optimizer = optimizer_after_a_step()
    sample = Sample([local_real_view(p) for p in params_of(optimizer).values()])
    expected = sample.take([gains_of(optimizer, name).log() for name in NAMES])
    np.testing.assert_allclose(LogGains(optimizer).by_weight(NAMES, sample), expected, rtol=1e-5, atol=1e-6)


def test_the_gain_of_a_neuron_is_the_mean_over_the_dimensions_with_its_axis() -> None:
    optimizer = optimizer_after_a_step()
    conv, column = factors_of(optimizer, "conv")[1].log(), factors_of(optimizer, "matrix")[2].log()
    rows = [factors_of(optimizer, name)[1].log() for name in ("matrix", "vector", "wave")]
    found = LogGains(optimizer).by_neuron(SYMMETRY)
    assert found.keys() == {"h", "k"}
    np.testing.assert_allclose(found["h"], (conv + column) / 2, rtol=1e-5)
    np.testing.assert_allclose(found["k"], sum(rows) / 3, rtol=1e-5)


def test_a_flattened_axis_counts_all_of_its_columns() -> None:
    conv, linear = nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(1, 6))
    symmetry = Symmetry(
        {"conv": ("c", "in"), "linear": ("out", "(c y)")},
        {"c": 2, "in": 1, "out": 1, "y": 3},
        frozenset({"in", "out", "y"}),
    )
    optimizer = NFNOptimizer([("conv", conv), ("linear", linear)], rule="adamw", symmetry=symmetry)
    rows, columns = torch.tensor([1.0, 2.0]), torch.arange(1.0, 7.0)
    for p, row_gain, column_gains in ((conv, rows, torch.ones(1)), (linear, torch.ones(1), columns)):
        p.grad = torch.ones_like(p)
        optimizer.state[p] = {"gains": torch.cat([torch.tensor([9.0]), row_gain, column_gains])}
    expected = (rows.log() + columns.reshape(2, 3).log().mean(1)) / 2
    np.testing.assert_allclose(LogGains(optimizer).by_neuron(symmetry)["c"], expected, rtol=1e-6)


def test_tensors_without_a_gradient_are_left_out() -> None:
    optimizer = optimizer_after_a_step()
    params = params_of(optimizer)
    for name in ("matrix", "wave"):
        params[name].grad = None
    gains = LogGains(optimizer)
    assert np.flatnonzero(gains.by_tensor(NAMES)).tolist() == [0, 2, 3]
    found = gains.by_neuron(SYMMETRY)
    np.testing.assert_allclose(found["h"], factors_of(optimizer, "conv")[1].log(), rtol=1e-6)
    np.testing.assert_allclose(found["k"], factors_of(optimizer, "vector")[1].log(), rtol=1e-6)


def test_a_part_of_a_sharded_tensor_has_no_gains_by_weight() -> None:
    """Its coordinates in the sample are those of the part, its factors those of the whole."""
    optimizer = optimizer_after_a_step()
    views = [local_real_view(p) for p in params_of(optimizer).values()]
    views[1] = views[1][2:]
    gains = LogGains(optimizer).by_weight(NAMES, Sample(views))
    assert np.flatnonzero(gains.any(1)).tolist() == [0, 2, 3, 4]


def test_without_a_learned_part_all_gains_are_one() -> None:
    optimizer = optimizer_after_a_step()
    optimizer.state.clear()
    gains, sample = LogGains(optimizer), Sample([local_real_view(p) for p in params_of(optimizer).values()])
    assert not gains.by_tensor(NAMES).any()
    assert not gains.by_weight(NAMES, sample).any()
    assert gains.by_neuron(SYMMETRY) == {}
