"""The checks that PyTorch puts its own optimizers through, as far as they apply to one that is not its own.

Their inputs and error inputs come from `torch.testing._internal.common_optimizers`; the checks themselves are in
PyTorch's test/test_optim.py, which no wheel has, and are written here anew, by their names. AdamW goes through the same
table: what it does not pass would not be a check of the contract. `SKIPPED` has all others, each with its reason.

References:
    test/test_optim.py, class TestOptimRenewed, https://github.com/pytorch/pytorch
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_case import ARGUMENTS, Case, Linear, equal, infos, run_with, without_names
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

pytestmark = pytest.mark.filterwarnings("ignore:no forward pass")  # torch gives bare tensors and calls no module

SKIPPED = {
    "test_foreach_goes_right_direction": "no argument foreach: there is one way to take a step",
    "test_foreach_matches_forloop": "no argument foreach",
    "test_foreach_large_tensor": "no argument foreach",
    "test_defaults_changed_to_foreach": "no argument foreach",
    "test_set_default_dtype_works_with_foreach": "no argument foreach; other default dtypes are in test_optimizer.py",
    "test_peak_memory_foreach": "no argument foreach; transient memory is measured by benchmarks/step_cost.py",
    "test_fused_matches_forloop": "no argument fused",
    "test_fused_large_tensor": "no argument fused",
    "test_fused_cpu_matches_cuda": "no argument fused",
    "test_fused_does_not_step_if_foundinf": "no argument fused; test_training_loops.py has GradScaler",
    "test_grad_scaling_autocast_fused_optimizers": "no argument fused; test_training_loops.py has GradScaler",
    "test_cpu_load_state_dict": "about the argument fused on several devices",
    "test_fused_error_on_params_on_meta": "no argument fused",
    "test_forloop_goes_right_direction_multigpu": "needs several GPUs",
    "test_foreach_goes_right_direction_multigpu": "needs several GPUs",
    "test_state_dict_with_cuda_params": "needs a GPU; casting between dtypes is in test_saved_state.py",
    "test_rosenbrock_sparse": "sparse gradients are refused: every statistic of a row and a column would be dense",
    "test_second_order_optims_return_consistent_types": "only of optimizers that need a closure",
    "TestDifferentiableOptimizer": "no argument differentiable: nfn_optim.optimizer.differentiable has derivatives",
    "test_correctness": "a step is not compiled: test_faults.py takes one inside a compiled function",
    "test_cudagraphs": "no argument capturable: not all steps are alike, see docs/contract.md",
}
"""Checks of PyTorch's that are not run, and why."""

EXEMPT = {
    "test_complex_2d": "compares with real and imaginary part as two tensors, which a learned rule sees as two tensors"
}
"""Checks that are run with the nominal rule only, and why."""


# ------------------------------------------------------------------------------------------------------ directions


def errors(case: Case) -> None:
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum

    for error in case.info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expect(error.error_type, match=error.error_regex):
            case.info.optim_cls(given.params, **given.kwargs)


def goes_right_direction(case: Case) -> None:
    for contiguous in (True, False):
        for schedulers in ([], *case.info.scheduler_inputs):
            layer = Linear(contiguous)
            assert layer.weight.is_contiguous() == contiguous
            before = layer.closure()
            run_with(schedulers, case.make(layer.params), layer.closure)
            assert case.improved(before, layer.closure())


def param_group_with_lrscheduler(case: Case) -> None:
    for schedulers in case.info.scheduler_inputs:
        layer = Linear()
        before = layer.closure()
        run_with(
            schedulers, case.make([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.01}]), layer.closure
        )
        assert case.improved(before, layer.closure())


def param_groups_lr(case: Case) -> None:
    for lr in (1e-3, torch.tensor(1e-3)):
        layer, still = Linear(), nn.Parameter(torch.randn(2))
        kept, before = still.detach().clone(), layer.closure()
        groups = [{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.01}, {"params": [still], "lr": 0.0}]
        optimizer = case.make(groups, lr=lr)
        for _ in range(20):
            layer.closure()
            still.grad = torch.rand_like(still)
            optimizer.step()
        assert case.improved(before, layer.closure())
        equal(still.detach(), kept)


def param_groups_weight_decay(case: Case) -> None:
    layer, still = Linear(), nn.Parameter(torch.randn(2))
    kept, before = still.detach().clone(), layer.closure()
    groups = [
        {"params": [layer.weight]},
        {"params": [layer.bias], "weight_decay": 0.01},
        {"params": [still], "weight_decay": 0.0},
    ]
    optimizer = case.make(groups)
    still.grad = torch.zeros_like(still)
    for _ in range(20):
        optimizer.step(layer.closure)  # type: ignore[arg-type]
    assert case.improved(before, layer.closure())
    equal(still.detach(), kept)


def tensor_lr(case: Case) -> None:
    for shape in ((), (1,)):
        for schedulers in ([], *case.info.scheduler_inputs):
            layer = Linear()
            twin = layer.twin()
            run_with(schedulers, case.make(layer.params, lr=1e-3), layer.closure)
            run_with(schedulers, case.make(twin.params, lr=torch.full(shape, 1e-3)), twin.closure)
            torch.testing.assert_close(layer.params, twin.params, rtol=1e-4, atol=1e-4)  # training amplifies rounding


# ------------------------------------------------------------------------------------------------------------ numbers


def complex_as_real(case: Case) -> None:
    shapes = (((10, 5), torch.complex64), ((10,), torch.complex64), ((10, 5), torch.float32))
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape, dtype in shapes]
    views = [torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in params]
    twins = [nn.Parameter(view.clone()) for view in views]
    optimizer, other = case.make(params), case.make(twins)
    for _ in range(3):
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = torch.view_as_real(p.grad) if p.is_complex() else p.grad.clone()
        optimizer.step()
        other.step()
        equal(views, [twin.detach() for twin in twins])


def complex_2d(case: Case) -> None:
    whole = nn.Parameter(torch.randn(2, dtype=torch.complex64))
    halves = [nn.Parameter(part.detach().clone()) for part in (whole.real, whole.imag)]
    optimizer, other = case.make([whole]), case.make(halves)

    def rosenbrock(z: Tensor) -> Tensor:
        x, y = z
        return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).abs()

    for _ in range(10):
        optimizer.zero_grad()
        other.zero_grad()
        torch.autograd.backward(rosenbrock(whole))
        torch.autograd.backward(rosenbrock(torch.complex(*halves)))
        optimizer.step()
        other.step()
        torch.testing.assert_close([whole.detach().real, whole.detach().imag], [half.detach() for half in halves])


def no_grad_is_noop(case: Case) -> None:
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    case.make(params).step(lambda: torch.tensor([1]))  # type: ignore[arg-type, return-value]
    equal(params, before)


def zero_grad_is_noop(case: Case) -> None:
    p = nn.Parameter(torch.randn(5, 1))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    case.make([p], weight_decay=0.0).step(lambda: torch.tensor([1]))  # type: ignore[arg-type, return-value]
    equal(p.detach(), before)


def grads_are_left_alone(case: Case) -> None:
    layer, optimizer = case.made()
    for _ in range(3):
        layer.closure()
        grads = [p.grad for p in layer.params]
        before = [g.clone() for g in grads if g is not None]
        versions = [g._version for g in grads if g is not None]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(layer.params, grads, strict=True))
        assert [g._version for g in grads if g is not None] == versions
        equal(grads, before)


def mixed_dtypes(case: Case) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    params = [nn.Parameter(torch.rand(2, 3, dtype=dtype)) for dtype in dtypes]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.rand_like(p)
    optimizer = case.make(params, lr=0.01)
    for _ in range(7):
        optimizer.step()
    assert [p.dtype for p in params] == list(dtypes)
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(params, before, strict=True))


# -------------------------------------------------------------------------------------------------------- state dicts


def deterministic(case: Case) -> None:
    for one, other in ((False, False), (True, False), (False, True), (True, True)):
        layer = Linear()
        optimizer = case.make(layer.named(one))
        for _ in range(10):
            optimizer.step(layer.closure)  # type: ignore[arg-type]
        twin = layer.twin()
        loaded = case.make(twin.named(other))
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(10):
            optimizer.step(layer.closure)  # type: ignore[arg-type]
            loaded.step(twin.closure)  # type: ignore[arg-type]
            equal(layer.params, twin.params)
        equal(without_names(optimizer.state_dict()), without_names(loaded.state_dict()))
        loaded.param_groups.extend(loaded.param_groups)
        last = without_names(loaded.state_dict())["param_groups"][-1]
        equal(without_names(optimizer.state_dict())["param_groups"][-1], last)


def older(case: Case) -> None:
    layer, optimizer = case.made(steps=3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for flag in case.info.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(saved)
    optimizer.step(layer.closure)  # type: ignore[arg-type]


def from_to_named(case: Case) -> None:
    for one, other in ((True, False), (False, True), (True, True)):
        layer = Linear()
        optimizer = case.make(layer.named(one))
        optimizer.step(layer.closure)  # type: ignore[arg-type]
        loaded = case.make(layer.named(other))
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loaded.step(layer.closure)  # type: ignore[arg-type]
        assert loaded.state_dict()["param_groups"][0]["param_names"] == ["name0", "name1"]


def saved_with_weights_only(case: Case) -> None:
    for named in (True, False):
        layer = Linear()
        optimizer = case.make(layer.named(named))
        for _ in range(3):
            optimizer.step(layer.closure)  # type: ignore[arg-type]
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        for weights_only in (True, False):
            buffer.seek(0)
            loaded, saved = torch.load(buffer, weights_only=weights_only), optimizer.state_dict()
            equal(without_names(loaded), without_names(saved))
            assert loaded["param_groups"][0].get("param_names") == (["name0", "name1"] if named else None)


def step_as_number(case: Case) -> None:
    layer, optimizer = case.made(steps=3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    optimizer.step(layer.closure)  # type: ignore[arg-type]
    assert float(optimizer.state[layer.weight]["step"]) == 4


def state_dict_hooks(case: Case) -> None:
    def before(optimizer: torch.optim.Optimizer) -> None:
        optimizer.state["test"] = 1  # type: ignore[index]

    def after(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "saw": state["state"].pop("test", None)}

    _, optimizer = case.made()
    optimizer.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["saw"] is None
    handle = optimizer.register_state_dict_pre_hook(before)
    assert optimizer.state_dict()["saw"] == 1
    handle.remove()
    _, optimizer = case.made()
    optimizer.register_state_dict_pre_hook(before)
    assert optimizer.state_dict()["state"]["test"] == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["test"] == 1  # type: ignore[index]


def load_hooks(case: Case) -> None:
    def in_place(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state["param_groups"][0]["lr"] = 0.002

    def another(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.003
        return state

    def note(optimizer: torch.optim.Optimizer) -> None:
        optimizer.state["found"] = float(optimizer.param_groups[0]["lr"])  # type: ignore[index]

    _, optimizer = case.made()
    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(another, prepend=True)
    optimizer.register_load_state_dict_post_hook(note)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.002
    assert optimizer.state["found"] == 0.002  # type: ignore[index]


def step_hooks(case: Case) -> None:
    seen: list[str] = []

    def note(word: str) -> Callable[..., None]:
        return lambda *_: seen.append(word)

    params = [torch.ones(2)]
    optimizer, other = case.make(params), torch.optim.SGD(params)
    handles = [
        register_optimizer_step_pre_hook(note("all before")),
        register_optimizer_step_post_hook(note("all after")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        other.register_step_pre_hook(note("before")),
        other.register_step_post_hook(note("after")),
    ]
    expected = ["all before", "before", "after", "all after"]
    for times, each in enumerate((optimizer, other, optimizer), 1):
        each.step()
        assert seen == expected * times
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == expected * 3


def deepcopied(case: Case) -> None:
    _, optimizer = case.made(steps=3)

    def public(value: object) -> set[str]:
        return {name for name in vars(value) if not name.startswith("_")}

    assert public(copy.deepcopy(optimizer)) == public(optimizer)


def printed(case: Case) -> None:
    _, optimizer = case.made(steps=1)
    assert "lr: " in repr(optimizer)


def state_is_there(case: Case) -> None:
    layer, optimizer = case.made(steps=1)
    assert [len(optimizer.state[p]) > 0 for p in layer.params] == [True, True]


CHECKS: dict[Callable[[Case], None], tuple[str, ...]] = {
    errors: ("test_errors",),
    goes_right_direction: ("test_forloop_goes_right_direction",),
    param_group_with_lrscheduler: ("test_param_group_with_lrscheduler_goes_right_direction",),
    param_groups_lr: ("test_param_groups_lr",),
    param_groups_weight_decay: ("test_param_groups_weight_decay",),
    tensor_lr: ("test_tensor_lr",),
    complex_as_real: ("test_complex",),
    complex_2d: ("test_complex_2d",),
    no_grad_is_noop: ("test_step_is_noop_when_params_have_no_grad",),
    zero_grad_is_noop: ("test_step_is_noop_for_zero_grads",),
    grads_are_left_alone: ("test_grads_are_never_inplaced_into",),
    mixed_dtypes: ("test_mixed_device_dtype",),
    printed: ("test_optimizer_can_be_printed",),
    deterministic: ("test_state_dict_deterministic",),
    older: ("test_can_load_older_state_dict",),
    from_to_named: ("test_can_load_from_to_named_state_dict",),
    saved_with_weights_only: ("test_save_load_equality_with_weights_only",),
    step_as_number: ("test_load_nontensor_step",),
    state_dict_hooks: ("test_state_dict_pre_hook", "test_state_dict_post_hook", "test_state_dict_pre_post_hook"),
    load_hooks: (
        "test_load_state_dict_pre_hook_and_prepend",
        "test_load_state_dict_post_hook",
        "test_load_state_dict_pre_post_hook",
    ),
    step_hooks: ("test_step_pre_hook", "test_step_post_hook", "test_step_all_hooks"),
    deepcopied: ("test_deepcopy_copies_all_public_attrs",),
    state_is_there: ("test_non_empty_state",),
}
"""Every check that is run, and what it is called in PyTorch."""


def cases() -> Iterator[Any]:
    """Every check for every set of arguments; what all of these share is checked once."""
    for k, (name, kwargs) in enumerate(ARGUMENTS.items()):
        for check, torch_names in CHECKS.items():
            learns = kwargs.get("rule") != "adamw"
            if not (check is errors and k) and not (learns and torch_names[0] in EXEMPT):
                marks = [] if name == "default" and check is not tensor_lr else [pytest.mark.slow]
                yield pytest.param(k, check, id=f"{check.__name__}-{name}", marks=marks)


@pytest.mark.parametrize(("k", "check"), [*cases()])
def test_check(k: int, check: Callable[[Case], None]) -> None:
    torch.manual_seed(0)
    info = infos()["NFNOptimizer"]
    check(Case(info, info.optim_inputs_func(device="cpu")[k]))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_adamw_passes_the_check(check: Callable[[Case], None]) -> None:
    """With every set of arguments that torch has for it."""
    info = infos()["AdamW"]
    given = info.optim_inputs_func(device="cpu")
    for each in given[:1] if check is errors else given:
        torch.manual_seed(0)
        check(Case(info, each))


def test_the_inputs_leave_out_what_torch_adds_itself() -> None:
    """As test_optim_infos_do_not_specify_global_cliquey_kwargs."""
    cliquey = {"foreach", "fused", "differentiable"}
    assert not any(cliquey & given.kwargs.keys() for given in infos()["NFNOptimizer"].optim_inputs_func(device="cpu"))


def test_every_check_is_run_or_has_a_reason() -> None:
    from torch.testing._internal.common_optimizers import optim_db

    run = [name for names in CHECKS.values() for name in names]
    assert len(set(run)) == len(run)
    assert not set(run) & SKIPPED.keys()
    assert set(EXEMPT) <= set(run)
    known = {d.test_name for info in optim_db for d in info.decorators if getattr(d, "test_name", None)}
    assert "test_complex_2d" in known
    assert known <= {*run, *SKIPPED}


def test_the_page_lists_every_check_and_every_reason() -> None:
    page = (Path(__file__).parent.parent / "docs" / "contract.md").read_text(encoding="utf-8")
    for name in (name for names in CHECKS.values() for name in names):
        assert f"`{name}`" in page
    for name, reason in {**SKIPPED, **EXEMPT}.items():
        assert f"| `{name}` | {reason} |" in page
