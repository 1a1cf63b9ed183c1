"""The user's code runs as often as the user calls it, on real tensors, and what ran is what is known."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint

from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import certify

X = torch.linspace(-1, 1, 32).view(4, 8)


@pytest.fixture(autouse=True)
def _nothing_left_behind(quick_collection: None) -> Iterator[None]:
    yield
    gc.collect()
    tables = [v for k, v in vars(torch_module).items() if k.startswith("_global_") and "hooks" in k]
    assert not any(isinstance(table, dict) and table for table in tables)
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._len_torch_function_stack() == 0
    assert torch.backends.mha.get_fastpath_enabled()


def optimizer_of(params: Any, **options: Any) -> NFNOptimizer:
    return NFNOptimizer(params, rule=UpdateRule(), **options)


def train(optimizer: NFNOptimizer, loss: Callable[[], Tensor], steps: int = 3) -> list[float]:
    """Train for some steps; returns the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def free_sizes(optimizer: NFNOptimizer) -> list[int]:
    """The sizes of the free axes, in order."""
    assert optimizer.symmetry is not None
    return sorted(optimizer.symmetry.sizes[axis] for axis in optimizer.symmetry.free)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


# ------------------------------------------------------------------------------------- what the user's code remembers


@pytest.mark.parametrize("kind", ["forward", "pre", "global", "with_kwargs", "backward", "tensor"])
def test_hooks_run_once_for_each_call(kind: str) -> None:
    model, seen = net(), []
    handles = []
    if kind == "forward":
        model[1].register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    elif kind == "pre":
        model[1].register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    elif kind == "with_kwargs":
        model[1].register_forward_hook(lambda _m, _i, _k, out: seen.append(out.detach()), with_kwargs=True)
    elif kind == "backward":
        model[1].register_full_backward_hook(lambda _m, _i, out: seen.append(out[0].detach()))
    elif kind == "tensor":
        model[1].register_forward_hook(lambda _m, _i, out: out.register_hook(seen.append) and None)
    else:
        handles.append(
            torch_module.register_module_forward_hook(
                lambda m, _i, out: seen.append(out.detach()) if m is model[1] else None
            )
        )
    optimizer = optimizer_of(model)
    train(optimizer, lambda: model(X).square().mean())
    for handle in handles:
        handle.remove()
    assert [type(tensor) for tensor in seen] == [Tensor] * 3
    assert all(tensor.mean().item() == tensor.mean().item() for tensor in seen)
    assert free_sizes(optimizer) == [16]


def test_a_list_outside_of_the_module() -> None:
    losses: list[Tensor] = []

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.out = nn.Linear(8, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            p = self.gate(x).softmax(-1)
            losses.append(p.mean(0).square().sum())
            y: Tensor = self.out(p)
            return y

    model = Gated()
    optimizer = optimizer_of(model)

    def loss() -> Tensor:
        value = model(X).square().mean()
        value = value + 0.01 * torch.stack(losses).sum()
        losses.clear()
        return value

    train(optimizer, loss)
    assert free_sizes(optimizer) == [4]


def test_a_memory_that_is_passed_in() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cell, self.out = nn.Linear(8, 5), nn.GRUCell(5, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor, memory: types.SimpleNamespace) -> Tensor:
            memory.h = self.cell(self.first(x), memory.h)
            y: Tensor = self.out(memory.h)
            return y

    model, memory = Recurrent(), types.SimpleNamespace(h=torch.zeros(4, 16))
    optimizer = optimizer_of(model)

    def loss() -> Tensor:
        memory.h = memory.h.detach()
        return model(X, memory).square().mean()

    train(optimizer, loss)
    assert type(memory.h) is Tensor
    assert free_sizes(optimizer) == [5]  # the state is an input


class Remembering(nn.Module):
    """Memoises, counts, caches, keeps a running mean and moves a teacher."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.teacher = nn.Linear(8, 16).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(16))
        self.calls, self.cache, self.sizes = 0, {}, []

    @functools.lru_cache  # noqa: B019
    def mask(self, size: int) -> Tensor:
        return torch.ones(size, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.body(x).relu() * self.mask(len(x))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.body.parameters()), 0.1)
            self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
        self.cache["h"] = h.detach()
        self.sizes.append(h.sum().item())
        y: Tensor = self.head(h + self.teacher(x) - self.mean)
        return y


def test_what_a_forward_remembers() -> None:
    model = Remembering()
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    state = torch.get_rng_state()
    train(optimizer, lambda: model(X).square().mean())
    assert model.calls == len(model.sizes) == 3
    assert type(model.cache["h"]) is type(model.mean) is type(model.mask(4)) is Tensor
    assert torch.equal(torch.get_rng_state(), state)
    assert free_sizes(optimizer) == [16]


def test_generators_advance_as_often_as_they_are_used() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
            self.generator = torch.Generator().manual_seed(0)
            self.scales = iter((1.0, 2.0, 3.0))

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(len(x), 1, generator=self.generator)
            y: Tensor = self.head(self.body(x).relu() + noise * next(self.scales))
            return y

    model = Noisy()
    optimizer = optimizer_of(model)
    train(optimizer, lambda: model(X).square().mean())
    expected = torch.Generator().manual_seed(0)
    for _ in range(3):
        torch.randn(4, 1, generator=expected)
    assert torch.equal(model.generator.get_state(), expected.get_state())
    assert free_sizes(optimizer) == [16]


# ------------------------------------------------------------------------------------------------ what depends on data


class Branches(nn.Module):
    """Asserts, `.item()`, an early exit and rows that are picked by their values."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        assert torch.isfinite(h).all()
        assert not torch.equal(h, h + 1)
        for _ in range(int(h.sum().item()) % 2 + 1):
            h = h + 1
        rows = h[x.sum(-1) > 0]
        picked = torch.zeros_like(h).index_add_(0, torch.nonzero(x.sum(-1) > 0)[:, 0], rows)
        if x.sum() > 1e9:
            h = self.more(h)
        y: Tensor = self.head(h + picked)
        return y


class Routed(nn.Module):
    """Every row goes to one of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate = nn.Linear(8, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        choice = self.gate(h).argmax(-1)
        out = torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            rows = torch.where(choice == index)[0]
            out[rows] = expert(h[rows])
        y: Tensor = self.head(out)
        return y


class Variational(nn.Module):
    """Samples its code from a distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.scale, self.out = (
            nn.Linear(8, 16),
            nn.Linear(16, 4),
            nn.Linear(16, 4),
            nn.Linear(4, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        y: Tensor = self.out(torch.distributions.Normal(self.mean(h), self.scale(h).exp()).rsample())
        return y


class Packed(nn.Module):
    """A GRU over packed sequences of different lengths."""

    def __init__(self, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.body, self.rnn, self.head = nn.Linear(1, 5), kind(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(self.body(x[..., None]), torch.tensor([8, 5, 3, 2]), batch_first=True)
        padded, _ = rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        y: Tensor = self.head(padded[:, -1])
        return y


DATA_DEPENDENT: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "branches": (Branches, [16]),
    "routed": (Routed, [6, 6, 7, 7, 7]),
    "distribution": (Variational, [16]),
    "packed GRU": (Packed, [5, 6]),
    "packed LSTM": (lambda: Packed(nn.LSTM), [5, 6]),
    "momentum": (lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=None), nn.Linear(16, 3)), [16]),
}


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_what_ran_is_known(name: str) -> None:
    build, sizes = DATA_DEPENDENT[name]
    torch.manual_seed(0)
    model = build()
    optimizer = optimizer_of(model)
    train(optimizer, lambda: model(X).square().mean())
    assert free_sizes(optimizer) == sizes
    if name not in ("distribution", "momentum"):  # a certificate needs the same noise, and the symmetry of buffers
        assert optimizer.symmetry is not None
        assert certify(model, optimizer.symmetry, X).ok


# ------------------------------------------------------------------------------------------- how the module is called


class Functional(nn.Module):
    """Ops between the submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x)) * self.scale
        y: Tensor = self.third(torch.tanh(self.second(h)))
        return y


def test_forward_called_directly() -> None:
    model = Functional()
    optimizer = optimizer_of(model)
    train(optimizer, lambda: model.forward(X).square().mean())
    assert free_sizes(optimizer) == [5, 16]
    assert optimizer.symmetry is not None
    assert certify(model, optimizer.symmetry, X).ok
    sequential = net()
    optimizer = optimizer_of(sequential)
    train(optimizer, lambda: sequential.forward(X).square().mean())
    assert free_sizes(optimizer) == [16]


def test_submodules_called_one_by_one() -> None:
    layers = [nn.Linear(8, 16), nn.Linear(16, 5), nn.Linear(5, 3)]
    optimizer = optimizer_of([p for layer in layers for p in layer.parameters()])

    def loss() -> Tensor:
        h = X
        for layer in layers[:-1]:
            h = F.gelu(layer(h))
        return F.cross_entropy(layers[-1](h), torch.tensor([0, 1, 2, 0]))

    train(optimizer, loss)
    assert free_sizes(optimizer) == [5, 16]


def test_a_use_between_calls_that_depends_on_the_order() -> None:
    layers = [nn.Linear(8, 16), nn.Linear(16, 3)]
    optimizer = optimizer_of([p for layer in layers for p in layer.parameters()])

    def loss() -> Tensor:
        h = layers[0](X)
        return layers[1](h).square().mean() + h.cumsum(-1).square().mean()

    train(optimizer, loss)
    assert free_sizes(optimizer) == []


def test_a_module_called_twice_with_different_inputs() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor, ordered: bool) -> Tensor:
            h = self.first(x)
            y: Tensor = self.second(h.cumsum(-1) if ordered else h)
            return y

    model = Either()
    optimizer = optimizer_of(model)
    train(optimizer, lambda: (model(X, False) + model(X, True)).square().mean())
    assert free_sizes(optimizer) == []


def test_checkpoint_and_early_exit_by_an_error() -> None:
    class Stop(Exception):
        pass

    model, kept = net(), []

    def stop(_module: nn.Module, _args: Any, out: Tensor) -> None:
        kept.append(out)
        raise Stop

    handle = model[2].register_forward_hook(stop)
    optimizer = optimizer_of(model)

    def loss() -> Tensor:
        with pytest.raises(Stop):
            model(X)
        return kept.pop().square().mean()

    train(optimizer, loss)
    handle.remove()
    assert 16 in free_sizes(optimizer)
    for reentrant in (True, False):
        model = net()
        optimizer = optimizer_of(model)
        x = X.clone().requires_grad_()
        train(optimizer, lambda m=model, x=x, r=reentrant: checkpoint(m, x, use_reentrant=r).square().mean())
        assert free_sizes(optimizer) == [16]


def test_functional_call_vmap_and_data_parallel() -> None:
    model = net()
    optimizer = optimizer_of(model)
    train(optimizer, lambda: torch.func.functional_call(model, dict(model.named_parameters()), (X,)).square().mean())
    assert free_sizes(optimizer) == [16]
    for call in (lambda m: torch.vmap(m)(X), lambda m: nn.DataParallel(m)(X)):
        model = net()
        optimizer = optimizer_of(model.parameters())
        train(optimizer, lambda m=model, call=call: call(m).square().mean())
        assert free_sizes(optimizer) == [16]
    model = net()
    optimizer, params = optimizer_of(model.parameters()), dict(model.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).square().mean())(params)
    for name, p in params.items():
        p.grad = grads[name].detach()
    optimizer.step()
    assert free_sizes(optimizer) == [16]


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def test_adapters_and_parametrizations() -> None:
    model = net()
    model[0], model[2] = Adapted(model[0]), Adapted(model[2])
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    train(optimizer, lambda: model(X).square().mean())
    assert free_sizes(optimizer) == [2, 2, 16]
    for parametrize in (parametrizations.weight_norm, nn.utils.spectral_norm):
        model = net()
        parametrize(model[0])
        optimizer = optimizer_of(model)
        train(optimizer, lambda m=model: m(X).square().mean())
        assert free_sizes(optimizer) == [16]


def test_script_modules_cost_nothing_and_raise_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        teacher = torch.jit.script(nn.Linear(3, 2))
        student = torch.jit.script(net())
    for p in teacher.parameters():
        p.requires_grad_(False)
    model = nn.Linear(8, 3)
    optimizer = optimizer_of(model)
    train(optimizer, lambda: teacher(model(X)).square().mean())
    optimizer = optimizer_of(student.parameters())
    train(optimizer, lambda: student(X).square().mean())
    assert free_sizes(optimizer) == [16]


# ------------------------------------------------------------------------------------ errors, interrupts, and waiting


def test_an_interrupt_in_the_forward_pass() -> None:
    model = net()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    optimizer = optimizer_of(model)
    handle = model[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    train(optimizer, lambda: model(X).square().mean())
    assert free_sizes(optimizer) == [16]


@pytest.mark.parametrize("calls", [1, 30, 300, 1000])
def test_an_interrupt_in_the_first_step(calls: int) -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)])
    optimizer = optimizer_of(model)
    optimizer.zero_grad()
    model(X).square().mean().backward()
    left = calls

    def interrupt(frame: FrameType, *_: Any) -> None:
        nonlocal left
        # what is raised while a generator is closed is not passed on
        left -= "nfn_optim" in frame.f_code.co_filename and not frame.f_code.co_flags & inspect.CO_GENERATOR
        if left == 0:
            raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    finally:
        sys.settrace(before)
    train(optimizer, lambda: model(X).square().mean())
    assert free_sizes(optimizer) == [8] * 19


@pytest.mark.filterwarnings("ignore:no forward pass")
def test_a_raw_tensor_waits_for_no_module() -> None:
    model, image = net().requires_grad_(False), nn.Parameter(X.clone())
    optimizer = optimizer_of([image])
    for _ in range(4):
        train(optimizer, lambda: model(image).square().mean(), steps=1)
    assert not torch_module._global_forward_hooks


def test_an_optimizer_that_never_steps() -> None:
    model, other = net(), net()
    optimizer = optimizer_of(other)
    for _ in range(1100):
        model(X[:1])
    assert not torch_module._global_forward_hooks
    del optimizer


def test_activations_are_released() -> None:
    model, activations = net(), []
    model[1].register_forward_hook(lambda _m, _i, out: activations.append(weakref.ref(out)))
    optimizer = optimizer_of(model)
    loss = model(X).square().mean()
    assert activations[0]() is not None
    del loss
    gc.collect()
    assert activations[0]() is None
    del optimizer


# ----------------------------------------------------------------------------------------------------- what runs later


class Late(nn.Module):
    """A branch that joins what was apart, on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 3)
        self.skip = nn.Linear(8, 6)
        self.late = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y: Tensor = self.second((h + self.skip(x)).cumsum(-1) if self.late else h)
        return y


def test_a_parameter_that_gets_its_first_gradient_later() -> None:
    model = Late()
    optimizer = optimizer_of(model)
    loss = lambda: model(X).square().mean()  # noqa: E731
    train(optimizer, loss)
    assert free_sizes(optimizer) == [6]
    model.late = True
    train(optimizer, loss, steps=1)
    assert free_sizes(optimizer) == []  # nothing is certain, at once
    train(optimizer, loss)
    assert free_sizes(optimizer) == []
    model.late = False
    train(optimizer, loss)
    assert free_sizes(optimizer) == []  # both branches have run


def test_exchanged_and_grown_layers() -> None:
    model = net()
    optimizer = optimizer_of(model)
    loss = lambda: model(X).square().mean()  # noqa: E731
    train(optimizer, loss)
    for width in (12, 20):
        model[0], model[2] = nn.Linear(8, width), nn.Linear(width, 3)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(optimizer, loss)
        assert free_sizes(optimizer) == [width]
