"""The features of the rule: independent of units, defined at zero."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

from nfn_optim.engine import passes
from nfn_optim.engine.blocks import layouts_of
from nfn_optim.engine.moments import init_moments, moment_constants, update_moments
from nfn_optim.engine.weight_features import FEATURES, STATISTICS, Features, Statistics, WeightFeatures, products_of
from nfn_optim.layers import Incidence
from nfn_optim.rule import UpdateRule, features
from nfn_optim.symmetry import Symmetry

SYMMETRY = Symmetry(
    {"k": ("c", "in", "tap"), "w": ("h", "(c tap)"), "b": ("h",), "s": ()},
    {"c": 3, "in": 2, "tap": 2, "h": 4},
    frozenset({"in", "tap"}),
)
NAMES = tuple(SYMMETRY.dims)


def draw(seed: int, batch: tuple[int, ...] = ()) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {n: torch.randn((*batch, *SYMMETRY.shape_of(n)), dtype=torch.float64) for n in NAMES}


def features_after(params: dict[str, Tensor], history: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """Features of every tensor, and the tensor features, after a list of gradients."""
    steps = torch.full((len(NAMES),), float(len(history)), dtype=torch.float64)
    constants = moment_constants(steps)[:1]
    raw, whole = {}, []
    for n, p in params.items():
        array = p.reshape(len(p) if p.dim() else 1, -1)
        moments = list(init_moments(array, slow=True, dtype=p.dtype).values())
        for grads in history:
            moments = update_moments(grads[n].reshape(moments[0].shape), moments, constants)
        g = history[-1][n].reshape(array.shape)
        raw[n] = WeightFeatures(*(x.reshape(p.shape) for x in Features(array, g, moments, constants).all()))
        whole.append(torch.stack([x.mean() for x in products_of(raw[n])]))
    incidence, means = Incidence(SYMMETRY), torch.stack(whole)
    scale, rms = features.scales_of(Statistics.unpack(means).weight, incidence)
    units = torch.stack(features.units_of(Statistics.unpack(means), scale), -1)
    seen = {n: torch.stack([x * u for x, u in zip(raw[n], units[i], strict=True)]) for i, n in enumerate(NAMES)}
    time = features.time_features(steps, None)
    counts = torch.tensor([[*p.shape, 1, 1, 1][:3] for p in params.values()]).double()
    statistics = features.log_statistics(means, units)
    return seen, features.tensor_features(statistics, scale, rms, counts, time, incidence)


@pytest.mark.parametrize("factor", [1e-2, 1e3])
def test_the_unit_of_the_loss_does_not_matter(factor: float) -> None:
    params, history = draw(0), [draw(1), draw(2), draw(3)]
    seen, tensors = features_after(params, history)
    again, tensors_again = features_after(params, [{n: factor * g for n, g in grads.items()} for grads in history])
    for n in NAMES:
        torch.testing.assert_close(again[n], seen[n], rtol=1e-4, atol=1e-5)  # Adam's epsilon
    torch.testing.assert_close(tensors_again, tensors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["k", "w"])
def test_the_unit_of_a_matrix_does_not_matter(name: str) -> None:
    """P = c w has gradients g / c; vectors without a scale of their own see their neighbours', so b is left out."""
    params, history = draw(0), [draw(1), draw(2), draw(3)]
    seen, _ = features_after(params, history)
    changed = params | {name: 7 * params[name]}
    again, _ = features_after(changed, [grads | {name: grads[name] / 7} for grads in history])
    for n in ("k", "w"):
        torch.testing.assert_close(again[n], seen[n], rtol=1e-4, atol=1e-5)


def test_the_first_feature_is_adams_direction() -> None:
    history = [draw(1), draw(2), draw(3)]
    seen, _ = features_after(draw(0), history)
    for n in NAMES:
        expected = oracle.adam_direction([grads[n] for grads in history])
        torch.testing.assert_close(seen[n][0], expected, rtol=1e-9, atol=1e-12)


def test_features_are_zero_without_gradients() -> None:
    zero = {n: torch.zeros_like(p) for n, p in draw(0).items()}
    seen, tensors = features_after(draw(0), [zero, zero])
    assert all(not f.abs().max() > 1e-12 for f in seen.values())
    assert torch.isfinite(tensors).all()


def test_gradients_of_features_are_finite_at_zero() -> None:
    """Second derivatives of the loss go through the features; dead units give exact zeros."""
    params = {n: p.requires_grad_() for n, p in draw(0).items()}
    grads = {n: torch.zeros_like(p).requires_grad_() for n, p in params.items()}
    seen, tensors = features_after(params, [grads])
    total = sum((f.sum() for f in seen.values()), tensors.sum())
    found = torch.autograd.grad(total, [*params.values(), *grads.values()])
    assert all(torch.isfinite(g).all() for g in found)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_state_is_precise_and_small(dtype: torch.dtype, expected: torch.dtype) -> None:
    params = {"w": torch.ones(2, 40, 50, dtype=dtype)}
    state = UpdateRule().init(params, 1)["w"]
    assert {value.dtype for value in state.values()} == {expected}
    assert state["step"].shape == (2,)
    assert sum(value[0].numel() for value in state.values()) <= 4 * 40 * 50  # floats per parameter, neurons included


def test_scales() -> None:
    """A matrix has its own; a vector at least its neighbours'; zeros without neighbours a constant."""
    symmetry = Symmetry(
        {"w": ("h", "in"), "b": ("h",), "u": ("out", "h"), "gain": ("h",), "lonely": ("x",), "zero": ("h", "y")},
        {"h": 2, "in": 2, "out": 2, "x": 2, "y": 2},
    )
    params = {
        "w": torch.full((2, 2), 0.1),
        "b": torch.zeros(2),
        "u": torch.full((2, 2), 0.4),
        "gain": torch.ones(2),
        "lonely": torch.zeros(2),
        "zero": torch.zeros(2, 2),
    }
    mean_squares = torch.stack([p.square().mean() for p in params.values()])
    scale, rms = features.scales_of(mean_squares, Incidence(symmetry))
    found = dict(zip(params, scale.tolist(), strict=True))
    expected = {"w": 0.1, "b": 0.2, "u": 0.4, "gain": 1.0, "lonely": features.DEFAULT_SCALE, "zero": 0.02}
    assert found == pytest.approx(expected, rel=1e-5)
    assert rms[0].item() == pytest.approx(0.1)


def test_time() -> None:
    steps = torch.tensor([[1.0, 50.0], [100.0, 1000.0]])
    unknown = features.time_features(steps, None)
    assert unknown.shape == (2, 2, features.TIME_CHANNELS)
    assert torch.equal(unknown, features.time_features(steps, 0.0))
    known = features.time_features(steps, torch.tensor([[100.0], [200.0]]))
    assert torch.equal(known[..., :5], unknown[..., :5])  # age
    assert torch.equal(known[..., 5], torch.ones(2, 2))
    torch.testing.assert_close(known[..., 6], torch.tensor([[0.01, 0.5], [0.5, 1.0]]))  # never beyond the horizon
    assert torch.isfinite(known).all()


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])
def test_rows_are_pooled_over_all_other_dimensions(order: tuple[int, ...]) -> None:
    """However the dimensions lie in memory."""
    p, g = (torch.rand(3, 2, 4, dtype=torch.float64).permute(order).contiguous().permute(order) for _ in range(2))
    moments = [torch.zeros_like(p) for _ in range(3)]
    constants = moment_constants(torch.ones(1, 1, dtype=torch.float64))
    (layout,) = layouts_of([p], 0)
    arrays = [layout.fold([x]) for x in (p, g, *moments)]
    raw = passes.moments_and_features(arrays[0], arrays[1], arrays[2:], constants[0])[1].all()
    by_dim, whole = layout.sums(*passes.sums_of(raw))[0]
    by_dim, whole = [x * x.shape[0] / 24 for x in by_dim], whole / 24
    raw = WeightFeatures(*(layout.unfold(x)[0] for x in raw))
    assert [tuple(rows.shape) for rows in by_dim] == [(n, STATISTICS) for n in p.shape]
    torch.testing.assert_close(by_dim[1][1, 1], raw.slow[:, 1].square().mean())
    torch.testing.assert_close(by_dim[0][2, -1], (raw.slow[2] * raw.gradient[2]).mean())
    torch.testing.assert_close(by_dim[2][3, 3], p[:, :, 3].square().mean())
    torch.testing.assert_close(whole[0], raw.adam.square().mean())


def test_statistics_are_in_the_units_of_features() -> None:
    """They follow from those of the raw features and the units of weight and momentum."""
    raw = WeightFeatures(*(torch.rand(3, 4, dtype=torch.float64) + 0.5 for _ in range(FEATURES)))
    products = torch.stack(products_of(raw), -1)
    means = Statistics.unpack(products.mean((0, 1)))
    units = torch.stack(features.units_of(means, torch.tensor(0.1, dtype=torch.float64)), -1)
    found = features.log_statistics(products.mean(1), units)
    rms = [x.square().mean().sqrt() for x in raw]
    for k, feature in ((0, raw.adam), (3, raw.weight * rms[0] / 0.1), (4, raw.momentum / rms[4])):
        torch.testing.assert_close(found[:, k], torch.log(feature.square().mean(1).sqrt() + features.LOG_EPS))
    broken = features.log_statistics(torch.full((STATISTICS,), torch.nan), units)
    assert torch.isfinite(broken).all()
