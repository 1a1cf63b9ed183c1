"""An optimizer that keeps its moments in bfloat16: which tensors those are, and that it is otherwise like any other."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import digits
import higher
import pytest
import torch
from scalar_recorder import ScalarRecorder
from torch import Tensor, nn
from trained_net import RULE, X, backward, net, same, snapshot, through_file, train

from nfn_optim import NFNOptimizer, Symmetry, UpdateRule, watch
from nfn_optim.engine.moments import MOMENTS
from nfn_optim.optimizer.differentiable import register

SHORT = torch.bfloat16
RULES: dict[str, Any] = {"default": "default", "adamw": "adamw", "of which nothing is zero": RULE}


def short(model: Any, **options: Any) -> NFNOptimizer:
    """With moments in bfloat16."""
    return NFNOptimizer(model, **{"rule": RULE, **options}, state_dtype=SHORT)


def dtypes(optimizer: torch.optim.Optimizer) -> dict[str, set[torch.dtype]]:
    """Of every entry of the state."""
    found: dict[str, set[torch.dtype]] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            found.setdefault(key, set()).add(value.dtype)
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, SHORT, torch.float64])
def test_only_moments_are_short(rule: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = short(model, rule=RULES[rule])
    train(model, optimizer)
    found = dtypes(optimizer)
    full = torch.promote_types(dtype, torch.float32)
    assert all(found[key] == {SHORT if key in MOMENTS else full} for key in found)
    assert all(value.any() for state in optimizer.state.values() for key, value in state.items() if key in MOMENTS)
    assert optimizer.fallbacks == optimizer.skipped_steps == 0


def test_a_state_is_half_as_large() -> None:
    model = nn.Linear(400, 300)
    sizes = []
    for dtype in (None, SHORT):
        optimizer = NFNOptimizer(model, state_dtype=dtype)
        torch.autograd.backward(model(torch.ones(2, 400)).square().mean())
        optimizer.step()
        moments = [s[key] for s in optimizer.state.values() for key in MOMENTS]
        sizes.append(sum(x.numel() * x.itemsize for x in moments))
    weights = sum(p.numel() for p in model.parameters())
    assert sizes == [12 * weights, 6 * weights]


@pytest.mark.parametrize("wrong", [torch.float16, torch.int8, torch.float32, "bfloat16"])
def test_what_else_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"state_dtype= as torch.bfloat16 or None, found .*; None keeps"):
        NFNOptimizer(net(), rule=RULE, state_dtype=wrong)


@pytest.mark.parametrize("rule", RULES)
def test_steps_stay_close_to_those_in_full_precision(rule: str) -> None:
    """A digit of bfloat16 in a moment is less than one in a hundred of an update, and it is there."""
    full, half = digits.network(), digits.network()
    start = torch.cat([p.detach().flatten().clone() for p in full.parameters()])
    digits.train(full, NFNOptimizer(full, rule=RULES[rule]), digits.batches(5))
    digits.train(half, short(half, rule=RULES[rule]), digits.batches(5))
    one, other = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (full, half))
    apart = (one - other).norm() / (one - start).norm()
    assert 2e-4 < apart < 0.02


def test_a_parameter_that_does_not_move_has_moments_that_do() -> None:
    """Groups: at a learning rate of 0 parameters keep every bit, with small matrices in one stack with others."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[1:].parameters()}]
    optimizer = short(groups, weight_decay=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(model(X).square().mean())
        optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True, True, True]
    assert all(optimizer.state[p]["exp_avg"].any() for p in model.parameters())


# -------------------------------------------------------------------------------------------- other kinds of parameters


def test_complex_parameters_keep_theirs_in_full() -> None:
    """And are as in an optimizer in full precision, in spite of real ones of their shape; those are as without them."""
    torch.manual_seed(0)
    shapes = {"w": (3, 2), "b": (2,), "z": (3,), "y": ()}
    kinds = {"z": torch.complex64, "y": torch.complex64}
    values = {n: torch.randn(s, dtype=kinds.get(n, torch.float32)) for n, s in shapes.items()}

    def run(names: str, dtype: torch.dtype | None) -> dict[str, dict[str, Tensor]]:
        params = {n: nn.Parameter(values[n].clone()) for n in names}
        separate = Symmetry.separate({n: shapes[n] for n in names})
        optimizer = NFNOptimizer(params.items(), rule="adamw", symmetry=separate, state_dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            for n, value in values.items():
                g = torch.randn(value.shape, dtype=value.dtype, generator=generator)
                if n in params:
                    params[n].grad = g
            optimizer.step()
        return {n: {"p": p.detach(), **optimizer.state[p]} for n, p in params.items()}

    together, full, alone = run("wbzy", SHORT), run("wbzy", None), run("wb", SHORT)
    for n in "zy":
        torch.testing.assert_close(together[n], full[n], rtol=0, atol=0)
    for n in "wb":
        torch.testing.assert_close(together[n], alone[n], rtol=0, atol=0)
        assert together[n]["exp_avg"].dtype == SHORT
        assert not torch.equal(together[n]["p"], full[n]["p"])


def test_parameters_of_several_precisions() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6).double(), nn.Tanh(), nn.Linear(6, 3))
    optimizer = short(model, symmetry=Symmetry.separate({n: p.shape for n, p in model.named_parameters()}))
    for step in range(5):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        optimizer.step()
    assert dtypes(optimizer)["exp_avg_sq"] == {SHORT}
    assert {s["step"].item() for s in optimizer.state.values()} == {5}
    for p in model.parameters():
        v = optimizer.state[p]["exp_avg_sq"].double()
        torch.testing.assert_close(v, torch.full_like(v, 0.01 * 54.91e-3), rtol=0.02, atol=0)  # sum of .999^(5-k) k^2


# ------------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_resume_is_bit_exact(rule: str, how: str) -> None:
    straight = net()
    one = short(straight, rule=RULES[rule], weight_decay=0.1, total_steps=9)
    train(straight, one)
    if how == "file":
        resumed = net(seed=1)
        resumed.load_state_dict(straight.state_dict())
        other = short(resumed, rule=RULES[rule])
        other.load_state_dict(through_file(one.state_dict()))
    elif how == "deepcopy":
        resumed, other = copy.deepcopy((straight, one))
    else:
        resumed, other = pickle.loads(pickle.dumps((straight, one)))
    assert same(snapshot(one), snapshot(other))
    train(straight, one, 4)
    train(resumed, other, 4)
    assert same(snapshot(one), snapshot(other))


def test_a_copy_keeps_what_comes_later_short() -> None:
    optimizer = pickle.loads(pickle.dumps(short(net())))
    late = nn.Linear(3, 2)
    optimizer.add_param_group({"params": late.parameters()})
    for p in late.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="no forward pass"):
        optimizer.step()
    assert dtypes(optimizer)["exp_avg"] == {SHORT}


def test_states_go_from_one_precision_to_the_other() -> None:
    """Into bfloat16 rounded to the nearest, back without loss; everything else bit for bit."""
    model = net()
    full = NFNOptimizer(model, rule=RULE)
    train(model, full)
    half, back = short(model), NFNOptimizer(model, rule=RULE)
    half.load_state_dict(full.state_dict())
    back.load_state_dict(half.state_dict())
    for p in model.parameters():
        for key, value in full.state[p].items():
            expected = value.to(SHORT) if key in MOMENTS else value
            assert torch.equal(half.state[p][key], expected)
            assert half.state[p][key].dtype == expected.dtype
            assert torch.equal(back.state[p][key], expected.float())
            assert back.state[p][key].dtype == torch.float32
    train(model, half)
    train(model, back)


def test_a_state_of_adamw_is_taken_over() -> None:
    ours, theirs = net(), net()
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    train(theirs, adamw)
    ours.load_state_dict(theirs.state_dict())
    optimizer = short(ours, rule="adamw")
    optimizer.load_state_dict(adamw.state_dict())
    assert dtypes(optimizer)["exp_avg_sq"] == {SHORT}
    train(theirs, adamw)
    train(ours, optimizer)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=1e-3)


def test_resume_from_a_distributed_checkpoint(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    straight, resumed = net(), net(seed=1)
    one, other = short(straight), short(resumed)
    train(straight, one)
    saved = {"model": straight.state_dict(), "optimizer": get_optimizer_state_dict(straight, one)}
    template = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other)}
    with pytest.warns(UserWarning):  # that there is only one process
        dcp.save(saved, checkpoint_id=tmp_path)
        dcp.load(template, checkpoint_id=tmp_path)
    resumed.load_state_dict(template["model"])
    set_optimizer_state_dict(resumed, other, template["optimizer"])
    assert same(snapshot(one), snapshot(other))
    train(straight, one)
    train(resumed, other)
    assert same(snapshot(one), snapshot(other))


def test_a_parameter_of_another_shape_is_reset_in_bfloat16() -> None:
    model = net()
    optimizer = short(model)
    train(model, optimizer)
    with torch.no_grad():
        model[2].bias.set_(torch.zeros(1))  # type: ignore[call-overload]
    model[2].weight.grad, model[2].bias.grad = None, torch.ones(1)
    with pytest.warns(UserWarning, match="changed their shape"):
        optimizer.step()
    state = optimizer.state[model[2].bias]
    assert (state["exp_avg"].shape, state["exp_avg"].dtype, state["step"].item()) == ((1,), SHORT, 1)


# ----------------------------------------------------------------------------------------- who else looks at the state


def test_the_pure_form_takes_short_moments_and_returns_full_ones() -> None:
    """That of the rule itself, where a step may be differentiated: what rounding would do to it is not part of it."""
    params = {"w": torch.randn(5, 4, generator=torch.Generator().manual_seed(0))}
    separate, rule = Symmetry.separate({"w": (5, 4)}), UpdateRule()
    state = rule.init(params, state_dtype=SHORT)
    with torch.no_grad():
        rule.step_({n: p.clone() for n, p in params.items()}, params, state, separate, lr=0.1)
    wide = {"w": {key: value.float() for key, value in state["w"].items()}}
    update, new = rule(params, params, state, separate, lr=0.1)
    expected, precise = rule(params, params, wide, separate, lr=0.1)
    assert torch.equal(update["w"], expected["w"])
    for key in MOMENTS:
        assert new["w"][key].dtype == torch.float32
        assert torch.equal(new["w"][key], precise["w"][key])


def test_inside_of_higher() -> None:
    """In full precision in the loop; the optimizer has moments in bfloat16 before and after."""
    register()
    model = net()
    optimizer = short(model)
    train(model, optimizer)
    steps = []
    for dtype in (SHORT, None):
        inner = copy.deepcopy(model)
        taken = NFNOptimizer(inner, rule=RULE, state_dtype=dtype)
        taken.load_state_dict(optimizer.state_dict())
        with higher.innerloop_ctx(inner, taken) as (fmodel, diffopt):
            for _ in range(2):
                diffopt.step(fmodel(X).square().mean())
            diffopt.write_back()
        assert dtypes(taken)["exp_avg_slow"] == {torch.float32 if dtype is None else SHORT}
        assert dtypes(taken)["step"] == {torch.float32}
        steps.append((taken, inner))
        backward(inner, taken)
        taken.step()
    (half, one), (full, other) = steps
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
        assert half.state[p]["step"] == full.state[q]["step"] == 6


def test_the_monitor_sums_in_full_precision() -> None:
    """The norm of 250,000 small numbers, which a sum in bfloat16 would not reach."""
    model = nn.Linear(500, 500, bias=False)
    optimizer, writer = short(model, rule="adamw"), ScalarRecorder()
    watching = watch(optimizer, writer, every=1)
    model.weight.grad = torch.randn(500, 500, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    watching.close()
    norm = optimizer.state[model.weight]["exp_avg_sq"].double().sum().sqrt().item()
    (found,) = {entries[-1][1] for tag, entries in writer.scalars.items() if "second_moment_norm" in tag}
    assert found == pytest.approx(norm, rel=1e-4)
