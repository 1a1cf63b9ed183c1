"""The module is found however the optimizer is constructed, and nothing is left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.optimizer.discovery import Discovery
from nfn_optim.optimizer.wrapper import unwrap
from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.live_trace import LiveTrace
from nfn_optim.symmetry.merging import complete, merge

HIDDEN = {"0.weight": ("a0", "a1"), "0.bias": ("a0",), "2.weight": ("a2", "a0"), "2.bias": ("a2",)}


def net() -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


class Keywords(nn.Module):
    """A forward with keyword arguments only, as trainers call it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, *, batch: dict[str, Tensor], scale: float = 1.0) -> Tensor:
        """The network's output."""
        output: Tensor = self.net(batch["x"]) * scale
        return output


def hooks() -> int:
    """How many entries all of torch's global hook tables have."""
    tables = (value for name, value in vars(torch_module).items() if name.startswith("_global_") and "hooks" in name)
    return sum(len(table) for table in tables if isinstance(table, dict))


@pytest.fixture(autouse=True)
def _nothing_left_behind(quick_collection: None) -> Iterator[None]:
    gc.collect()
    before = hooks()
    yield
    gc.collect()
    assert hooks() == before


def hidden_axes(optimizer: NFNOptimizer) -> dict[str, tuple[str, ...]]:
    """The dimensions found, axes renamed in order; empty if there is no free one."""
    assert optimizer.symmetry is not None
    return dict(optimizer.symmetry.canonical().dims) if optimizer.symmetry.free else {}


def step(optimizer: NFNOptimizer, forward: Callable[[], Tensor]) -> None:
    """One iteration."""
    optimizer.zero_grad()
    torch.autograd.backward(forward().square().mean())
    optimizer.step()


GIVEN: dict[str, Callable[[nn.Module], NFNOptimizer]] = {
    "module": lambda m: NFNOptimizer(m, rule=UpdateRule()),
    "parameters": lambda m: NFNOptimizer(m.parameters(), rule=UpdateRule()),
    "named": lambda m: NFNOptimizer(m.named_parameters(), rule=UpdateRule()),
    "groups": lambda m: NFNOptimizer([{"params": [p]} for p in m.parameters()], rule=UpdateRule()),
    "groups and model": lambda m: NFNOptimizer([{"params": [*m.parameters()]}], rule=UpdateRule(), model=m),
}


@pytest.mark.parametrize("given", GIVEN)
def test_every_way_to_give_parameters(given: str) -> None:
    model, before = net(), hooks()
    optimizer = GIVEN[given](model)
    assert hooks() > before
    step(optimizer, lambda: model(torch.randn(5, 4)))
    assert hooks() == before
    assert optimizer.names == tuple(HIDDEN)
    assert hidden_axes(optimizer) == HIDDEN


def test_keyword_arguments_only() -> None:
    model = Keywords()
    optimizer = NFNOptimizer(model.parameters(), rule=UpdateRule())
    step(optimizer, lambda: model(batch={"x": torch.randn(5, 4)}, scale=2.0))
    assert hidden_axes(optimizer) == {f"net.{name}": dims for name, dims in HIDDEN.items()}


def test_inputs_in_the_precision_of_autocast() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3))
    optimizer = NFNOptimizer(model.parameters(), rule=UpdateRule())
    with torch.autocast("cpu", torch.bfloat16):
        step(optimizer, lambda: model(torch.randn(5, 1, 8, 8, dtype=torch.bfloat16)))
    assert optimizer.symmetry is not None
    assert [optimizer.symmetry.sizes[axis] for axis in optimizer.symmetry.free] == [6]


def test_forward_inside_the_closure() -> None:
    model = net()
    optimizer = NFNOptimizer(model.parameters(), rule=UpdateRule())

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(5, 4)).square().mean()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) > 0
    assert hidden_axes(optimizer) == HIDDEN


@pytest.mark.parametrize("wrap", ["before", "after", "given"])
def test_compiled_model(wrap: str) -> None:
    model, graphs = net(), 0

    def backend(graph: Callable[..., Any], _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph

    def compiled_model() -> nn.Module:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert isinstance(compiled, nn.Module)
        return compiled

    compiled = model if wrap == "after" else compiled_model()
    optimizer = NFNOptimizer(compiled if wrap == "given" else model.parameters(), rule=UpdateRule())
    compiled = compiled_model() if wrap == "after" else compiled
    x = torch.randn(5, 4)
    for _ in range(4):
        step(optimizer, lambda: compiled(x))
    assert optimizer.names == tuple(HIDDEN)
    assert hidden_axes(optimizer) == HIDDEN
    assert graphs == 1  # the first call, which is traced, runs op by op
    torch.testing.assert_close(compiled(x), model(x))


def test_several_outermost_calls() -> None:
    encoder, decoder = net(), nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
    spare = nn.Parameter(torch.ones(2))
    optimizer = NFNOptimizer([*encoder.parameters(), *decoder.parameters(), spare], rule=UpdateRule())
    x = torch.randn(5, 4)
    optimizer.zero_grad()
    torch.autograd.backward(decoder(encoder(x)).square().mean() + spare.sum())
    optimizer.step()
    symmetry = optimizer.symmetry
    assert symmetry is not None
    assert optimizer.names == (*(f"{k}.{name}" for k in (0, 1) for name in HIDDEN), "0.8")
    assert sorted(symmetry.sizes[axis] for axis in symmetry.free) == [3, 5, 6]
    assert symmetry.dims["0.2.weight"][0] == symmetry.dims["1.0.weight"][1]


class Pair(nn.Module):
    """Two networks of which the forward uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = net(), net()

    def forward(self, x: Tensor) -> Tensor:
        """What the generator makes."""
        output: Tensor = self.generator(x)
        return output


def test_a_child_that_the_forward_does_not_use() -> None:
    model = Pair()
    optimizer = NFNOptimizer(model, rule=UpdateRule())
    x = torch.randn(5, 4)
    step(optimizer, lambda: torch.cat([model(x), model.critic(x)]))
    symmetry = optimizer.symmetry
    assert symmetry is not None
    assert list(symmetry.dims) == [f"{part}.{name}" for part in ("generator", "critic") for name in HIDDEN]
    assert [symmetry.sizes[axis] for axis in symmetry.free] == [6, 6]


def test_part_of_a_module() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = NFNOptimizer(model[2].parameters(), rule=UpdateRule())
    step(optimizer, lambda: model(torch.randn(5, 4)))
    assert hidden_axes(optimizer) == {"2.weight": ("a0", "a1"), "2.bias": ("a0",)}
    assert optimizer.symmetry is not None
    assert [optimizer.symmetry.sizes[axis] for axis in optimizer.symmetry.free] == [6]


def test_step_before_any_forward_warns_once_and_is_made_good() -> None:
    model = net()
    optimizer = NFNOptimizer(model.parameters(), rule=UpdateRule())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"no forward pass .* NFNOptimizer\(model\)"):
        optimizer.step()
    optimizer.step()  # a second warning would be an error
    assert hidden_axes(optimizer) == {}
    moments = optimizer.state[next(model.parameters())]["exp_avg"]
    step(optimizer, lambda: model(torch.randn(5, 4)))
    assert hidden_axes(optimizer) == HIDDEN
    assert optimizer.state[next(model.parameters())]["exp_avg"] is moments


def test_unrelated_modules_are_not_taken() -> None:
    model, other = net(), net()
    optimizer = NFNOptimizer(model.parameters(), rule=UpdateRule())
    other(torch.randn(5, 4))
    step(optimizer, lambda: model(torch.randn(5, 4)))
    assert optimizer.names == tuple(HIDDEN)


@pytest.mark.parametrize("rule", ["adamw", "symmetry"])
def test_nothing_is_listened_to_when_nothing_is_to_be_known(rule: str) -> None:
    model, before = net(), hooks()
    if rule == "adamw":
        optimizer = NFNOptimizer(model.parameters(), rule="adamw")
    else:
        symmetry = Symmetry.separate({name: p.shape for name, p in model.named_parameters()})
        optimizer = NFNOptimizer(model, rule=UpdateRule(), symmetry=symmetry)
    assert hooks() == before
    step(optimizer, lambda: model(torch.randn(5, 4)))


def test_a_deleted_optimizer_removes_its_hook() -> None:
    model, before = net(), hooks()
    optimizer = NFNOptimizer(model.parameters(), rule=UpdateRule())
    copied = copy.deepcopy(optimizer)
    assert hooks() > before
    del optimizer, copied
    gc.collect()
    assert hooks() == before


def discovery_of(model: nn.Module) -> Discovery:
    """A discovery of the parameters of a model."""
    return Discovery(lambda: list(model.parameters()))


def test_listening_keeps_neither_tensors_nor_modules() -> None:
    model, x = net(), torch.randn(5, 4)
    params = list(model.parameters())
    discovery, named = Discovery(lambda: params), dict(model.named_parameters())
    activations: list[weakref.ref[Tensor]] = []
    model[1].register_forward_hook(lambda _, args, out: activations.extend(map(weakref.ref, (*args, out))))
    references = len(gc.get_referrers(x))
    model(x)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert [activation() for activation in activations] == [None, None]
    assert len(gc.get_referrers(x)) == references
    assert (found := discovery.found(named)) is None or not found.modules
    discovery.close()


def test_listeners_share_a_trace() -> None:
    model = net()
    listeners = [discovery_of(model) for _ in range(3)]
    model(torch.randn(5, 4))
    traces = [list(listener._traces.values()) for listener in listeners]
    assert all(len(trace) == 1 and trace[0][0] is traces[0][0][0] for trace in traces)
    found = [listener.found(dict(model.named_parameters())) for listener in listeners]
    assert all(f is not None and f.symmetry.canonical().dims == HIDDEN for f in found)
    for listener in listeners:
        listener.close()


def test_the_next_optimizer_of_a_module_recalls_its_symmetry(monkeypatch: pytest.MonkeyPatch) -> None:
    model, traced = net(), []
    begin = LiveTrace.begin
    monkeypatch.setattr(LiveTrace, "begin", lambda self, *args: (traced.append(args), begin(self, *args)))
    for batch in (5, 5, 7, 7, 5):
        optimizer = NFNOptimizer(model.parameters(), rule=UpdateRule())
        step(optimizer, lambda batch=batch: model(torch.randn(batch, 4)))
        assert hidden_axes(optimizer) == HIDDEN
    assert len(traced) == 3  # only the last shapes are remembered
    model.append(nn.Linear(3, 3))
    optimizer = NFNOptimizer(model.parameters(), rule=UpdateRule())
    step(optimizer, lambda: model(torch.randn(5, 4)))
    assert len(traced) == 4
    assert optimizer.symmetry is not None
    assert [optimizer.symmetry.sizes[axis] for axis in optimizer.symmetry.free] == [6, 3]


def test_calls_inside_others_are_dropped() -> None:
    model = Keywords()
    discovery = discovery_of(model)
    model.net(torch.randn(2, 4))
    model(batch={"x": torch.randn(7, 4)}, scale=3.0)
    found = discovery.found(dict(model.named_parameters()))
    assert found is not None
    assert found.modules == [model]
    discovery.close()


def test_wrappers_are_taken_off() -> None:
    model = net()
    compiled = torch.compile(nn.DataParallel(model), backend="eager")
    assert isinstance(compiled, nn.Module)
    assert unwrap(compiled) is model


MERGES = {
    "apart": (("a h\nfree h=2", "b h\nfree h=3"), "a 0.h\nb 1.h\nfree 0.h=2 1.h=3"),
    "one part keeps its names": (("a h\nb h\nfree h=2",), "a h\nb h\nfree h=2"),
    "a shared tensor joins": (("a h\nb h\nfree h=2", "b k\nc k\nfree k=2"), "a 0.h\nb 0.h\nc 0.h\nfree 0.h=2"),
    "fixed in one is fixed": (("a h\nb h\nfree h=2", "b k\nc k\nfixed k=2"), "a 0.h\nb 0.h\nc 0.h\nfixed 0.h=2"),
    "fixed in one, alone": (
        ("a h\nb x\nfree h=2\nfixed x=3", "b k\nfree k=3"),
        "a 0.h\nb 0.x\nfree 0.h=2\nfixed 0.x=3",
    ),
    "other factors, nothing moves": (
        ("a (h k)\nb h\nfree h=2 k=3", "a m\nc m\nfree m=6"),
        "a (0.h 0.k)\nb 0.h\nc 1.m\nfixed 0.h=2 0.k=3 1.m=6",
    ),
}


@pytest.mark.parametrize("case", MERGES)
def test_merge(case: str) -> None:
    parts, expected = MERGES[case]
    assert merge([Symmetry.parse(part) for part in parts]) == Symmetry.parse(expected)


def test_complete() -> None:
    found = complete(Symmetry.parse("a h\ngone h k\nfree h=2 k=4"), {"b": torch.ones(3), "a": torch.ones(2)})
    assert list(found.dims) == ["b", "a"]
    assert found == Symmetry.parse("b b.0\na h\nfree h=2\nfixed b.0=3")
