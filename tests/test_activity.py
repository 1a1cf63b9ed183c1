"""AdamW's promises: what has no gradient does not move, and the step of the others does not depend on it.

Whatever has learned what, in both directions, pure, in place, compiled and sharded, with moments of any precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from compiler import compiler
from rules import random_rule
from torch import Tensor, nn

from nfn_optim import NFNOptimizer, Symmetry, UpdateRule, pretrained
from nfn_optim.engine.executor import Execution

STEPS = 50
RULES: dict[str, Callable[[], UpdateRule]] = {
    "shipped": pretrained.load,
    "random": lambda: random_rule(0.1, power=0.5),
    "random, orthogonal": lambda: random_rule(0.1, rank=3, power=0.5, refresh_every=2),
}
SYMMETRY = Symmetry(
    {"w": ("h", "in"), "b": ("h",), "k": ("c", "h", "t"), "v": ("(c t)", "e"), "s": ()},
    {"h": 12, "in": 9, "c": 5, "t": 2, "e": 7},
)
ACTIVE = {"h": [1, 4, 5, 10], "in": [0, 2, 3, 5, 8], "c": [0, 1, 3], "t": [0, 1], "e": [0, 2, 3, 6]}
SMALL = Symmetry(SYMMETRY.dims, {axis: len(entries) for axis, entries in ACTIVE.items()})


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    return RULES[request.param]().requires_grad_(False)


def draw(symmetry: Symmetry, seed: int, *batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: (*batch, *symmetry.shape_of(n)) for n in symmetry.dims}
    return {n: 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


def index_of(name: str, symmetry: Symmetry = SYMMETRY) -> tuple[Tensor, ...]:
    """The active entries of a tensor, as an index."""
    rows = []
    for dim in symmetry.dims[name]:
        if dim == "(c t)":
            rows.append(torch.tensor([c * symmetry.sizes["t"] + t for c in ACTIVE["c"] for t in ACTIVE["t"]]))
        else:
            rows.append(torch.tensor(ACTIVE[dim]))
    return tuple(torch.meshgrid(*rows, indexing="ij")) if rows else ()


def active_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is active of every tensor."""
    return {n: x[(..., *index_of(n))] if x.dim() else x for n, x in tensors.items()}


def embedded(small: dict[str, Tensor], large: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with other values where they are active."""
    result = {n: x.clone() for n, x in large.items()}
    for n, x in small.items():
        result[n][(..., *index_of(n))] = x
    return result


def trajectory(
    rule: UpdateRule, params: dict[str, Tensor], symmetry: Symmetry, gradients: Iterator[dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Parameters after every step of the pure rule."""
    batch_dims = params["s"].dim()
    state = rule.init(params, batch_dims)
    for step, grads in enumerate(gradients):
        with torch.no_grad():
            options = {"lr": 0.01, "refresh": rule.refreshes(step), "batch_dims": batch_dims}
            update, state = rule(params, grads, state, symmetry, **options)
        params = {n: p + update[n] for n, p in params.items()}
        yield params


def small_gradients(*batch: int) -> Iterator[dict[str, Tensor]]:
    return (draw(SMALL, 10 + step % 7, *batch) for step in range(STEPS))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_active_rows_move_as_if_they_were_alone(rule: UpdateRule, batch: tuple[int, ...]) -> None:
    """Rows, columns, taps and neurons without gradients make no difference, and do not move."""
    rule = rule.double()
    large = draw(SYMMETRY, 0, *batch)
    small = active_of(large)
    zeros = {n: torch.zeros_like(p) for n, p in large.items()}
    of_large = trajectory(rule, large, SYMMETRY, (embedded(g, zeros) for g in small_gradients(*batch)))
    of_small = trajectory(rule, small, SMALL, small_gradients(*batch))
    for step, (found, expected) in enumerate(zip(of_large, of_small, strict=True), 1):
        if step in (1, 2, STEPS):
            for n, p in active_of(found).items():
                torch.testing.assert_close(p, expected[n], rtol=1e-5, atol=1e-7)
            for n, p in embedded(small, found).items():
                assert torch.equal(p, large[n]), n


@pytest.mark.parametrize("name", RULES)
def test_an_idle_tensor_makes_no_difference_to_the_others(name: str) -> None:
    """An expert without tokens is as good as absent."""
    rule = RULES[name]().requires_grad_(False).double()
    dims = {"w": ("h", "in"), "b": ("h",)}
    alone, both = (Symmetry(d, {"h": 6, "in": 5, "x": 4}) for d in (dims, dims | {"idle": ("h", "x"), "bias": ("x",)}))
    params = draw(both, 0)
    zeros = {n: torch.zeros_like(p) for n, p in params.items()}
    found, expected = dict(params), {n: params[n] for n in dims}
    state, expected_state = rule.init(found), rule.init(expected)
    for step in range(10):
        grads = draw(alone, step)
        options = {"lr": 0.01, "refresh": rule.refreshes(step)}
        rule.step_(found, {n: g.clone() for n, g in zeros.items()} | grads, state, both, **options)
        rule.step_(expected, grads, expected_state, alone, **options)
        for n, p in expected.items():
            torch.testing.assert_close(found[n], p, rtol=1e-9, atol=1e-11)
    assert torch.equal(found["idle"], draw(both, 0)["idle"])


# ------------------------------------------------------------------------------------------------------ the optimizer


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(40, 12), nn.Flatten(), nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 3))


def train(optimizer: NFNOptimizer, net: nn.Module, masks: list[Tensor], steps: int = 12) -> None:
    """On tokens below 20 only, with masked gradients."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(20, (16, 3), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(net(tokens), tokens.sum(1) % 3))
        for p, mask in zip(net.parameters(), masks, strict=True):
            assert p.grad is not None
            p.grad.mul_(mask)
        optimizer.step()


HOW: dict[str, dict[str, object]] = {
    "eager": {},
    "in tiles": {"execution": Execution(tile=100)},
    "compiled passes": {"execution": Execution(compiled=True, compile_from=0)},
    "compiled steps": {"compile": True},
    "bfloat16": {"state_dtype": torch.bfloat16},
    "bfloat16, compiled passes": {
        "state_dtype": torch.bfloat16,
        "execution": Execution(compiled=True, compile_from=0),
    },
}

MARKS = {
    "compiled passes": [pytest.mark.exhaustive],  # half a minute; those in bfloat16 are the same passes and more
    "bfloat16, compiled passes": [pytest.mark.slow],
    "compiled steps": [pytest.mark.exhaustive],  # takes minutes
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[compiler, *MARKS[how]]) if how in MARKS else how for how in HOW]
)
@pytest.mark.parametrize("name", ["shipped", "random, orthogonal"])
def test_what_never_had_a_gradient_keeps_every_bit(how: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruned weights and tokens that never occur, with weights that are not zero there."""
    net, options = model(), dict(HOW[how])
    generator = torch.Generator().manual_seed(2)
    masks = [(torch.rand(p.shape, generator=generator) > 0.6).float() for p in net.parameters()]
    masks[0][:] = 1.0  # the table has idle rows only
    start = [p.detach().clone() for p in net.parameters()]
    execution = options.pop("execution", None)
    optimizer = NFNOptimizer(net, rule=RULES[name](), **options)  # type: ignore[arg-type]
    if execution is not None:
        monkeypatch.setattr(optimizer, "_execution", lambda *_: execution)
        monkeypatch.setattr("nfn_optim.optimizer.optimizer.is_small", lambda _: False)
    train(optimizer, net, masks)
    masks[0][20:] = 0.0
    for p, old, mask in zip(net.parameters(), start, masks, strict=True):
        assert torch.equal(p[mask == 0], old[mask == 0])
        assert (p[mask > 0] != old[mask > 0]).float().mean() > 0.9


def test_weight_decay_moves_what_has_no_gradient() -> None:
    """As in AdamW, and by nothing else."""
    net = nn.Linear(7, 5)
    start = net.weight.detach().clone()
    optimizer = NFNOptimizer(net, lr=0.01, weight_decay=0.1)
    net(torch.ones(2, 7))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net.weight.grad[0] = torch.randn(7)  # type: ignore[index]
    optimizer.step()
    torch.testing.assert_close(net.weight[1:], start[1:] * (1 - 0.01 * 0.1), rtol=1e-6, atol=0)


def step_in_table(rows: int, seldom: bool) -> Tensor:
    """The last step of the ten rows of a table that have gradients; or all had one, long ago."""
    torch.manual_seed(0)
    table = nn.Parameter(0.02 * torch.randn(rows, 32))
    torch.manual_seed(1)
    table.data[:10] = 0.02 * torch.randn(10, 32)
    optimizer = NFNOptimizer([table], symmetry=Symmetry.separate({"0": (rows, 32)}))
    if seldom:
        table.grad = torch.full_like(table, 1e-3)
        optimizer.step()
        optimizer.state[table]["exp_avg"].zero_()
        optimizer.state[table]["exp_avg_slow"].zero_()
    for _ in range(20):
        old, table.grad = table.detach().clone(), torch.zeros_like(table)
        table.grad[:10] = 0.1 * torch.randn(10, 32) + 0.05
        optimizer.step()
    return (table.detach() - old)[:10]


@pytest.mark.parametrize("rows", [100, 10000])
def test_the_step_of_a_row_does_not_depend_on_the_size_of_its_table(rows: int) -> None:
    """Nor does its length much where each row has a gradient now and then: all are active, but few have a direction."""
    alone = step_in_table(10, seldom=False)
    torch.testing.assert_close(step_in_table(rows, seldom=False), alone, rtol=1e-3, atol=3e-6)
    assert step_in_table(rows, seldom=True).norm() < 2 * step_in_table(10, seldom=True).norm()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 50), (50, 0), (3, 0, 2)])
@pytest.mark.parametrize("alone", [True, False])
def test_a_parameter_without_entries_is_no_obstacle(shape: tuple[int, ...], alone: bool) -> None:
    empty, other = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(4, 3))
    params = [empty] if alone else [empty, other]
    optimizer = NFNOptimizer(params, symmetry=Symmetry.separate({str(i): tuple(p.shape) for i, p in enumerate(params)}))
    for _ in range(6):
        optimizer.zero_grad()
        torch.autograd.backward(empty.sum() + other.square().sum())
        optimizer.step()
    assert optimizer.param_groups[0]["steps_taken"] == 6
    assert other.isfinite().all()
    assert optimizer.fallbacks == 0


def test_masks_have_finite_derivatives() -> None:
    """Of the second step, through the first, with respect to gradients that are zero and to theta."""
    rule = random_rule(0.1, rank=3, power=0.5).double()
    params = {n: p.requires_grad_() for n, p in draw(SYMMETRY, 0).items()}
    zeros = {n: torch.zeros_like(p) for n, p in params.items()}
    grads = {n: g.detach().requires_grad_() for n, g in embedded(draw(SMALL, 1), zeros).items()}
    state, total = rule.init(params), torch.zeros(())
    for _ in range(2):
        update, state = rule(params, grads, state, SYMMETRY, lr=0.01)
        total = total + sum(u.square().sum() for u in update.values())
    found = torch.autograd.grad(total, [*params.values(), *grads.values(), *rule.parameters()], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in found)
