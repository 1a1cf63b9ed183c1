"""Experts in one tensor that a network takes by number: where they are independent maps, and where they are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TypeAlias

import pytest
import torch
from live import live
from torch import Tensor, nn
from torch.nn import functional as F

from nfn_optim.rule.members import forms_of
from nfn_optim.symmetry import Symmetry, certify, symmetry_of

EXPERTS, HIDDEN, WIDTH = 4, 7, 6
Use: TypeAlias = Callable[["Experts", Tensor], Tensor]


class Experts(nn.Module):
    """A linear layer, experts that are used in some way, and a linear layer."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.router = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2), nn.Linear(WIDTH, EXPERTS)
        self.up, self.bias = (
            nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH)),
            nn.Parameter(torch.randn(EXPERTS, HIDDEN)),
        )
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.use(self, self.first(x)))
        return output

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.up, self.bias, self.down


def _one(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up, bias).relu(), down)


def _sum(x: Tensor, experts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    return sum((_one(x, *expert) for expert in experts), x)


def _numbers(m: Experts, x: Tensor, numbers: Iterable[int] = range(EXPERTS)) -> Tensor:
    return _sum(x, ((m.up[i], m.bias[i], m.down[i]) for i in numbers))


def _of_all(take: Callable[[Tensor], Iterable[Tensor]]) -> Use:
    return lambda m, x: _sum(x, zip(*map(take, m.weights), strict=True))


def _routed(m: Experts, x: Tensor) -> Tensor:
    """Two experts for every token; those without tokens are not run."""
    scores, chosen = m.router(x).softmax(-1).topk(2, -1)
    output = torch.zeros_like(x)
    for e in chosen.unique():
        token, place = (chosen == e).nonzero(as_tuple=True)
        output.index_add_(0, token, _one(x[token], m.up[e], m.bias[e], m.down[e]) * scores[token, place, None])
    return output + x


def _batched(m: Experts, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = torch.einsum("bi,ehi->ebh", x, up) + m.bias[:, None]
    return torch.bmm(hidden.relu(), down.mT).sum(0) + x


def _restacked(m: Experts, x: Tensor) -> Tensor:
    return _batched(m, x, torch.stack([m.up[i] for i in range(EXPERTS)]), torch.stack(list(m.down)))


def _both(m: Experts, x: Tensor) -> Tensor:
    return _numbers(m, x) + _batched(m, x, m.up, m.down)


INDEPENDENT: dict[str, Use] = {
    "index": _numbers,
    "select": _of_all(lambda w: [w.select(0, i) for i in reversed(range(EXPERTS))]),
    "unbind": _of_all(lambda w: w.unbind(0)),
    "iteration": _of_all(list),
    "chunk": _of_all(lambda w: [part.squeeze(0) for part in w.chunk(EXPERTS)]),
    "slice": _of_all(lambda w: [w[i : i + 1].squeeze(0) for i in range(EXPERTS)]),
    "split": _of_all(lambda w: [part[0] for part in w.split(1)]),
    "tensor": _of_all(lambda w: [w[torch.tensor(i)] for i in range(EXPERTS)]),
    "converted": _of_all(lambda w: [w.double()[i].float() for i in range(EXPERTS)]),
    "stack": _restacked,
    "again": lambda m, x: _numbers(m, _numbers(m, x)),
    "some": lambda m, x: _numbers(m, x, (1, 3)),
    "norm": lambda m, x: _numbers(m, x) * m.up.square().sum(),
    "together": _both,
}
DEPENDENT: dict[str, Use] = {
    "a single one": lambda m, x: _numbers(m, x, [2]),
    "layers of different experts": lambda m, x: _sum(
        x, ((m.up[i], m.bias[i], m.down[(i + 1) % EXPERTS]) for i in range(EXPERTS))
    ),
    "mean": lambda m, x: _numbers(m, x) + F.linear(F.linear(x, m.up.mean(0)).relu(), m.down[0]),
    "hidden units of two added": lambda m, x: (
        _numbers(m, x) + F.linear((F.linear(x, m.up[0]) + F.linear(x, m.up[1])).relu(), m.down[2])
    ),
    "maximum over experts": lambda m, x: _numbers(m, x) + F.linear(x @ m.up.amax(0).T, m.down[0]),
    "one matrix": lambda m, x: (
        _numbers(m, x) + (x @ m.up[0].T).relu() @ m.down.transpose(1, 2).reshape(HIDDEN, -1)[:, :WIDTH]
    ),
}


def certified(use: Use) -> Symmetry:
    """The symmetry of a call, which holds for other inputs."""
    module, x = Experts(use), torch.randn(16, 3)
    symmetry = live(module, x)
    assert certify(module, symmetry, torch.randn(16, 3)).ok, str(symmetry)
    return symmetry


@pytest.mark.parametrize("name", INDEPENDENT)
def test_experts_taken_by_number_are_a_stack(name: str) -> None:
    symmetry = certified(INDEPENDENT[name])
    assert {key: form.count for key, form in forms_of(symmetry).items()} == dict.fromkeys(
        ("up", "bias", "down"), EXPERTS
    )
    assert symmetry.axes_of("up")[0] in symmetry.fixed
    module = Experts(INDEPENDENT[name])
    faked = symmetry_of(module, torch.randn(16, 3)).restrict(dict(module.named_parameters()))
    assert faked.canonical() == symmetry.canonical()


@pytest.mark.parametrize("name", DEPENDENT)
def test_experts_that_share_neurons_are_none(name: str) -> None:
    symmetry = certified(DEPENDENT[name])
    assert not forms_of(symmetry)
    assert not symmetry.nested


def test_experts_without_tokens_are_like_the_others() -> None:
    """The symmetry of a call with few tokens holds for many."""
    module = Experts(_routed)
    with torch.no_grad():
        module.router.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    few, many = torch.randn(2, 3), 100 * torch.randn(64, 3)
    symmetry = live(copy.deepcopy(module), few)
    assert forms_of(symmetry).keys() == {"up", "bias", "down"}
    chosen = module.router(module.first(many)).topk(2, -1).indices
    assert len(chosen.unique()) == EXPERTS
    assert certify(module, symmetry, many).ok


def test_neurons_of_one_expert_that_are_used_elsewhere_are_not_nested() -> None:
    class Gated(Experts):
        def __init__(self) -> None:
            super().__init__(lambda m, x: _numbers(m, x) + F.linear(F.linear(x, m.up[0]) * m.gate, m.down[0]))
            self.gate = nn.Parameter(torch.randn(HIDDEN))

    module = Gated()
    symmetry = live(module, torch.randn(4, 3))
    assert not symmetry.nested
    assert certify(module, symmetry, torch.randn(4, 3)).ok


@pytest.mark.parametrize("experts", [48, 128])
def test_many_experts(experts: int) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(experts, 3, 2)), nn.Parameter(torch.randn(experts, 1, 3))

        def forward(self, x: Tensor) -> Tensor:
            pairs = ((self.up[i], self.down[i]) for i in range(experts))
            return sum((F.linear(F.linear(x, up), down) for up, down in pairs), torch.zeros(()))

    symmetry = live(Many(), torch.randn(4, 2))
    assert {form.count for form in forms_of(symmetry).values()} == {experts}
