"""The trace of a real forward pass finds what the trace on fake tensors finds, and leaves the pass as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from live import live
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nfn_optim.optimizer.discovery import Discovery
from nfn_optim.symmetry import certify, symmetry_of

MODES: dict[str, tuple[bool, Callable[[], Any]]] = {
    "training": (True, contextlib.nullcontext),
    "evaluation": (False, contextlib.nullcontext),
    "no gradients": (False, torch.no_grad),
    "autocast": (True, lambda: torch.autocast("cpu", torch.bfloat16)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", zoo.ZOO, ids=lambda network: network.name)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of torch, in autocast
def test_equals_the_trace_on_fake_tensors(network: zoo.Network, mode: str) -> None:
    training, around = MODES[mode]
    module = network.module().train(training)
    expected = symmetry_of(module, *network.inputs()).restrict(dict(module.named_parameters()))
    with around():
        assert live(module, *network.inputs()).canonical() == expected.canonical()


@pytest.mark.parametrize("network", zoo.ZOO, ids=lambda network: network.name)
def test_the_pass_is_the_same(network: zoo.Network) -> None:
    outputs, states, gradients = [], [], []
    for traced in (False, True):
        module = network.module()
        torch.manual_seed(0)
        discovery = Discovery(lambda m=module: list(m.parameters()), recalls=False) if traced else None
        output = module(*network.inputs())
        output.square().sum().backward()
        outputs.append(output.detach())
        states.append(torch.get_rng_state())
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
        if discovery is not None:
            discovery.close()
    assert torch.equal(*outputs)
    assert torch.equal(*states)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("network", zoo.ZOO, ids=lambda network: network.name)
def test_the_batch_size_does_not_matter(network: zoo.Network) -> None:
    inputs = network.inputs()
    if network.name in ("lstm", "gru_both_ways", "embedding_bag"):
        pytest.skip("the batch is not the first dimension")
    twice = [torch.cat([x, x]) if x.shape[0] == inputs[0].shape[0] else x for x in inputs]
    assert live(network.module(), *inputs).canonical() == live(network.module(), *twice).canonical()


class Below(TorchDispatchMode):
    """A mode of the user."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_modes_of_the_user_may_end_in_between() -> None:
    first, second = nn.Linear(3, 5), nn.Linear(5, 2)
    params = [*first.parameters(), *second.parameters()]
    discovery, x = Discovery(lambda: params), torch.randn(4, 3)
    with Below():
        h = first(x)
    h = h.relu()
    with Below():
        second(h).sum().backward()
        found = discovery.found({f"{i}": p for i, p in enumerate(params)})
    discovery.close()
    assert found is not None
    assert len(found.symmetry.free) == 1
    assert torch._C._len_torch_dispatch_stack() == 0


class Kernel(torch.autograd.Function):
    """An op that torch does not see: it writes to memory that it has allocated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out.numpy()[...] = x.detach().numpy().cumsum(-1)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.flip(-1).cumsum(-1).flip(-1)


def test_kernels_out_of_sight_fix_what_they_depend_on() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.second(Kernel.apply(self.first(x))))
            return y

    module, x = Net(), torch.randn(4, 3)
    symmetry = live(module, x)
    assert [symmetry.sizes[axis] for axis in symmetry.free] == [6]
    assert certify(module, symmetry, x).ok


def test_parts_of_autograd_in_a_forward_pass() -> None:
    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.last(torch.tanh(self.first(x))).sum(), x, create_graph=True)
            return force

    module, x = Forces(), torch.randn(4, 3)
    symmetry = live(module, x)
    assert [symmetry.sizes[axis] for axis in symmetry.free] == [5]


class Hidden(nn.Module):
    """A network whose hidden layer passes through a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(3, 5), nn.Linear(5, 2), function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)))
        return y


@pytest.mark.parametrize("flip", [False, True])
def test_memory_that_an_op_writes_without_returning_it_is_followed(flip: bool) -> None:
    def copy(h: Tensor) -> Tensor:
        out = torch.empty(2, *h.shape)
        torch._foreach_copy_(list(out.unbind()), [h, h.flip(-1) if flip else h])
        return out.mean(0)

    with torch.no_grad():
        assert len(live(Hidden(copy), torch.randn(4, 3)).free) == (not flip)


def test_a_parameter_that_is_made_in_the_call_depends_on_what_it_is_made_of() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source, self.first = nn.Linear(3, 5), nn.Linear(3, 5)
            self.last, self.other = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.first.weight = nn.Parameter(self.source.weight.clone())
            y: Tensor = self.last(self.first(x)) + self.other(self.source(x))
            return y

    assert len(live(Net(), torch.randn(4, 3)).free) == 1


def test_what_processes_exchange_is_fixed() -> None:
    def gather(h: Tensor) -> Tensor:
        out = torch.empty_like(h)
        torch.distributed.all_gather([out], h.detach())
        return h + out

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.warns(UserWarning, match="no rule for the op c10d"):
            assert not live(Hidden(gather), torch.randn(4, 3)).free
        with torch.no_grad(), pytest.warns(UserWarning, match="no rule for the op c10d"):
            assert not live(Hidden(gather), torch.randn(4, 3)).free
    finally:
        torch.distributed.destroy_process_group()


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones, which reads its outputs or its final state."""

    def __init__(self, layer: nn.RNNBase, final: bool, given: bool) -> None:
        super().__init__()
        count, ways = layer.num_layers * (1 + layer.bidirectional), 1 if final else 1 + layer.bidirectional
        self.first, self.layer, self.final, self.given = nn.Linear(3, 5), layer, final, given
        self.last = nn.Linear(ways * (layer.proj_size or 4), 2)
        self.h, self.c = (
            nn.Parameter(torch.randn(count, 1, layer.proj_size or 4)),
            nn.Parameter(torch.randn(count, 1, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[0 if self.layer.batch_first else 1]
        h, c = self.h.repeat(1, size, 1), self.c.repeat(1, size, 1)
        state = ((h, c) if isinstance(self.layer, nn.LSTM) else h) if self.given else None
        outputs, finals = self.layer(self.first(x), state)
        final: Tensor = finals[0] if isinstance(finals, tuple) else finals
        return self.last(final[-1] if self.final else outputs)  # type: ignore[no-any-return]


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 3, "bidirectional": True},
    {"proj_size": 3, "num_layers": 2, "bidirectional": True},
)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.filterwarnings("ignore:LSTM with projections")  # of torch, which has no fused kernel for them
def test_recurrent_layers_are_what_their_ops_are(
    kind: type[nn.RNNBase], options: dict[str, Any], final: bool, given: bool
) -> None:
    if "proj_size" in options and kind is not nn.LSTM:
        pytest.skip("only an LSTM has projections")
    torch.manual_seed(0)
    module, x = Recurrent(kind(5, 4, **options), final, given), torch.randn(6, 7, 3)
    symmetry = live(module, x)
    assert symmetry.canonical() == symmetry_of(module, x).restrict(dict(module.named_parameters())).canonical()
    assert certify(module, symmetry, x).ok


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_are_what_their_ops_are(kind: type[nn.RNNCellBase]) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cell, self.last = nn.Linear(3, 5), kind(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            state: Any = None
            for step in self.first(x):
                state = self.cell(step, state)
            output: Tensor = self.last(state[0] if isinstance(state, tuple) else state)
            return output

    module, x = Loop(), torch.randn(4, 2, 3)
    symmetry = live(module, x)
    assert symmetry.canonical() == symmetry_of(module, x).canonical()
    assert certify(module, symmetry, x).ok
