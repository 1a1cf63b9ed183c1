"""State that users edit between steps: what fits is kept, what does not starts afresh, and one warning says so."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rules import random_rule
from scalar_recorder import ScalarRecorder
from torch import Tensor, nn
from trained_net import backward, net, same, snapshot, through_file, train

from nfn_optim import NFNOptimizer, pretrained, watch
from nfn_optim.optimizer.state import HIDDEN, ParamState, entries_of
from nfn_optim.rule.members import WHOLE

RANKED = random_rule(rank=2)
SHAPES = {"rows": (6, 3), "vector": (6,), "wide": (6, 4, 5), "one column": (6, 1)}
State = dict[str, Any]


def made(shape: tuple[int, ...], rule: Any = RANKED, steps: int = 3, **more: Any) -> tuple[nn.Parameter, NFNOptimizer]:
    """A parameter that was trained."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    optimizer = NFNOptimizer([p], rule=rule, **more)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no forward pass")
        go_on(optimizer, steps)
    return p, optimizer


def go_on(optimizer: NFNOptimizer, steps: int = 2) -> None:
    """Train, and see that everything moves and fits."""
    for _ in range(steps):
        (p,) = optimizer.param_groups[0]["params"]
        optimizer.zero_grad()
        (p - 1).abs().square().sum().backward()
        before = p.detach().clone()
        optimizer.step()
        assert p.isfinite().all()
        assert not torch.equal(p, before)
        expected = optimizer.rule.init({"": torch.view_as_real(p.detach()) if p.is_complex() else p})[""]
        entries = entries_of(optimizer.state[p])
        for key, value in expected.items():
            found = torch.view_as_real(entries[key]) if entries[key].is_complex() else entries[key]
            assert found.shape == value.shape, key
            assert found.isfinite().all(), key


def put(optimizer: NFNOptimizer, old: Tensor, new: Tensor, state: State) -> nn.Parameter:
    """Put a new parameter and a state into the place of an old one."""
    optimizer.state.pop(old, None)
    p = nn.Parameter(new.detach().clone())
    optimizer.param_groups[0]["params"] = [p]
    optimizer.state[p] = state
    return p


# --------------------------------------------------------------------------- rows come and go, every entry edited alike

MASK = torch.tensor([True, False, True, True, False, True])
INDEX = torch.tensor([5, 0, 0, 2])
Edit = Callable[[Tensor], Tensor]
ROWS: dict[str, Edit] = {
    "append zeros": lambda v: torch.cat([v, torch.zeros(4, *v.shape[1:], dtype=v.dtype)]),
    "append zeros like": lambda v: torch.cat((v, torch.zeros_like(v[:2])), dim=0),
    "prune": lambda v: v[MASK],
    "prune with nonzero": lambda v: v[MASK.nonzero().squeeze(1)],
    "duplicate": lambda v: torch.cat([v, v[MASK]]),
    "select": lambda v: v.index_select(0, INDEX),
    "split": lambda v: torch.cat([v[MASK], v.new_zeros((2 * 2, *v.shape[1:]))]),
    "sort": lambda v: v[torch.tensor([5, 4, 3, 2, 1, 0])],
    "one row left": lambda v: v[:1],
    "none left but one half": lambda v: v.narrow(0, 3, 3).contiguous(),
}


def by_keys(state: State, edit: Edit, _: Tensor) -> None:
    for key in state.keys():  # noqa: SIM118 - as gsplat writes it
        if key != "step":
            state[key] = edit(state[key])


def by_items(state: State, edit: Edit, _: Tensor) -> None:
    for key, value in state.items():
        if key != "step":
            state[key] = edit(value)


def by_iterating(state: State, edit: Edit, _: Tensor) -> None:
    for key in list(state):
        if key != "step":
            state[key] = edit(state[key])


def by_shape(state: State, edit: Edit, p: Tensor) -> None:
    for key, value in state.items():
        if torch.is_tensor(value) and value.shape == p.shape:
            state[key] = edit(value)


def by_dimension(state: State, edit: Edit, _: Tensor) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            state[key] = edit(value)


LOOPS = {f.__name__: f for f in (by_keys, by_items, by_iterating, by_shape, by_dimension)}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loops_over_all_entries_keep_everything(shape: str, rows: str, loop: str) -> None:
    p, optimizer = made(SHAPES[shape])
    edit, before = ROWS[rows], dict(optimizer.state[p].items())
    step_size = optimizer.state[p]["log_step_size"].clone()
    state = optimizer.state[p]
    del optimizer.state[p]
    LOOPS[loop](state, edit, p)
    new = put(optimizer, p, edit(p.detach()), state)
    expected = {key: edit(value) for key, value in before.items() if key != "step"}
    new.grad = torch.zeros_like(new)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()  # fits the state, and changes nothing: no warning
    for key, value in expected.items():
        assert torch.equal(optimizer.state[new][key], value), key
    assert optimizer.state[new]["step"] == 3
    assert torch.equal(optimizer.state[new]["log_step_size"], step_size)
    optimizer.param_groups[0]["lr"] = 1e-3
    go_on(optimizer)
    assert optimizer.state[new]["step"] == 5


@pytest.mark.parametrize("rule", ["default", "adamw", RANKED], ids=["default", "adamw", "ranked"])
def test_many_rounds_of_densification(rule: Any) -> None:
    p, optimizer = made((6, 3), rule)
    for round_ in range(8):
        edit = ROWS["append zeros" if round_ % 2 == 0 else "split"]
        edit = edit if len(p) == 6 else (lambda v: v[torch.arange(len(v)) % 2 == 0][:6])
        if len(p) not in (6, 10, 12):
            break
        state = optimizer.state[p]
        by_keys(state, edit, p)
        p = put(optimizer, p, edit(p.detach()), state)
        go_on(optimizer)


@pytest.mark.parametrize("loop", LOOPS)
def test_complex_and_bfloat16(loop: str) -> None:
    p = nn.Parameter(torch.randn(6, 3, dtype=torch.complex64))
    half, narrow = made((6, 3), state_dtype=torch.bfloat16)
    optimizer = NFNOptimizer([p], rule=RANKED)
    with pytest.warns(UserWarning, match="no forward pass"):
        go_on(optimizer, 2)
    for one, trained in ((p, optimizer), (half, narrow)):
        state = trained.state[one]
        LOOPS[loop](state, lambda v: torch.cat([v, torch.zeros(2, 3)]), one)  # promoted to float32 in one case
        new = put(trained, one, torch.cat([one.detach(), torch.ones(2, 3)]), state)
        go_on(trained)
        assert trained.state[new]["exp_avg"].dtype == (torch.complex64 if one is p else torch.bfloat16)
        assert trained.state[new]["step"] > 3


def test_rows_of_the_same_parameter_object() -> None:
    p, optimizer = made((6, 3))
    by_keys(optimizer.state[p], ROWS["prune"], p)
    p.data = p.data[MASK]
    go_on(optimizer)
    assert optimizer.state[p]["step"] == 5


def test_a_loop_meets_entries_of_the_shape_of_the_parameter_only() -> None:
    for shape in SHAPES.values():
        p, optimizer = made(shape)
        state = optimizer.state[p]
        assert {key for key, value in state.items() if value.shape != shape} == {"step"}
        assert set(state) == set(state.keys()) == dict(state).keys()
        assert not HIDDEN & set(state)
        assert state["step"].dim() == 0
        assert entries_of(state).keys() == optimizer.rule.init({"p": p})["p"].keys()


def test_hidden_entries_are_those_that_rules_do_not_keep_whole() -> None:
    param = {"p": torch.zeros(6, 3)}
    entries = {key for rule in (RANKED, pretrained.load()) for key in rule.init(param)["p"]}
    assert entries.difference(WHOLE) == HIDDEN


# ------------------------------------------------------------------------------------------------ Adam's entries edited


def adams(state: State, edit: Edit) -> None:
    """As the scripts of 3D Gaussian splatting have it."""
    state["exp_avg"] = edit(state["exp_avg"])
    state["exp_avg_sq"] = edit(state["exp_avg_sq"])


@pytest.mark.parametrize("rows", ["append zeros", "prune", "split"])
def test_editing_adams_entries_keeps_them_and_warns_once(rows: str) -> None:
    p, optimizer = made((6, 3))
    edit, seen = ROWS[rows], []
    for round_ in range(3):
        state = optimizer.state.get(p)
        adams(state, edit)
        kept = state["exp_avg"].clone()
        p = put(optimizer, p, edit(p.detach()), state)
        p.grad = torch.ones_like(p)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        seen += [w for w in caught if "was edited" in str(w.message)]
        assert torch.equal(optimizer.state[p]["exp_avg"], torch.lerp(kept, p.grad, 0.1))
        assert optimizer.state[p]["step"] == 4 + 3 * round_
        go_on(optimizer)
        edit = (lambda v: v) if rows != "append zeros" else edit
    assert len(seen) == 1
    assert seen[0].filename == __file__
    text = str(seen[0].message)
    for part in ("'0.0'", "exp_avg_slow", str(tuple(p.shape)) if rows != "append zeros" else "(10, 3)", "(6, 3)"):
        assert part in text


# --------------------------------------------------------------------------------------------------------- other edits


def strip(optimizer: NFNOptimizer, p: Tensor) -> None:
    optimizer.state[p] = {key: optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq")}


def rebuilt(kind: Callable[[Any], Any]) -> Callable[[NFNOptimizer, Tensor], None]:
    def edit(optimizer: NFNOptimizer, p: Tensor) -> None:
        optimizer.state[p] = kind((key, value) for key, value in optimizer.state[p].items())

    return edit


def converted(convert: Callable[[Tensor], Any], *keys: str) -> Callable[[NFNOptimizer, Tensor], None]:
    def edit(optimizer: NFNOptimizer, p: Tensor) -> None:
        for key, value in optimizer.state[p].items():
            if not keys or key in keys:
                optimizer.state[p][key] = convert(value)

    return edit


def whole(value: Any) -> Callable[[NFNOptimizer, Tensor], None]:
    return lambda optimizer, _: setattr(optimizer, "state", copy.deepcopy(value))


def without(*keys: str) -> Callable[[NFNOptimizer, Tensor], None]:
    return lambda optimizer, p: [optimizer.state[p].pop(key, None) for key in keys]  # type: ignore[return-value]


KEPT, AFRESH = True, False
EDITS: dict[str, tuple[Callable[[NFNOptimizer, Tensor], Any], bool, int | None, str]] = {
    # edit, whether Adam's moments are kept, steps after one more, what a warning says
    "stripped to Adam's entries": (strip, KEPT, 4, "expected exp_avg_slow .* found none"),
    "rebuilt as a dict": (rebuilt(dict), KEPT, 4, ""),
    "rebuilt in order": (rebuilt(OrderedDict), KEPT, 4, ""),
    "copied": (lambda o, p: o.state.update({p: copy.deepcopy(o.state[p])}), KEPT, 4, ""),
    "copied flatly": (lambda o, p: o.state.update({p: o.state[p].copy()}), KEPT, 4, ""),
    "pickled": (lambda o, p: o.state.update({p: pickle.loads(pickle.dumps(o.state[p]))}), KEPT, 4, ""),
    "cleared": (lambda o, _: o.state.clear(), AFRESH, 1, ""),
    "replaced": (whole(defaultdict(dict)), AFRESH, 1, ""),
    "replaced by a dict": (whole({}), AFRESH, 1, ""),
    "emptied": (lambda o, p: o.state[p].clear(), AFRESH, 1, ""),
    "emptied by a dict": (lambda o, p: o.state.update({p: {}}), AFRESH, 1, ""),
    "None": (lambda o, p: o.state.update({p: None}), AFRESH, 1, ""),
    "step 0": (lambda o, p: o.state[p]["step"].zero_(), KEPT, 1, ""),
    "step a number": (lambda o, p: o.state[p].update(step=7), KEPT, 8, ""),
    "step a float": (lambda o, p: o.state[p].update(step=7.0), KEPT, 8, ""),
    "step an integer tensor": (lambda o, p: o.state[p].update(step=torch.tensor(7)), KEPT, 8, ""),
    "step of one element": (lambda o, p: o.state[p].update(step=torch.tensor([7.0])), KEPT, 8, ""),
    "step in double": (lambda o, p: o.state[p].update(step=torch.tensor(7.0).double()), KEPT, 8, ""),
    "step missing": (without("step"), KEPT, 1, "expected step .* found none"),
    "step None": (lambda o, p: o.state[p].update(step=None), KEPT, 1, "expected step .* found none"),
    "step negative": (lambda o, p: o.state[p].update(step=-3), KEPT, 1, "expected step .* found -3"),
    "step NaN": (lambda o, p: o.state[p].update(step=torch.tensor(math.nan)), KEPT, 1, "expected step"),
    "step for every row": (lambda o, p: o.state[p].update(step=torch.ones(6)), KEPT, 1, r"expected step .* \(6,\)"),
    "slow moment missing": (without("exp_avg_slow"), KEPT, 4, "expected exp_avg_slow"),
    "slow moment a number": (lambda o, p: o.state[p].update(exp_avg_slow=0.0), KEPT, 4, "expected exp_avg_slow"),
    "first moment missing": (without("exp_avg"), AFRESH, 1, "expected exp_avg .* found none"),
    "first moment a word": (lambda o, p: o.state[p].update(exp_avg="zeros"), AFRESH, 1, "expected exp_avg .*'zeros'"),
    "second moment of rows": (
        lambda o, p: o.state[p].update(exp_avg_sq=torch.ones(6, 1)),
        AFRESH,
        1,
        r"expected exp_avg_sq .* \(6, 1\)",
    ),
    "only a step": (without("exp_avg", "exp_avg_sq", "exp_avg_slow"), AFRESH, 1, "expected exp_avg"),
    "moments of another shape": (converted(lambda v: v[:2], "exp_avg", "exp_avg_sq"), AFRESH, 1, "their shape"),
    "all in double": (converted(Tensor.double), KEPT, 4, ""),
    "one in double": (converted(Tensor.double, "exp_avg_sq"), KEPT, 4, ""),
    "all in half": (converted(Tensor.bfloat16), KEPT, 4, ""),
    "first moment in half": (converted(Tensor.half, "exp_avg"), KEPT, 4, ""),
    "arrays": (converted(lambda v: v.numpy()), AFRESH, 1, "expected exp_avg"),
    "with gradients": (converted(lambda v: v.clone().requires_grad_()), KEPT, 4, ""),
    "parameters": (converted(nn.Parameter, "exp_avg"), KEPT, 4, ""),
    "expanded": (converted(lambda v: torch.zeros(1).expand_as(v), "exp_avg_slow"), KEPT, 4, ""),
    "transposed": (converted(lambda v: v.mT.contiguous().mT if v.dim() > 1 else v), KEPT, 4, ""),
    "resized": (lambda o, p: o.state[p]["exp_avg_slow"].resize_(2, 3), KEPT, 4, r"expected exp_avg_slow .*\(2, 3\)"),
    "a part of data": (
        lambda o, p: setattr(o.state[p]["exp_avg"], "data", torch.zeros(2, 3)),
        AFRESH,
        1,
        "their shape",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_edits(what: str) -> None:
    edit, kept, steps, says = EDITS[what]
    p, optimizer = made((6, 3))
    before = optimizer.state[p]["exp_avg_sq"].clone()
    edit(optimizer, p)
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert len(caught) == (1 if says else 0), [str(w.message) for w in caught]
    if says:
        assert caught[0].filename == __file__
        assert re.search(says, str(caught[0].message))
    expected = torch.addcmul((before if kept else before.zero_()) * 0.999, p.grad, p.grad, value=0.001)
    precision = 1e-2 if "half" in what else 1e-6
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], expected, rtol=precision, atol=1e-9)
    assert optimizer.state[p]["step"] == steps
    assert optimizer.state[p]["step"].shape == ()
    assert {x.dtype for x in entries_of(optimizer.state[p]).values()} == {torch.float32}
    go_on(optimizer)
    copied = copy.deepcopy(optimizer)
    copied.load_state_dict(through_file(optimizer.state_dict()))
    assert same(snapshot(copied), snapshot(optimizer))


OTHER_VALUES = {"all in half", "first moment in half", "expanded"}
MOVED = [what for what, (_, kept, steps, says) in EDITS.items() if kept and steps == 4 and not says]


@pytest.mark.parametrize("what", [what for what in MOVED if what not in OTHER_VALUES])
def test_where_nothing_is_lost_nothing_changes(what: str) -> None:
    """Hidden entries too, where the others were only moved."""
    one, other = made((6, 3)), made((6, 3))
    EDITS[what][0](other[1], other[0])
    go_on(one[1])
    go_on(other[1])
    assert torch.equal(one[0], other[0])
    assert same(snapshot(one[1]), snapshot(other[1]))


def test_the_monitor_bears_edits() -> None:
    p, optimizer = made((6, 3))
    with watch(optimizer, ScalarRecorder(), every=1):
        state = optimizer.state[p]
        by_keys(state, ROWS["append zeros"], p)
        p = put(optimizer, p, ROWS["append zeros"](p.detach()), state)
        go_on(optimizer)
        optimizer.state[p] = {}
        go_on(optimizer)
        p = put(optimizer, p, p[:4], optimizer.state[p])
        with pytest.warns(UserWarning, match="changed their shape"):
            go_on(optimizer, 1)


def test_only_one_parameter_of_a_network_is_edited() -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=RANKED)
    train(model, optimizer)
    optimizer.state[model[0].weight] = {}
    del optimizer.state[model[0].bias]["exp_avg_slow"]
    del optimizer.state[model[2].bias]["step"]
    backward(model, optimizer)
    with pytest.warns(UserWarning, match=r"\['0.bias', '2.bias'\] was edited") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [1, 4, 4, 1]
    train(model, optimizer)


def test_a_state_without_gradients_is_left_alone() -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=RANKED)
    train(model, optimizer)
    foreign: State = {"exp_avg": torch.zeros(2)}
    model[0].requires_grad_(False)
    optimizer.state[model[0].weight] = foreign
    train(model, optimizer)
    assert optimizer.state[model[0].weight] is foreign


# ---------------------------------------------------------------------------------------------------- saving and copies


def test_saved_states_are_complete_and_plain() -> None:
    p, optimizer = made((6, 3))
    saved = optimizer.state_dict()["state"][0]
    assert type(saved) is dict
    assert saved.keys() == optimizer.rule.init({"p": p})["p"].keys()
    assert saved["exp_avg"] is optimizer.state[p]["exp_avg"]
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(set(state["state"][0])))
    optimizer.state_dict()
    assert seen == [set(saved)]


def test_a_state_put_in_place_of_another_is_read_in_full() -> None:
    """As ZeroRedundancyOptimizer does: it moves each saved state into `state[p]`, counters to the CPU."""
    p, optimizer = made((6, 3))
    q, other = made((6, 3), steps=0)
    with torch.no_grad():
        q.copy_(p)
    other.state[q] = copy.deepcopy(optimizer.state_dict()["state"][0])
    other.param_groups[0]["steps_taken"] = optimizer.param_groups[0]["steps_taken"]
    go_on(optimizer)
    with pytest.warns(UserWarning, match="no forward pass"):
        go_on(other)
    assert same(snapshot(optimizer), snapshot(other))
    assert isinstance(other.state[q], ParamState)


def test_another_rules_state_is_met_by_loops_too() -> None:
    p, optimizer = made((6, 3))
    q, other = made((6, 3), "adamw")
    other.load_state_dict(optimizer.state_dict())
    by_keys(other.state[q], ROWS["prune"], q)
    new = put(other, q, q[MASK], other.state[q])
    go_on(other)
    assert torch.equal(other.state[new]["exp_avg_slow"], optimizer.state[p]["exp_avg_slow"][MASK])
