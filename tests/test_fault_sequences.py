"""Any sequence of faults leaves an optimizer that is finite, counts right, and trains."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from trained_net import RULE, X, backward, grad_of, net, same, snapshot, through_file

from nfn_optim.optimizer import NFNOptimizer


class World:
    """A network, its optimizer, and what the counters must be."""

    def __init__(self) -> None:
        self.model = net()
        self.optimizer = NFNOptimizer(self.model, rule=RULE, weight_decay=0.01)
        self.skipped = 0
        self.steps: dict[str, int] = {}

    def params(self) -> dict[str, nn.Parameter]:
        """All parameters by name."""
        return dict(self.model.named_parameters())

    def take(self, change: Callable[[list[Tensor]], object] = lambda grads: None, finite: bool = True) -> None:
        """One iteration with changed gradients."""
        backward(self.model, self.optimizer)
        change([grad_of(p) for p in self.model.parameters()])
        before = snapshot(self.optimizer)
        self.optimizer.step()
        if finite:
            self.steps.update({name: self.steps.get(name, 0) + 1 for name in self.params()})
        else:
            self.skipped += 1
            assert same(snapshot(self.optimizer), before)

    def check(self) -> None:
        """What must always hold."""
        assert self.optimizer.skipped_steps == self.skipped
        found = {name: self.optimizer.state[p] for name, p in self.params().items() if p in self.optimizer.state}
        assert {name: int(state["step"]) for name, state in found.items()} == self.steps
        for name, p in self.params().items():
            assert p.isfinite().all()
            expected = self.optimizer.rule.init({"p": p})["p"]
            for key, value in found.get(name, {}).items():
                assert value.isfinite().all()
                assert value.dtype == torch.float32
                assert value.shape == expected[key].shape


def one_nan(world: World) -> None:
    world.take(lambda grads: grads[0].view(-1)[0].fill_(torch.nan), finite=False)


def all_infinite(world: World) -> None:
    world.take(lambda grads: [g.fill_(torch.inf) for g in grads], finite=False)


def huge(world: World) -> None:
    world.take(lambda grads: grads[-1].fill_(1e30), finite=False)


def large(world: World) -> None:
    world.take(lambda grads: [g.mul_(1e15) for g in grads])


def tiny(world: World) -> None:
    world.take(lambda grads: [g.mul_(1e-30) for g in grads])


def zero(world: World) -> None:
    world.take(lambda grads: [g.zero_() for g in grads])


def no_gradient(world: World) -> None:
    world.optimizer.zero_grad()
    world.optimizer.step()


def one_gradient(world: World) -> None:
    backward(world.model, world.optimizer)
    for p in list(world.model.parameters())[1:]:
        p.grad = None
    world.optimizer.step()
    world.steps["0.weight"] = world.steps.get("0.weight", 0) + 1


def overwritten(world: World) -> None:
    with torch.no_grad():
        for p in world.model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))


def exchanged(world: World) -> None:
    """As wrappers do: the same parameters as other objects, the state with them."""
    others = {p: nn.Parameter(p.detach().clone()) for p in world.model.parameters()}
    for module in world.model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, others[p])
    for group in world.optimizer.param_groups:
        group["params"] = [others[p] for p in group["params"]]
    state = {others[p]: value for p, value in world.optimizer.state.items()}
    world.optimizer.state.clear()
    world.optimizer.state.update(state)


def reshaped(world: World) -> None:
    """One neuron more, or three."""
    width = 9 if world.model[0].out_features < 9 else 6
    first, last = nn.Linear(4, width), nn.Linear(width, world.model[2].out_features)
    for module, new in ((world.model[0], first), (world.model[2], last)):
        for p, q in zip(module.parameters(), new.parameters(), strict=True):
            p.data = q.data
    world.model[0].out_features = world.model[2].in_features = width
    for name in ("0.weight", "0.bias", "2.weight"):
        world.steps.pop(name, None)
    world.take()


def cleared(world: World) -> None:
    world.optimizer.state.clear()
    world.steps.clear()


def grown(world: World) -> None:
    late = nn.Linear(world.model[-1].out_features, 2)
    world.model.append(late)
    world.optimizer.add_param_group({"params": list(late.named_parameters(prefix=str(len(world.model) - 1)))})


def learning_rate_of_zero(world: World) -> None:
    rates = [group["lr"] for group in world.optimizer.param_groups]
    before = snapshot(world.optimizer)[0]
    for group in world.optimizer.param_groups:
        group["lr"] = 0.0
    world.take()
    assert same((snapshot(world.optimizer)[0], []), (before, []))
    for group, lr in zip(world.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr


def resumed(world: World) -> None:
    saved = through_file(world.optimizer.state_dict())
    names = [[(n, p) for n, p in world.params().items() if p in set(g["params"])] for g in world.optimizer.param_groups]
    world.optimizer = NFNOptimizer([{"params": pairs} for pairs in names], rule=RULE)
    world.optimizer.load_state_dict(saved)


def deep_copied(world: World) -> None:
    world.model, world.optimizer = copy.deepcopy((world.model, world.optimizer))


def pickled(world: World) -> None:
    world.model, world.optimizer = pickle.loads(pickle.dumps((world.model, world.optimizer)))


def wrong_state(world: World) -> None:
    before = snapshot(world.optimizer)
    saved = {**world.optimizer.state_dict(), "state": {0: {"momentum_buffer": torch.ones(1)}}}
    with pytest.raises(ValueError, match="momentum_buffer"):
        world.optimizer.load_state_dict(saved)
    assert same(snapshot(world.optimizer), before)


@torch.no_grad()
def looked_at(world: World) -> None:
    world.model(X[:1])


EVENTS: tuple[Callable[[World], None], ...] = (
    World.take,
    one_nan,
    all_infinite,
    huge,
    large,
    tiny,
    zero,
    no_gradient,
    one_gradient,
    overwritten,
    exchanged,
    reshaped,
    cleared,
    grown,
    learning_rate_of_zero,
    resumed,
    deep_copied,
    pickled,
    wrong_state,
    looked_at,
)


def happen(events: list[Callable[[World], None]]) -> World:
    """Let all of it happen."""
    world = World()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".* changed their shape")
        for event in events:
            event(world)
            world.check()
    return world


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(EVENTS), max_size=10))
@example([World.take, reshaped, deep_copied])
def test_any_sequence(events: list[Callable[[World], None]]) -> None:
    world = happen(events)
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in world.params().items()}
        world.take()
        world.check()
        assert all(not torch.equal(p, before[name]) for name, p in world.params().items())
    assert world.optimizer.symmetry is not None
    assert len(world.optimizer.symmetry.free) == len(world.model) - 2  # the neurons between two linear layers


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_each_event_twice_among_steps(event: Callable[[World], None]) -> None:
    test = happen([World.take, event, World.take, event, World.take])
    assert test.steps
