"""Complex parameters are optimized as their real views, and their axes are those of the complex tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from trained_net import RULE, same, snapshot, through_file

from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.optimizer.real_view import real, symmetry_of_views
from nfn_optim.symmetry import Symmetry

DTYPES = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float32}


class Waves(nn.Module):
    """Two complex layers, with a nonlinearity that treats every neuron alike, and a real read-out of the moduli."""

    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(4, 6, dtype=dtype), nn.Linear(6, 3, dtype=dtype)
        self.phase = nn.Parameter(torch.tensor(1 + 1j, dtype=dtype))
        self.gain = nn.Parameter(torch.ones(3, dtype=dtype.to_real()))

    def forward(self, x: Tensor) -> Tensor:
        """Moduli `(batch, 3)`."""
        h = torch.tanh(self.into(x.to(self.phase.dtype) * self.phase))
        modulus: Tensor = self.gain * self.out(h).abs()
        return modulus


def train(model: nn.Module, optimizer: NFNOptimizer, steps: int = 4) -> None:
    """Some steps."""
    for k in range(steps):
        optimizer.zero_grad()
        x = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4) + k
        torch.autograd.backward((model(x) - 1).square().mean())
        optimizer.step()


def test_neurons_of_a_complex_network_are_found_and_may_be_renamed() -> None:
    model = Waves(torch.complex128)
    twin, order = copy.deepcopy(model), torch.tensor([3, 0, 5, 1, 2, 4])
    with torch.no_grad():
        for p in (twin.into.weight, twin.into.bias):
            p.copy_(p[order].clone())
        twin.out.weight.copy_(twin.out.weight[:, order].clone())
    one, other = (NFNOptimizer(m, rule=RULE, weight_decay=0.1) for m in (model, twin))
    before = [p.detach().clone() for p in model.parameters()]
    train(model, one)
    train(twin, other)
    assert one.symmetry is not None
    assert (
        one.symmetry.dims["into.weight"][0] == one.symmetry.dims["into.bias"][0] == one.symmetry.dims["out.weight"][1]
    )
    torch.testing.assert_close(twin.into.weight, model.into.weight[order], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(twin.out.weight, model.out.weight[:, order], rtol=1e-10, atol=1e-10)
    assert all((p - q).abs().max() > 1e-5 for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_state_is_complex_in_full_precision(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((3, 2), (), (0, 2))]
    separate = Symmetry.separate({"a": (3, 2), "b": (), "c": (0, 2)})
    optimizer = NFNOptimizer(params, lr=0.02, rule=RULE, symmetry=separate)
    for p in params:
        p.grad = torch.full_like(p, 1 - 2j)
    optimizer.step()
    for p in params:
        state = optimizer.state[p]
        assert (state["exp_avg"].shape, state["exp_avg"].dtype) == (p.shape, DTYPES[dtype].to_complex())
        assert (state["step"].shape, state["step"].dtype) == ((), DTYPES[dtype])
    torch.testing.assert_close(
        optimizer.state[params[0]]["exp_avg_sq"], torch.full((3, 2), 0.001 + 0.004j).to(state["exp_avg"])
    )
    assert all((torch.view_as_real(p) != torch.view_as_real(torch.ones_like(p))).all() for p in params)


def test_resume_and_copies() -> None:
    straight, resumed = Waves(), Waves()
    one, other = NFNOptimizer(straight, rule=RULE), NFNOptimizer(resumed.parameters(), rule=RULE)
    train(straight, one)
    resumed.load_state_dict(straight.state_dict())
    other.load_state_dict(through_file(one.state_dict()))
    twin, copied = copy.deepcopy((straight, one))
    for model, optimizer in ((straight, one), (resumed, other), (twin, copied)):
        train(model, optimizer)
    assert same(snapshot(one), snapshot(other))
    assert same(snapshot(one), snapshot(copied))


def test_adamw_and_its_state() -> None:
    ours, theirs = Waves(), Waves()
    adamw = torch.optim.AdamW(theirs.parameters(), weight_decay=0.0, foreach=False)
    optimizer = NFNOptimizer(ours, rule="adamw")
    train(ours, optimizer)
    for p, q in ((ours, optimizer), (theirs, adamw)):
        train(p, q, 3)  # type: ignore[arg-type]
    ours.load_state_dict(theirs.state_dict())
    optimizer.load_state_dict(adamw.state_dict())
    for p, q in ((ours, optimizer), (theirs, adamw)):
        train(p, q, 3)  # type: ignore[arg-type]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_in_one_part() -> None:
    model = Waves()
    optimizer = NFNOptimizer(model, rule=RULE)
    train(model, optimizer, 1)
    before = snapshot(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert model.into.weight.grad is not None
    model.into.weight.grad[0, 0] = complex(1.0, float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same(snapshot(optimizer), before)


def test_views() -> None:
    z, x = torch.tensor([1 + 2j, 3j]), torch.ones(2)
    assert real(x) is x
    assert torch.equal(real(z), torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    assert torch.equal(real(z.conj()), torch.tensor([[1.0, -2.0], [0.0, -3.0]]))
    real(z).zero_()
    assert not z.any()
    symmetry = Symmetry.parse("z h\nx h\nfree h=2")
    assert symmetry_of_views(symmetry, {"z": x, "x": x}) is symmetry
    found = symmetry_of_views(symmetry, {"z": z, "x": x})
    assert found == Symmetry.parse("z h z.complex\nx h\nfree h=2\nfixed z.complex=2")
