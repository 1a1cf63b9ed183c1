"""A state that was saved comes back, bit for bit, wherever it can; and what is another's is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trained_net import RULE, backward, grad_of, net, same, snapshot, through_file, train

from nfn_optim.optimizer import NFNOptimizer

Make = Callable[[nn.Module], NFNOptimizer]


def bare(model: nn.Module) -> NFNOptimizer:
    """Constructed as most scripts do."""
    return NFNOptimizer(model.parameters(), lr=0.5, rule=RULE)


def decayed_apart(model: nn.Module, named: bool = True, flip: bool = False) -> NFNOptimizer:
    """Matrices with weight decay, vectors without, as many trainers do."""
    pairs = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) if named else p for n, p in pairs if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) if named else p for n, p in pairs if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return NFNOptimizer(groups[::-1] if flip else groups, rule=RULE)


def by_name(model: nn.Module, optimizer: NFNOptimizer) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Parameters and state by the model's names."""
    return {name: (p.detach().clone(), dict(optimizer.state[p])) for name, p in model.named_parameters()}


def assert_equal(one: Any, other: Any) -> None:
    """Bit-equal nests of tensors."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_bit_exact(dtype: torch.dtype) -> None:
    straight, resumed = net(dtype), net(dtype, seed=1)
    one = NFNOptimizer(straight, rule=RULE, weight_decay=0.1, total_steps=7)
    train(straight, one, 3)
    backward(straight, one)
    grad_of(next(straight.parameters())).fill_(float("nan"))
    one.step()
    saved = through_file({"model": straight.state_dict(), "optimizer": one.state_dict()})
    other = NFNOptimizer(resumed.parameters(), lr=0.5, rule=RULE)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(state_dict=saved["optimizer"])
    assert same(snapshot(one), snapshot(other))
    assert (other.skipped_steps, other.param_groups[0]["total_steps"], other.param_groups[0]["lr"]) == (1, 7, 1e-3)
    train(straight, one, 4)
    train(resumed, other, 4)
    assert same(snapshot(one), snapshot(other))
    assert one.fallbacks == other.fallbacks


def test_loading_copies_and_runs_hooks_once() -> None:
    model = net()
    seen: list[int] = []
    optimizer = NFNOptimizer(model, rule=RULE)
    train(model, optimizer)
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(len(state["state"])))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    kept = saved["state"][0]["exp_avg"].clone()
    optimizer.load_state_dict(saved)
    train(model, optimizer)
    assert seen == [4, 4]
    assert torch.equal(saved["state"][0]["exp_avg"], kept)


# -------------------------------------------------------------------------------------------- other groups and orders

LAYOUTS: dict[str, Make] = {
    "module": lambda m: NFNOptimizer(m, rule=RULE),
    "named": lambda m: NFNOptimizer(m.named_parameters(), rule=RULE),
    "backwards": lambda m: NFNOptimizer(reversed(list(m.named_parameters())), rule=RULE),
    "groups": decayed_apart,
    "groups backwards": lambda m: decayed_apart(m, flip=True),
    "one group each": lambda m: NFNOptimizer([{"params": [pair]} for pair in m.named_parameters()], rule=RULE),
    "bare groups and model": lambda m: NFNOptimizer([{"params": [p]} for p in m.parameters()], rule=RULE, model=m),
    "wrapped": lambda m: NFNOptimizer([(f"module.{n}", p) for n, p in m.named_parameters()], rule=RULE),
}


@pytest.mark.parametrize("there", LAYOUTS)
@pytest.mark.parametrize("here", LAYOUTS)
def test_a_state_goes_where_its_names_are(here: str, there: str) -> None:
    straight, resumed = net(), net(seed=1)
    one, other = LAYOUTS[here](straight), LAYOUTS[there](resumed)
    for group in one.param_groups:
        group["lr"] = 2e-3
    train(straight, one, 2)
    backward(straight, one)
    grad_of(next(straight.parameters())).fill_(float("inf"))
    one.step()
    resumed.load_state_dict(straight.state_dict())
    names = other.names
    other.load_state_dict(through_file(one.state_dict()))
    assert_equal(by_name(straight, one), by_name(resumed, other))
    assert [group["lr"] for group in other.param_groups] == [2e-3] * len(other.param_groups)
    assert other.skipped_steps == 1
    assert other.names == names
    for group in (*one.param_groups, *other.param_groups):
        group["weight_decay"] = 0.0
    train(straight, one, 2)
    train(resumed, other, 2)
    torch.testing.assert_close(by_name(straight, one), by_name(resumed, other), rtol=1e-4, atol=1e-6)


def test_numbers_are_taken_over_where_all_agree() -> None:
    model = net()
    apart, together = decayed_apart(model), NFNOptimizer(model, rule=RULE, weight_decay=0.7)
    apart.param_groups[0]["lr"] = apart.param_groups[1]["lr"] = 5e-3
    together.load_state_dict(apart.state_dict())
    assert (together.param_groups[0]["lr"], together.param_groups[0]["weight_decay"]) == (5e-3, 0.7)
    apart.load_state_dict(NFNOptimizer(model, rule=RULE, weight_decay=0.3).state_dict())
    assert [group["weight_decay"] for group in apart.param_groups] == [0.3, 0.3]


def test_groups_without_names_are_matched_in_order() -> None:
    straight, resumed = net(), net(seed=1)
    one, other = decayed_apart(straight, named=False), decayed_apart(resumed, named=False)
    train(straight, one)
    resumed.load_state_dict(straight.state_dict())
    other.load_state_dict(one.state_dict())
    assert same(snapshot(one), snapshot(other))
    with pytest.raises(ValueError, match=r"number of parameter groups, 2 instead of 1.*by name"):
        bare(resumed).load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"another model"):
        decayed_apart(resumed, named=False, flip=True).load_state_dict(one.state_dict())


def test_part_of_a_model() -> None:
    model, larger = net(), nn.Sequential(*net(seed=1), nn.Linear(3, 2))
    one = NFNOptimizer(model, rule=RULE)
    train(model, one)
    grown = NFNOptimizer(larger, rule=RULE)
    with pytest.warns(UserWarning, match=r"by name: \['3.weight', '3.bias'\] are initialised"):
        grown.load_state_dict(one.state_dict())
    assert [larger[k].weight in grown.state for k in (0, 2, 3)] == [True, True, False]
    assert_equal(grown.state[larger[0].weight], one.state[model[0].weight])
    train(larger, grown)
    assert [int(grown.state[larger[k].weight]["step"]) for k in (0, 2, 3)] == [6, 6, 3]
    model[0].requires_grad_(False)
    adapter = NFNOptimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad], rule=RULE)
    with pytest.warns(UserWarning, match=r"by name: the saved states of \['0.weight', '0.bias'\] are not used"):
        adapter.load_state_dict(one.state_dict())
    assert_equal(adapter.state[model[2].weight], one.state[model[2].weight])


def test_a_state_of_another_model_of_the_same_shapes_is_not_taken_silently() -> None:
    model = net()
    other = nn.ModuleDict({"first": nn.Linear(4, 6), "second": nn.Linear(6, 3)})
    optimizer = NFNOptimizer(other, rule=RULE)
    one = NFNOptimizer(model, rule=RULE)
    train(model, one)
    with pytest.warns(UserWarning, match=r"no parameter has one of the saved names, \['0.weight'") as caught:
        optimizer.load_state_dict(one.state_dict())
    assert caught[0].filename == __file__
    assert_equal(list(optimizer.state.values()), list(one.state.values()))


def test_names_come_along_and_may_be_joined() -> None:
    model = net()
    one = NFNOptimizer(model, rule=RULE)
    train(model, one)
    optimizer = bare(model)
    optimizer.load_state_dict(one.state_dict())
    assert optimizer.names == one.names
    train(model, optimizer)
    late = nn.Linear(3, 2)
    optimizer.add_param_group({"params": late.parameters()})
    assert optimizer.names == (*one.names, "1.0", "1.1")
    with pytest.raises(TypeError, match="ordered"):
        optimizer.add_param_group({"params": {torch.ones(1)}})


# ----------------------------------------------------------------------------- other optimizers, other models


def test_a_state_of_adamw_is_taken_over() -> None:
    ours, theirs = net(), net()
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    train(theirs, adamw)
    ours.load_state_dict(theirs.state_dict())
    optimizer = NFNOptimizer(ours, rule="adamw")
    optimizer.load_state_dict(adamw.state_dict())
    train(theirs, adamw)
    train(ours, optimizer)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_an_older_state_of_our_own() -> None:
    """Before there was a slow moment, a counter of fallbacks, or a count of skipped steps."""
    straight, resumed = net(), net()
    one, other = NFNOptimizer(straight, rule=RULE), NFNOptimizer(resumed, rule=RULE, total_steps=9)
    train(straight, one)
    saved = through_file(one.state_dict())
    for state in saved["state"].values():
        del state["exp_avg_slow"], state["fallbacks"]
    for group in saved["param_groups"]:
        del group["skipped_steps"], group["total_steps"], group["param_names"]
    other.load_state_dict(saved)
    assert [group["total_steps"] for group in other.param_groups] == [9]
    assert other.names == one.names
    state, expected = (o.state[m[0].weight] for o, m in ((other, resumed), (one, straight)))
    assert_equal(state["exp_avg"], expected["exp_avg"])
    assert not state["exp_avg_slow"].any()
    train(resumed, other)
    assert other.skipped_steps == 0


def _other_width(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg"] = torch.zeros(7, 4)


def _other_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})
    for group in saved["param_groups"]:
        del group["param_names"]


def _other_number(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()
    del saved["param_groups"][0]["param_names"]


def _other_number_of_names(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


def _a_model(saved: dict[str, Any]) -> None:
    saved["weight"] = saved.pop("state")


def _a_word(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg"] = "zeros"


def _complex(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg"] = torch.zeros(6, 4, dtype=torch.complex64)


def _bad_number(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["weight_decay"] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_width, "another model"),
        (_other_groups, "different number of parameter groups"),
        (_other_number, "doesn't match the size"),
        (_other_number_of_names, r"as many names as parameters.*\(4, 3\)"),
        (_a_model, "no .'state'. in it.*is it the model's"),
        (_a_word, "as a tensor, found str"),
        (_complex, "another model"),
        (_bad_number, "weight_decay >= 0"),
    ],
)
def test_another_state_is_refused(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=RULE)
    train(model, optimizer)
    saved = through_file(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.7
    spoil(saved)
    before, lr = snapshot(optimizer), optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert same(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == lr
    assert not optimizer._optimizer_load_state_dict_pre_hooks


# --------------------------------------------------------------------------------------- torch.distributed.checkpoint

OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True, "cpu_offload": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make", ["module", "groups", "bare", "adamw"])
def test_resume_from_a_distributed_checkpoint(options: str, make: str, tmp_path: Path) -> None:
    """The state is read before any forward pass, at a learning rate of 0: that must leave no trace."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict

    chosen = state_dict.StateDictOptions(**OPTIONS[options])
    makers = {**LAYOUTS, "bare": bare, "adamw": lambda m: NFNOptimizer(m, rule="adamw")}
    straight, resumed = net(torch.bfloat16), net(torch.bfloat16, seed=1)
    one = makers[make](straight)
    train(straight, one)
    saved = {
        "model": straight.state_dict(),
        "optimizer": state_dict.get_optimizer_state_dict(straight, one, options=chosen),
    }
    other = makers[make](resumed)
    template = {
        "model": resumed.state_dict(),
        "optimizer": state_dict.get_optimizer_state_dict(resumed, other, options=chosen),
    }
    with pytest.warns(UserWarning):  # that there is only one process
        dcp.save(saved, checkpoint_id=tmp_path)
        dcp.load(template, checkpoint_id=tmp_path)
    resumed.load_state_dict(template["model"])
    state_dict.set_optimizer_state_dict(resumed, other, template["optimizer"], options=chosen)
    assert same(snapshot(one), snapshot(other))
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in one.param_groups]
    train(straight, one)
    train(resumed, other)
    assert same(snapshot(one), snapshot(other))


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)])
def test_asking_for_the_state_changes_nothing(lr: Any) -> None:
    from torch.distributed.checkpoint import state_dict

    model, asked = net(), net()
    with torch.no_grad():
        for m in (model, asked):
            m[0].bias.fill_(-0.0)
    one, other = (NFNOptimizer(m, lr=lr, weight_decay=0.1, rule=RULE) for m in (model, asked))
    state = state_dict.get_optimizer_state_dict(asked, other)
    assert all(value.shape == () for s in state["state"].values() for k, value in s.items() if k == "step")
    assert {k for s in state["state"].values() for k in s} == set(RULE.init({"p": model[0].weight})["p"])
    assert same((snapshot(one)[0], []), (snapshot(other)[0], []))
    for p, s in other.state.items():
        assert all(torch.equal(s[key], value) for key, value in RULE.init({"p": p})["p"].items())
    train(model, one)
    train(asked, other)
    assert same(snapshot(one), snapshot(other))


def test_a_distributed_checkpoint_goes_to_other_groups() -> None:
    from torch.distributed.checkpoint import state_dict

    straight, resumed = net(), net(seed=1)
    one, other = decayed_apart(straight), NFNOptimizer(resumed, rule=RULE)
    train(straight, one)
    state = state_dict.get_optimizer_state_dict(straight, one)
    state_dict.set_optimizer_state_dict(resumed, other, state)
    resumed.load_state_dict(straight.state_dict())
    assert_equal(by_name(straight, one), by_name(resumed, other))
    assert other.names == tuple(name for name, _ in resumed.named_parameters())


# ------------------------------------------------------------------------------------------------------------- copies

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_go_on_alike(how: str, steps: int) -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=RULE, total_steps=9)
    train(model, optimizer, steps)
    twin, copied = COPIES[how]((model, optimizer))
    assert copied.rule is not RULE
    assert repr(copied) == repr(optimizer)
    train(model, optimizer)
    train(twin, copied)
    assert same(snapshot(optimizer), snapshot(copied))
    assert copied.symmetry == optimizer.symmetry
    assert copied.names == optimizer.names
