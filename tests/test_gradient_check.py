"""Steps that must not be taken: recognised before the step on a CPU, on the device elsewhere."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recording import cached_rule, give_gradients, mlp, record, snapshot
from rules import random_rule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nfn_optim import NFNOptimizer, symmetry_of
from nfn_optim.engine.executor import Execution
from nfn_optim.optimizer.gradient_check import grads_finite, grads_finite_tensor

LARGE = 1e20  # finite, but not its square
CASES: dict[str, tuple[bool, list[Tensor]]] = {
    "finite": (True, [torch.randn(3, 2), torch.zeros(1)]),
    "large": (True, [torch.full((100, 100), 1e18)]),
    "nan": (False, [torch.zeros(3), torch.tensor([1.0, math.nan])]),
    "infinite": (False, [torch.zeros(3), torch.tensor([-math.inf])]),
    "square overflows": (False, [torch.tensor([LARGE])]),
    "not in double precision": (True, [torch.tensor([LARGE], dtype=torch.float64)]),
    "bfloat16": (False, [torch.tensor([1.0, LARGE], dtype=torch.bfloat16), torch.ones(2)]),
    "empty": (True, [torch.empty(0)]),
    "empty and nan": (False, [torch.empty(0, 3), torch.tensor(math.nan)]),
}


@pytest.mark.parametrize(("expected", "grads"), CASES.values(), ids=CASES)
def test_both_checks_agree(expected: bool, grads: list[Tensor]) -> None:
    assert grads_finite(grads) == expected
    there = grads_finite_tensor(grads)
    assert there.shape == () and there.dtype == torch.bool
    assert there.item() == expected


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets gradients be treated as if they were on another device."""
    return lambda on: monkeypatch.setattr("nfn_optim.optimizer.optimizer.on_cpu", lambda _: not on)


@pytest.mark.parametrize("execution", [Execution(), Execution(tile=10, compile_from=1)], ids=["cached", "in tiles"])
@pytest.mark.parametrize("rule", ["default", "adamw", "cached"])
def test_a_step_that_checks_on_the_device_is_the_same(
    rule: str, execution: Execution, far: Callable[[bool], None]
) -> None:
    """To the last bit, with non-finite gradients at steps with a refresh and at others."""
    found = []
    for on in (False, True):
        far(on)
        model = mlp()
        optimizer = NFNOptimizer(model, rule=cached_rule() if rule == "cached" else rule, weight_decay=0.1)
        optimizer._execution = lambda *_: execution  # type: ignore[method-assign]
        for step in range(12):
            give_gradients(model, (torch.randn(8, 3),))
            before = snapshot(optimizer) if step else []
            if step in (3, 4, 7, 9):
                model[0].weight.grad.view(-1)[0] = (math.nan, math.inf, LARGE)[step % 3]
                optimizer.step()
                assert all(torch.equal(x, old) for x, old in zip(snapshot(optimizer), before, strict=True))
            else:
                optimizer.step()
            assert optimizer.skipped_steps == sum(step >= k for k in (3, 4, 7, 9))  # refreshes follow the right count
        assert optimizer.param_groups[0]["steps_taken"] == 8
        found.append(snapshot(optimizer))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_nothing_happens_at_a_first_step_without_use(far: Callable[[bool], None]) -> None:
    far(True)
    model = mlp()
    start = [p.clone() for p in model.parameters()]
    optimizer = NFNOptimizer(model, rule=random_rule())
    give_gradients(model, (torch.full((4, 3), math.nan),))
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), start, strict=True))
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("ask", ["property", "state_dict", "copy", "repr", "load"])
def test_whoever_asks_gets_the_right_count(ask: str, far: Callable[[bool], None]) -> None:
    far(True)
    model = mlp()
    optimizer = NFNOptimizer(model, rule="adamw")
    for value in (1.0, math.nan, 1.0, math.nan, math.nan):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.step()
    ways: dict[str, Callable[[], Any]] = {
        "property": lambda: optimizer.skipped_steps,
        "state_dict": lambda: optimizer.state_dict()["param_groups"][0]["skipped_steps"],
        "copy": lambda: copy.deepcopy(optimizer).param_groups[0]["skipped_steps"],
        "repr": lambda: 3 if "skipped_steps: 3" in repr(optimizer) else None,
        "load": lambda: optimizer.load_state_dict(optimizer.state_dict()) or optimizer.skipped_steps,
    }
    assert ways[ask]() == 3
    assert optimizer.param_groups[0]["steps_taken"] == 2


class Elsewhere(TorchDispatchMode):
    """ScalarRecorder which operations leave a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.is_cpu for x in (out if isinstance(out, list | tuple) else [out])):
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("total_steps", [None, 20])
def test_a_step_never_synchronises(total_steps: int | None) -> None:
    """On "meta" any read of a value would fail; nor is anything copied there."""

    def network() -> nn.Module:
        wide = [layer for _ in range(3) for layer in (nn.Linear(40, 40), nn.ReLU())]
        return nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Flatten(), nn.Linear(40, 40), *wide)

    symmetry = symmetry_of(network(), torch.zeros(2, 3, 3, 3))
    with torch.device("meta"):
        model = network()
    optimizer = NFNOptimizer(model, symmetry=symmetry, total_steps=total_steps)
    for step in range(9):
        if step == 4:
            optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, device="meta")
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        with Elsewhere() as elsewhere:
            optimizer.step()
        assert step == 0 or elsewhere.found == []  # what is made once is made then
    assert optimizer.param_groups[0]["steps_taken"] == 9
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.skipped_steps  # noqa: B018 - it waits


@pytest.mark.exhaustive
def test_a_compiled_step_left_to_the_device(far: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether to step is one of the numbers that a graph is given."""
    far(True)
    recorded = record(monkeypatch)
    model = mlp()
    optimizer = NFNOptimizer(model, rule=cached_rule(), compile=True)
    for step in range(8):
        give_gradients(model, (torch.ones(4, 3),))
        before = snapshot(optimizer) if step else []
        if step in (5, 6):
            model[2].bias.grad[0] = math.nan
            optimizer.step()
            assert all(torch.equal(x, old) for x, old in zip(snapshot(optimizer), before, strict=True))
        else:
            optimizer.step()
            assert not step or not all(torch.equal(x, old) for x, old in zip(snapshot(optimizer), before, strict=True))
    assert optimizer.skipped_steps == 2
    assert len(recorded) == 2
