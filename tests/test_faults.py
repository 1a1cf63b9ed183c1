"""What may go wrong in training: gradients, parameters, forward passes.

Faults from outside are in test_faults_outside.py, of saved states in test_saved_state.py, of rule files in
test_pretrained.py; sequences of faults are in test_fault_sequences.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_table import FaultTable, assert_trains, made, together
from torch import Tensor, nn
from trained_net import RULE, X, backward, grad_of, net, same, snapshot, symmetry_of_net, train

from nfn_optim.optimizer import NFNOptimizer

FAULTS = FaultTable()
fault = FAULTS.enter


# --------------------------------------------------------------------------------------------------------- gradients

SKIPPED = "the step is skipped and counted in `skipped_steps`"
SKIPPED_KEPT = "every bit of parameters and state"
Poison = Callable[[list[Tensor]], object]
POISON: dict[str, Poison] = {
    "a gradient with one NaN": lambda grads: grads[-1].view(-1)[0].fill_(torch.nan),
    "a gradient with one Inf": lambda grads: grads[0].view(-1)[-1].fill_(torch.inf),
    "a gradient with one -Inf": lambda grads: grads[1].view(-1)[0].fill_(-torch.inf),
    "all gradients NaN": lambda grads: [g.fill_(torch.nan) for g in grads],
    "a gradient of 1e30": lambda grads: grads[2].view(-1)[0].fill_(1e30),
}


def gradient_fault(poison: Poison) -> Callable[[Path], None]:
    """Two bad steps among good ones, from the first step and later."""

    def run(_: Path) -> None:
        for earlier in (0, 2):
            model, optimizer = made()
            train(model, optimizer, earlier)
            before = snapshot(optimizer)
            for count in (1, 2):
                backward(model, optimizer)
                poison([grad_of(p) for p in model.parameters()])
                optimizer.step()
                assert optimizer.skipped_steps == count
            assert same(snapshot(optimizer), before)
            assert_trains(model, optimizer)
            assert optimizer.state_dict()["param_groups"][0]["skipped_steps"] == 2

    return run


for name, poison in POISON.items():
    fault(name, SKIPPED, SKIPPED_KEPT)(gradient_fault(poison))


@fault("NaN at every step", SKIPPED, SKIPPED_KEPT + "; no step is taken")
def nan_for_ever(_: Path) -> None:
    model, optimizer = made()
    before = snapshot(optimizer)
    for _step in range(20):
        backward(model, optimizer)
        grad_of(model[0].weight).fill_(torch.nan)
        optimizer.step()
    assert optimizer.skipped_steps == 20
    assert same(snapshot(optimizer), before)


@fault("float16 gradients that overflow", SKIPPED, SKIPPED_KEPT)
def overflow(_: Path) -> None:
    model = net(torch.float16)
    optimizer = NFNOptimizer(model, rule=RULE)
    train(model, optimizer)
    before = snapshot(optimizer)
    optimizer.zero_grad()
    torch.autograd.backward((model(X.half()) * 6e4).square().sum())
    assert not grad_of(model[2].weight).isfinite().all()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same(snapshot(optimizer), before)
    assert_trains(model, optimizer)


@fault("float16 gradients of 6e4", "a step like any other: the state is float32", "")
def almost_overflow(_: Path) -> None:
    model = net(torch.float16)
    optimizer = NFNOptimizer(model, rule=RULE, symmetry=symmetry_of_net())
    for p in model.parameters():
        p.grad = torch.full_like(p, 6e4)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(optimizer.state[p]["exp_avg_sq"].min() > 3e6 for p in model.parameters())


@fault("gradients of 1e18", "a step like any other: their squares are finite", "")
def large(_: Path) -> None:
    model, optimizer = made()
    for _step in range(3):
        backward(model, optimizer)
        for p in model.parameters():
            grad_of(p).mul_(1e18)
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert_trains(model, optimizer)


@fault("gradients of 1e-30", "a step like any other, far below Adam's epsilon: it hardly moves", "")
def tiny(_: Path) -> None:
    model, optimizer = net(), None
    optimizer = NFNOptimizer(model, rule=RULE)
    for _step in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, optimizer)
        for p in model.parameters():
            grad_of(p).mul_(1e-30)
        optimizer.step()
    assert all((p - q).abs().max() <= 1e-9 for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.skipped_steps == 0
    assert_trains(model, optimizer)


@fault("gradients of exactly zero, for ever", "nothing moves but by weight decay", "parameters, without decay")
def zero(_: Path) -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=RULE)
    before = [p.detach().clone() for p in model.parameters()]
    for _step in range(20):
        backward(model, optimizer)
        for p in model.parameters():
            grad_of(p).zero_()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert_trains(model, optimizer)


@fault("sparse gradients", "RuntimeError: build the embedding with sparse=False", SKIPPED_KEPT)
def sparse(_: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = NFNOptimizer(model, rule=RULE)
    torch.autograd.backward(model(torch.tensor([1, 2])).sum())
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"sparse.*SparseAdam"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


# -------------------------------------------------------------------------------------------------------- parameters


@fault("a parameter is overwritten between steps", "the next step starts from the new values", "its state")
def overwritten(_: Path) -> None:
    model, optimizer = made()
    train(model, optimizer)
    moments = optimizer.state[model[0].weight]["exp_avg"].clone()
    model.load_state_dict(net(seed=5).state_dict())
    model[2].weight.data = torch.ones(3, 6)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moments)
    assert_trains(model, optimizer)
    assert optimizer.state[model[0].weight]["step"] == 5


@fault(
    "a parameter becomes NaN between steps",
    "gradients are NaN: steps are skipped until it is repaired",
    "all other parameters, all state",
)
def nan_parameter(_: Path) -> None:
    model, optimizer = made()
    train(model, optimizer)
    _, state = snapshot(optimizer)
    with torch.no_grad():
        good = model[0].weight[0, 0].clone()
        model[0].weight[0, 0] = torch.nan
    train(model, optimizer)
    assert optimizer.skipped_steps == 3
    with torch.no_grad():
        model[0].weight[0, 0] = good
    assert same(([], snapshot(optimizer)[1]), ([], state))
    assert_trains(model, optimizer)


@fault(
    "a parameter is NaN, its gradients are not",
    "its own update falls back to the nominal one",
    "all other parameters train as usual",
)
def nan_parameter_alone(_: Path) -> None:
    model, optimizer = made()
    train(model, optimizer)
    backward(model, optimizer)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.fallbacks == 1
    assert [int((~p.isfinite()).sum()) for p in model.parameters()] == [1, 0, 0, 0]


@fault("the model's precision is changed", "the state stays in the precision that it has", "the state")
def cast(_: Path) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model, optimizer = made()
        train(model, optimizer)
        model.to(dtype)
        assert_trains(model, optimizer)
        assert optimizer.state[model[0].weight]["step"] == 5
        assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32


@fault(
    "a parameter changes its shape",
    "one warning; its state is reset, and the network is traced again",
    "the state of all others",
)
def reshaped(_: Path) -> None:
    for given in (None, symmetry_of_net()):
        model = net()
        optimizer = NFNOptimizer(model, rule=RULE, symmetry=given)
        train(model, optimizer)
        wider = net(seed=1)
        wider[0], wider[2] = nn.Linear(4, 8), nn.Linear(8, 3)
        for k in (0, 2):
            for old, new in zip(model[k].parameters(), wider[k].parameters(), strict=True):
                old.data = new.data
        model[0].out_features = model[2].in_features = 8
        backward(model, optimizer)
        with pytest.warns(UserWarning, match=r"\['0.weight', '0.bias', '2.weight'\] changed their shape") as caught:
            optimizer.step()
        assert caught[0].filename == __file__
        assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [1, 1, 1, 4]
        assert_trains(model, optimizer)
        assert optimizer.symmetry is not None
        sizes = [optimizer.symmetry.sizes[axis] for axis in optimizer.symmetry.free]
        assert sizes == ([8] if given is None else [])


@fault(
    "the model is replaced after construction", "nothing: as with AdamW, new parameters are not optimized", "everything"
)
def replaced(_: Path) -> None:
    _model, optimizer = made()
    other = net(seed=1)
    before, theirs = snapshot(optimizer), [p.detach().clone() for p in other.parameters()]
    for _step in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(other(X).square().mean())
        optimizer.step()
    assert same(snapshot(optimizer), before)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), theirs, strict=True))
    optimizer.add_param_group({"params": other.parameters()})
    train(other, optimizer)
    assert not torch.equal(next(other.parameters()), theirs[0])


@fault("the state is cleared", "the state of every parameter is reset", "parameters, symmetry")
def cleared(_: Path) -> None:
    model, optimizer = made()
    train(model, optimizer)
    symmetry = optimizer.symmetry
    optimizer.state.clear()
    assert_trains(model, optimizer)
    assert optimizer.symmetry == symmetry
    assert optimizer.state[model[0].weight]["step"] == 2


# ----------------------------------------------------------------------------------------------------- forward passes


def first_forward(call: Callable[[nn.Module], object]) -> Callable[[Path], None]:
    """The first forward pass is an odd one; the symmetry is found all the same."""

    def run(_: Path) -> None:
        model = net()
        optimizer = NFNOptimizer(model.parameters(), rule=RULE)
        call(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.symmetry is not None
        assert optimizer.symmetry.canonical() == symmetry_of_net().canonical()
        assert_trains(model, optimizer)

    return run


@torch.no_grad()
def without_grad(model: nn.Module) -> Tensor:
    output: Tensor = model(X)
    return output


@torch.inference_mode()
def inference(model: nn.Module) -> Tensor:
    output: Tensor = model(X)
    return output


FOUND = "the symmetry is found"
for name, call in {
    "the first forward pass is under no_grad": without_grad,
    "the first forward pass is in inference mode": inference,
    "the first forward pass has other shapes": lambda model: model(torch.ones(2, 7, 4)),
    "the first forward pass has an empty batch": lambda model: (model(torch.ones(0, 4)), model(X)),
    "the first forward pass is on another thread": lambda model: together([lambda: model(X)]),
}.items():
    fault(name, FOUND, "")(first_forward(call))


@fault("a forward pass that raises", "it is ignored; the next one is traced", "")
def raising(_: Path) -> None:
    model, optimizer = made()
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(2, 5))
    assert_trains(model, optimizer)
    assert optimizer.symmetry is not None
    assert optimizer.symmetry.free


@fault(
    "a step before any forward pass",
    "one warning; every tensor by itself, until a forward pass is seen",
    "the state, when the symmetry comes",
)
def early(_: Path) -> None:
    model, optimizer = made()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="no forward pass") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    optimizer.step()
    assert_trains(model, optimizer)
    assert optimizer.symmetry is not None
    assert optimizer.symmetry.canonical() == symmetry_of_net().canonical()
    assert optimizer.state[model[0].weight]["step"] == 4


@fault(
    "a step inside a compiled function",
    "the graph breaks there, and the step is taken as usual",
    "equality, bit for bit",
)
def compiled(_: Path) -> None:
    plain, inside = made(), made()

    def iteration() -> None:
        backward(*inside)
        inside[1].step()

    train(*plain, steps=1)
    iteration()  # forward passes are observed outside of a graph only
    graphs = 0

    def count(graph: Callable[..., object], _: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph

    run = torch.compile(iteration, backend=count)
    for _step in range(3):
        train(*plain, steps=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, on .grad of tensors that it made up
            run()
    assert graphs
    assert same(snapshot(plain[1]), snapshot(inside[1]))
    step = torch.compile(inside[1].step, backend=count)
    backward(*inside)
    step()
    train(*plain, steps=1)
    assert same(snapshot(plain[1]), snapshot(inside[1]))


@pytest.mark.parametrize("what", FAULTS)
def test_fault(what: str, tmp_path: Path) -> None:
    FAULTS[what].run(tmp_path)


def test_the_page_has_the_table() -> None:
    assert FAULTS.missing() == []
