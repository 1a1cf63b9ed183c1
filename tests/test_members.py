"""Tensors that hold several train as these would alone: stacks of experts, fused projections."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from compiler import compiler
from rules import random_rule
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME

from nfn_optim import NFNOptimizer, Symmetry, UpdateRule, pretrained, symmetry_of
from nfn_optim.engine.executor import Execution
from nfn_optim.engine.form import Form
from nfn_optim.engine.sharding import Shard
from nfn_optim.rule.members import forms_of, members_of

EXPERTS, STEPS = 3, 9
RULES = {"shipped": pretrained.load, "random": lambda: random_rule(0.1, rank=3, power=0.5, refresh_every=2)}


class Stacked(nn.Module):
    """Experts in one tensor for each layer; the tokens of some steps are for two of them only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.bias = nn.Parameter(0.3 * torch.randn(EXPERTS, 8, 5)), nn.Parameter(torch.zeros(EXPERTS, 8))
        self.down = nn.Parameter(0.3 * torch.randn(EXPERTS, 4, 8))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        hidden = torch.einsum("bi,ehi->ebh", x, self.up) + self.bias[:, None]
        return torch.einsum("ebh,eoh->bo", hidden.tanh() * chosen[:, None, None], self.down)


class ByNumber(Stacked):
    """They are taken one by one, if they have tokens."""

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        output = x.new_zeros(len(x), 4)
        for e in chosen.nonzero():
            output += (x @ self.up[e.item()].T + self.bias[e.item()]).tanh() @ self.down[e.item()].T
        return output


class Single(nn.Module):
    """One expert of them."""

    def __init__(self, stacked: Stacked, expert: int) -> None:
        super().__init__()
        for name, p in stacked.named_parameters():
            setattr(self, name, nn.Parameter(p.detach()[expert].clone()))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.up.T + self.bias).tanh() @ self.down.T


class Separate(nn.Module):
    """The experts in tensors of their own."""

    def __init__(self, stacked: Stacked) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Single(stacked, e) for e in range(EXPERTS))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return sum((chosen[e] * expert(x) for e, expert in enumerate(self.experts)), torch.zeros(()))


def train(model: nn.Module, optimizer: NFNOptimizer, steps: int = STEPS, unused: int | None = None) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(16, 5, generator=generator), torch.randn(16, 4, generator=generator)
        chosen = torch.ones(EXPERTS)
        chosen[step % EXPERTS] = 0.0
        if unused is not None:
            chosen[unused] = 0.0
        optimizer.zero_grad()
        torch.autograd.backward((model(x.to(next(model.parameters())), chosen) - target).square().mean())
        optimizer.step()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "name", "unused", "compiled"),
    [
        *((Stacked, name, unused, False) for name in RULES for unused in (None, 1)),
        *((ByNumber, name, None, False) for name in RULES),
        pytest.param(Stacked, "shipped", 1, True, marks=[compiler, pytest.mark.exhaustive]),
    ],
)
def test_experts_in_one_tensor_train_like_experts_in_tensors_of_their_own(
    kind: type[Stacked], name: str, unused: int | None, compiled: bool
) -> None:
    """And one that never has a token keeps every bit."""
    stacked = kind().double()
    start = {n: p.detach().clone() for n, p in stacked.named_parameters()}
    separate = Separate(stacked)
    for model in (stacked, separate):
        optimizer = NFNOptimizer(model, rule=RULES[name](), compile=compiled)
        train(model, optimizer, unused=unused)
        assert optimizer.fallbacks == 0
    for n, p in stacked.named_parameters():
        for e, expert in enumerate(separate.experts):
            torch.testing.assert_close(p[e], dict(expert.named_parameters())[n], rtol=1e-5, atol=1e-7)
        if unused is not None:
            assert torch.equal(p[unused], start[n][unused])
        assert not torch.equal(p[0], start[n][0])


def test_the_state_of_a_stack_is_three_floats_a_weight_and_some_for_every_neuron() -> None:
    stacked = Stacked()
    optimizer = NFNOptimizer(stacked)
    train(stacked, optimizer, 1)
    state = optimizer.state[stacked.up]
    assert sum(x.numel() for key, x in state.items() if "exp_avg" in key) == 3 * stacked.up.numel()
    assert state["row_coeffs"].numel() == EXPERTS * 8 * 9
    assert state["gains"].numel() == EXPERTS * (1 + 8 + 5)
    assert "basis" not in state  # a matrix of five columns needs none


class Attention(nn.Module):
    """Self-attention with two heads, its projections in one tensor, or in three."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        weights = [0.4 * torch.randn(8, 6) for _ in range(3)]
        biases = [0.1 * torch.randn(8) for _ in range(3)]
        self.out, self.how = nn.Parameter(0.4 * torch.randn(4, 8)), how
        if how == "rows":
            self.weight, self.bias = nn.Parameter(torch.cat(weights)), nn.Parameter(torch.cat(biases))
        elif how == "columns":
            self.weight, self.bias = nn.Parameter(torch.cat(weights).T.contiguous()), nn.Parameter(torch.cat(biases))
        else:
            self.weight = nn.ParameterList(weights)
            self.bias = nn.ParameterList(biases)

    def projected(self, x: Tensor) -> list[Tensor]:
        if self.how == "rows":
            return list((x @ self.weight.T + self.bias).chunk(3, -1))
        if self.how == "columns":
            return list((x @ self.weight + self.bias).split(8, -1))
        return [x @ w.T + b for w, b in zip(self.weight, self.bias, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        heads = (y.tanh().unflatten(-1, (2, 4)) for y in self.projected(x))  # keys have gradients up to rounding else
        q, k, v = (y.transpose(-2, -3) for y in heads)
        return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2) @ self.out.T

    def parts(self) -> list[Tensor]:
        """Weights, then biases of the projections."""
        if self.how == "separate":
            return [*self.weight, *self.bias]
        weights = self.weight.chunk(3) if self.how == "rows" else self.weight.T.chunk(3)
        return [*weights, *self.bias.chunk(3)]


@pytest.mark.parametrize("name", RULES)
def test_fused_projections_train_like_three(name: str) -> None:
    found = {}
    for how in ("separate", "rows", "columns"):
        model = Attention(how).double()
        optimizer = NFNOptimizer(model, rule=RULES[name]())
        for step in range(STEPS):
            x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            torch.autograd.backward((model(x) - x[..., :4].sin()).square().mean())
            optimizer.step()
        assert optimizer.symmetry is not None
        assert set(forms_of(optimizer.symmetry)) == (set() if how == "separate" else {"weight", "bias"})
        found[how] = [*model.parts(), model.out]
    for fused, separate in zip(found["rows"], found["separate"], strict=True):
        torch.testing.assert_close(fused, separate, rtol=1e-5, atol=1e-7)
    moved = [(p - q).norm() / q.norm() for p, q in zip(found["columns"], found["separate"], strict=True)]
    assert max(moved) < 0.2  # (in, out): rows and columns have changed roles


@pytest.mark.exhaustive
@compiler
@pytest.mark.timeout(900)
def test_columns_of_a_tensor_in_compiled_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are not contiguous."""
    found = []
    monkeypatch.setattr("nfn_optim.optimizer.optimizer.is_small", lambda _: False)
    for execution in (Execution(), Execution(compiled=True, compile_from=0, tile=40)):
        model = Attention("columns").double()
        optimizer = NFNOptimizer(model)
        monkeypatch.setattr(optimizer, "_execution", lambda *_, execution=execution: execution)
        for step in range(5):
            x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            torch.autograd.backward((model(x) - x[..., :4].sin()).square().mean())
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["fused_qkv", "encoder_layer", "experts"])
def test_training_is_equivariant(name: str) -> None:
    """Under the symmetry of the network, although members are named by it."""
    network = BY_NAME[name]
    symmetry = symmetry_of(network.module(), *network.inputs()).restrict(dict(network.module().named_parameters()))
    assert forms_of(symmetry)
    rule = random_rule(0.1, rank=3, power=0.5).double()
    params = draw(symmetry, 0)
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(1))
    moved = symmetry.permute(params, permutations)
    state, moved_state = (rule.init(x, forms=forms_of(symmetry)) for x in (params, moved))
    for step in range(4):
        grads = draw(symmetry, step + 1)
        with torch.no_grad():
            update, state = rule(params, grads, state, symmetry, lr=0.01)
            permuted = symmetry.permute(grads, permutations)
            moved_update, moved_state = rule(moved, permuted, moved_state, symmetry, lr=0.01)
        params = {n: p + update[n] for n, p in params.items()}
        moved = {n: p + moved_update[n] for n, p in moved.items()}
    for n, p in symmetry.permute(params, permutations).items():
        torch.testing.assert_close(moved[n], p, rtol=1e-7, atol=1e-9)


def draw(symmetry: Symmetry, seed: int, *batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: (*batch, *symmetry.shape_of(n)) for n in symmetry.dims}
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


STACK = Symmetry(
    {"w": ("e", "((a > d) + (a > d) + h)", "in"), "b": ("e", "h"), "v": ("in", "(d + d)")},
    {"e": 2, "a": 2, "d": 3, "h": 4, "in": 5},
    frozenset({"in"}),
    {"h": ("e",), "d": ("a",)},
)


def test_forms_and_members() -> None:
    assert forms_of(STACK) == {
        "w": Form((0, 2), (0, (6, 6, 4))),
        "b": Form((0, 2)),
        "v": Form(None, (1, (3, 3))),
    }
    members = members_of(STACK)
    assert members.names["w"] == tuple(f"w[{i}]" for i in range(6))
    assert members.symmetry.dims["w[2]"] == ("h.0", "in")
    assert members.symmetry.dims["b[1]"] == ("h.1",)
    assert members.symmetry.dims["w[4]"] == members.symmetry.dims["w[0]"]
    members.symmetry.check(members.split(draw(STACK, 0)))
    for batch in ((), (2,)):
        params = draw(STACK, 0, *batch)
        joined = members.join(members.split(params, len(batch)), len(batch))
        assert all(torch.equal(joined[n], p) for n, p in params.items())


@pytest.mark.parametrize("form", ["shipped", "random"])
def test_pure_in_place_and_in_a_batch(form: str) -> None:
    rule = RULES[form]().requires_grad_(False).double()
    params = draw(STACK, 0, 2)
    forms = forms_of(STACK)
    state = rule.init(params, 1, forms=forms)
    alone = [{n: p[i].clone() for n, p in params.items()} for i in range(2)]
    states = [rule.init(one, forms=forms) for one in alone]
    for step in range(5):
        grads, refresh = draw(STACK, step + 1, 2), rule.refreshes(step)
        update, state = rule(params, grads, state, STACK, lr=0.01, batch_dims=1, refresh=refresh)
        params = {n: p + update[n] for n, p in params.items()}
        for i, one in enumerate(alone):
            rule.step_(one, {n: g[i] for n, g in grads.items()}, states[i], STACK, lr=0.01, refresh=refresh)
    for i, one in enumerate(alone):
        for n, p in one.items():
            torch.testing.assert_close(p, params[n][i], rtol=1e-7, atol=1e-9)
            assert {k: x.shape for k, x in states[i][n].items()} == {k: x[i].shape for k, x in state[n].items()}


def test_state_is_saved_and_loaded_before_the_symmetry_is_known() -> None:
    """It goes on as if it had not been interrupted; and what was known of another form starts afresh."""
    whole, first = Stacked(), Stacked()
    uninterrupted, optimizer = NFNOptimizer(whole), NFNOptimizer(first)
    train(whole, uninterrupted, 6)
    train(first, optimizer, 4)
    second = Stacked()
    second.load_state_dict(first.state_dict())
    resumed = NFNOptimizer(second)
    resumed.load_state_dict(optimizer.state_dict())
    for step in (4, 5):
        for model, by in ((second, resumed),):
            generator = torch.Generator().manual_seed(step)
            x, target = torch.randn(16, 5, generator=generator), torch.randn(16, 4, generator=generator)
            chosen = torch.ones(EXPERTS)
            chosen[step % EXPERTS] = 0.0
            by.zero_grad()
            torch.autograd.backward((model(x, chosen) - target).square().mean())
            by.step()
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))
    separate = Symmetry.separate({n: tuple(p.shape) for n, p in second.named_parameters()})
    other = NFNOptimizer(second, symmetry=separate)
    other.load_state_dict(resumed.state_dict())
    train(second, other, 1)
    assert other.state[second.up]["row_coeffs"].dim() == 2


@pytest.mark.parametrize("cuts", [(0, 1, 3), (0, 3, 3)])
@pytest.mark.parametrize("form", [Form((0, 3)), Form((0, 3), (0, (1, 3)))])
def test_local_members_make_up_the_whole(form: Form, cuts: tuple[int, ...]) -> None:
    x = torch.arange(3 * 4 * 5).reshape(3, 4, 5)
    pieces: dict[int, list[Tensor]] = {}
    for start, stop in itertools.pairwise(cuts):
        shard = Shard(None, (3, 4, 5), (slice(start, stop), slice(0, 4), slice(0, 5)), is_primary=True)  # type: ignore[arg-type]
        for i, (local, of_member) in enumerate(form.local_members_of(x[start:stop], shard)):
            assert tuple(local.shape) == tuple(s.stop - s.start for s in of_member.spans)
            pieces.setdefault(i, []).append(of_member.pad_to_whole(local, 0, 2))
    for i, member in enumerate(form.members_of(x)):
        assert torch.equal(sum(pieces[i], torch.zeros_like(member)), member)


def test_parts_of_a_sharded_dimension() -> None:
    x, form = torch.arange(35).reshape(7, 5), Form(None, (0, (3, 4)))
    totals: Mapping[int, Tensor] = {i: torch.zeros_like(m) for i, m in enumerate(form.members_of(x))}
    for start, stop in ((0, 2), (2, 5), (5, 7)):
        shard = Shard(None, (7, 5), (slice(start, stop), slice(0, 5)), is_primary=True)  # type: ignore[arg-type]
        for i, (local, of_member) in enumerate(form.local_members_of(x[start:stop], shard)):
            totals[i].add_(of_member.pad_to_whole(local, 0, 2))
    assert all(torch.equal(totals[i], member) for i, member in enumerate(form.members_of(x)))


def test_a_rule_without_a_learned_part_divides_nothing() -> None:
    model = Stacked()
    optimizer = NFNOptimizer(model, rule="adamw")
    train(model, optimizer, 2)
    assert set(optimizer.state[model.up]) == {"step", "exp_avg", "exp_avg_sq"}
    assert isinstance(optimizer.rule, UpdateRule)
