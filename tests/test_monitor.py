"""Watching shows what happened, changes nothing, and is there for whoever opens TensorBoard."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from zoo import ZOO, Network

from nfn_optim import NFNOptimizer, UpdateRule, pretrained, watch
from nfn_optim.monitor import grouping, sampling
from nfn_optim.rule import RuleConfig
from nfn_optim.rule.gains import GAIN_RANGE

X = torch.linspace(-1, 1, 20).reshape(5, 4)
QUANTITIES = ("update_over_weight", "gain", "cosine", "learned_over_nominal", "gradient_norm", "first_moment_norm",
              "second_moment_norm", "fallbacks")  # fmt: skip


class Notes:
    """A writer that has nothing but `add_scalar`, and remembers what it was given."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.found.setdefault(tag, []).append((step, value))

    def last(self, word: str, line: str = "all", name: str = "optimizer") -> float:
        return self.found[f"{name}.{word}/{line}"][-1][1]


def net() -> nn.Sequential:
    """One hidden layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def random_rule(scale: float = 0.2, config: RuleConfig | None = None) -> UpdateRule:
    """A rule of which nothing is zero."""
    generator, rule = torch.Generator().manual_seed(0), UpdateRule(config)
    with torch.no_grad():
        for value in rule.parameters():
            value.add_(scale * torch.randn(value.shape, generator=generator))
    return rule


def gains_only() -> UpdateRule:
    """A random rule that adds nothing to Adam's direction, and gives every row and tensor its own gain."""
    rule = random_rule(0.5)
    with torch.no_grad():
        for readout in (*rule.stack.read_rows.values(), rule.stack.read_tensors):
            for value in readout.parameters():
                value[:-1] = 0.0
    return rule


def constant_rule(channel: int, value: float) -> UpdateRule:
    """A rule that says the same to all tensors, in one channel."""
    rule = UpdateRule()
    with torch.no_grad():
        rule.stack.read_tensors.bias[channel] = value
    return rule


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Tensor = X) -> None:
    """Some steps."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


# ----------------------------------------------------------------------------------------------- what is shown is true

TRUTHS: dict[str, tuple[UpdateRule, dict[str, float]]] = {
    "AdamW": (UpdateRule.nominal(), {"cosine": 1.0, "gain": 1.0, "learned_over_nominal": 0.0}),
    "AdamW by a rule": (UpdateRule(), {"cosine": 1.0, "gain": 1.0, "learned_over_nominal": 0.0}),
    "twice AdamW": (
        constant_rule(-1, GAIN_RANGE * math.atanh(math.log(2) / GAIN_RANGE)),
        {"cosine": 1.0, "gain": 2.0, "learned_over_nominal": 0.0},
    ),
    "half as much again": (constant_rule(0, 0.5), {"cosine": 1.0, "gain": 1.0, "learned_over_nominal": 0.5}),
    "the other way": (constant_rule(0, -3.0), {"cosine": -1.0, "gain": 1.0, "learned_over_nominal": 3.0}),
}


@pytest.mark.parametrize("case", TRUTHS)
@pytest.mark.parametrize("maximize", [False, True])
def test_what_is_known_of_a_rule_is_shown(case: str, maximize: bool) -> None:
    rule, expected = TRUTHS[case]
    model, notes = net().double(), Notes()
    optimizer = NFNOptimizer(model, rule=rule, lr=0.01, maximize=maximize, total_steps=5)
    with watch(optimizer, notes, every=1):
        train(model, optimizer, 3, X.double())
    for word, value in expected.items():
        for line in ("all", "0.weight", "2.bias"):
            assert notes.last(word, line) == pytest.approx(value, abs=1e-6), (word, line)


@pytest.mark.parametrize("network", ZOO, ids=lambda network: network.name)
def test_the_gain_of_every_weight_is_heard(network: Network) -> None:
    """With the gain divided out nothing but Adam's direction is left, whatever axes the tensors have."""
    model, inputs = network.module().double(), [x.double() if x.is_floating_point() else x for x in network.inputs()]
    optimizer, notes = NFNOptimizer(model, rule=gains_only(), lr=1e-3, weight_decay=0.1), Notes()
    with watch(optimizer, notes, every=1):
        for _ in range(2):
            optimizer.zero_grad()
            out = model(*inputs)
            (out[0] if isinstance(out, tuple) else out).square().sum().backward()
            optimizer.step()
    assert notes.last("learned_over_nominal") < 1e-6
    assert notes.last("gain") != pytest.approx(1.0, abs=1e-3)
    assert notes.last("cosine") < 1.0 - 1e-9


def test_updates_and_norms_are_those_of_the_tensors() -> None:
    model, notes = net(), Notes()
    optimizer = NFNOptimizer(model, rule=random_rule())
    train(model, optimizer, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with watch(optimizer, notes, every=1):
        train(model, optimizer, 1)
    for line in ("0.weight", "0.bias", "2.weight", "2.bias", "all"):
        names = [line] if line != "all" else list(before)
        params = dict(model.named_parameters())
        old = torch.cat([before[n].flatten() for n in names])
        new = torch.cat([params[n].detach().flatten() for n in names])
        state = [optimizer.state[params[n]] for n in names]
        grads = torch.cat([p.grad.flatten() for n in names if (p := params[n]).grad is not None])
        assert notes.last("update_over_weight", line) == pytest.approx(
            ((new - old).norm() / old.norm()).item(), rel=1e-4
        )
        assert notes.last("gradient_norm", line) == pytest.approx(grads.norm().item(), rel=1e-5)
        m = torch.cat([s["exp_avg"].flatten() for s in state])
        v = torch.cat([s["exp_avg_sq"].flatten() for s in state])
        assert notes.last("first_moment_norm", line) == pytest.approx(m.norm().item(), rel=1e-5)
        assert notes.last("second_moment_norm", line) == pytest.approx(v.sum().sqrt().item(), rel=1e-5)


def test_the_cosine_is_to_what_adamw_does() -> None:
    model, notes = net().double(), Notes()
    optimizer = NFNOptimizer(model, rule=random_rule(), lr=0.01, weight_decay=0.3)
    train(model, optimizer, 4, X.double())
    adamw_model = copy.deepcopy(model)
    adamw = torch.optim.AdamW(adamw_model.parameters(), lr=0.01, weight_decay=0.3)
    keys = ("step", "exp_avg", "exp_avg_sq")
    for p, q in zip(model.parameters(), adamw_model.parameters(), strict=True):
        adamw.state[q] = {key: optimizer.state[p][key].clone() for key in keys}
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with watch(optimizer, notes, every=1):
        train(model, optimizer, 1, X.double())
    train(adamw_model, adamw, 1, X.double())
    steps = [torch.cat([p.detach().flatten() for p in m.parameters()]) - before for m in (model, adamw_model)]
    assert notes.last("cosine") == pytest.approx(torch.cosine_similarity(*steps, dim=0).item(), abs=1e-6)
    assert abs(notes.last("cosine")) < 0.999


def test_neurons_are_shown_by_axis(tmp_path: Path) -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=gains_only())
    with SummaryWriter(str(tmp_path)) as writer, watch(optimizer, writer, every=1):
        train(model, optimizer, 2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["histograms"] == ["optimizer.log2_gain/0.weight.h0"]
    shown = events.Histograms("optimizer.log2_gain/0.weight.h0")[-1].histogram_value
    assert shown.num == 6  # neurons
    assert sum(shown.bucket) == 6
    assert shown.min < shown.sum / 6 < shown.max


def test_a_sample_tells_what_all_entries_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(most: int) -> dict[str, float]:
        monkeypatch.setattr(sampling, "MOST", most)
        torch.manual_seed(0)
        model, notes = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)), Notes()
        optimizer = NFNOptimizer(model, rule=random_rule(0.1))
        with watch(optimizer, notes, every=1):
            train(model, optimizer, 3, torch.randn(32, 64))
        return {word: notes.last(word) for word in QUANTITIES}

    few, everything = shown(2048), shown(10**6)
    assert few != everything
    assert few == pytest.approx(everything, rel=0.05)


# ------------------------------------------------------------------------------------------------- nothing is changed


def test_training_is_the_same_to_the_last_bit() -> None:
    trained = []
    for watched in (False, True):
        model = net()
        optimizer = NFNOptimizer(model, rule=random_rule())
        torch.manual_seed(1)
        if watched:
            watch(optimizer, Notes(), every=2)
        train(model, optimizer, 5)
        trained.append([*(p.detach() for p in model.parameters()), torch.rand(3)])
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))


def test_between_looks_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    take = sampling.Sample.take
    monkeypatch.setattr(sampling.Sample, "take", lambda self, tensors: taken.append(1) or take(self, tensors))
    model, notes = net(), Notes()
    optimizer = NFNOptimizer(model, rule=random_rule())
    with watch(optimizer, notes, every=4):
        counts = []
        for _ in range(9):
            train(model, optimizer, 1)
            counts.append(len(taken))
    assert np.flatnonzero(np.diff([0, *counts])).tolist() == [0, 3, 7]  # steps 1, 4 and 8
    assert [step for step, _ in notes.found["optimizer.cosine/all"]] == [1, 4, 8]


def hooks_of(optimizer: NFNOptimizer) -> int:
    """Forward hooks in a rule, and hooks of the optimizer."""
    forward = sum(len(module._forward_hooks) for module in optimizer.rule.modules())
    return forward + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_no_hook_is_left_behind() -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=random_rule())
    watching = watch(optimizer, Notes(), every=1)
    train(model, optimizer, 2)
    assert hooks_of(optimizer) == 2
    model[0].weight.grad = torch.zeros(6, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    train(model, optimizer, 1)
    assert hooks_of(optimizer) == 2
    watching.remove()
    watching.close()
    assert hooks_of(optimizer) == 0
    assert not optimizer._optimizer_load_state_dict_post_hooks


COPIES: dict[str, Callable[[NFNOptimizer], NFNOptimizer]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_is_not_watched(make: Callable[[NFNOptimizer], NFNOptimizer]) -> None:
    model, notes = net(), Notes()
    optimizer = NFNOptimizer(model, rule=random_rule())
    with watch(optimizer, notes, every=1):
        train(model, optimizer, 1)
        twin = make(optimizer)
        assert hooks_of(twin) == 0
        for group in twin.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        twin.step()
        train(model, optimizer, 1)
    assert [step for step, _ in notes.found["optimizer.cosine/all"]] == [1, 2]


# -------------------------------------------------------------------------------------------- however it is used


def test_bare_groups_and_their_learning_rates() -> None:
    model, notes = net(), Notes()
    groups = [{"params": [model[0].weight, model[2].weight], "lr": 0.01}, {"params": [model[0].bias, model[2].bias]}]
    optimizer = NFNOptimizer(groups, rule=UpdateRule())
    with watch(optimizer, notes, every=1):
        train(model, optimizer, 2)
    assert notes.last("lr", "group0") == 0.01
    assert notes.last("lr", "group1") == 0.001
    for name, _ in model.named_parameters():  # the module was found, and gives the names
        assert notes.last("cosine", name) == pytest.approx(1.0, abs=1e-5)


def test_an_unknown_symmetry() -> None:
    params, notes = [torch.randn(3, 2).requires_grad_(), torch.randn(3).requires_grad_()], Notes()
    optimizer = NFNOptimizer(params, rule=gains_only())
    with watch(optimizer, notes, every=1), pytest.warns(UserWarning, match="no forward pass"):
        (params[0].sum() * params[1].square().sum()).backward()
        optimizer.step()
    assert notes.last("learned_over_nominal", "0.0") < 1e-4


def test_parameters_without_gradients_empty_ones_and_scalars() -> None:
    model, notes = net(), Notes()
    model[0].bias.requires_grad_(False)
    others = [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(2.0))]
    optimizer = NFNOptimizer([*model.parameters(), *others], rule=random_rule(), model=model)
    with watch(optimizer, notes, every=1):
        optimizer.zero_grad()
        (model(X).square().mean() * others[1]).backward()
        optimizer.step()
    assert "optimizer.cosine/0.weight" in notes.found
    assert "optimizer.gradient_norm/0.bias" not in notes.found
    assert notes.last("update_over_weight", "0.5") > 0  # the scalar
    assert notes.last("gradient_norm", "0.5") == pytest.approx(abs(others[1].grad.item()))  # type: ignore[union-attr]


def test_a_skipped_step_is_counted_and_nothing_else_is_shown() -> None:
    model, notes = net(), Notes()
    optimizer = NFNOptimizer(model, rule=random_rule())
    with watch(optimizer, notes, every=1):
        train(model, optimizer, 1)
        model[0].weight.grad.fill_(float("nan"))  # type: ignore[union-attr]
        optimizer.step()
        train(model, optimizer, 1)
    assert notes.found["optimizer.steps/skipped"] == [(1, 0.0), (2, 1.0), (3, 1.0)]
    assert [step for step, _ in notes.found["optimizer.cosine/all"]] == [1, 3]
    assert all(math.isfinite(value) for values in notes.found.values() for _, value in values)


def test_a_fallback_is_shown_where_it_happened() -> None:
    model, notes = net(), Notes()
    optimizer = NFNOptimizer(model, rule=constant_rule(0, 1e3))
    with watch(optimizer, notes, every=1):
        train(model, optimizer, 2)
    assert notes.last("fallbacks") == 8
    assert notes.last("fallbacks", "0.weight") == 2
    assert notes.last("learned_over_nominal") == pytest.approx(0.0, abs=1e-3)
    assert notes.last("cosine") == pytest.approx(1.0, abs=1e-5)


def test_a_learning_rate_of_zero_and_low_precision() -> None:
    model, notes = net().bfloat16(), Notes()
    optimizer = NFNOptimizer(model, rule=random_rule(), lr=0.0)
    with watch(optimizer, notes, every=1):
        train(model, optimizer, 1, X.bfloat16())
        assert notes.last("update_over_weight") == 0.0
        assert "optimizer.cosine/all" not in notes.found
        optimizer.param_groups[0]["lr"] = 0.1
        train(model, optimizer, 1, X.bfloat16())
    assert notes.last("update_over_weight") > 0.0
    assert "optimizer.learned_over_nominal/all" not in notes.found  # rounding hides it


def test_a_closure_is_not_counted_as_the_optimizer() -> None:
    """As Lightning does it: forward and backward inside of `step`."""
    model, notes = net(), Notes()
    optimizer = NFNOptimizer(model.parameters(), rule=random_rule())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(X).square().mean()
        loss.backward()
        time.sleep(0.05)
        return loss

    with watch(optimizer, notes, every=1):
        assert all(isinstance(step, Tensor) for step in (optimizer.step(closure), optimizer.step(closure=closure)))  # type: ignore[call-overload]
    assert notes.last("seconds", "training_step") >= notes.last("seconds", "optimizer_step") + 0.05
    assert 0 < notes.last("share_of_time", "optimizer") < 1
    assert len(notes.found["optimizer.cosine/all"]) == 2


def test_wrapped_and_scheduled() -> None:
    """As accelerate does it: the optimizer inside of another one, and `step` replaced by a scheduler."""

    class Wrapped:
        def __init__(self, optimizer: NFNOptimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            self.optimizer.step()

    model, notes = net(), Notes()
    optimizer = NFNOptimizer(model.parameters(), rule=random_rule())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=4)
    wrapped = Wrapped(optimizer)
    with watch(wrapped, notes, every=1):  # type: ignore[arg-type]
        for _ in range(3):
            model(X).sum().backward()
            wrapped.step()
            schedule.step()
    assert [value for _, value in notes.found["optimizer.lr/group0"]] == pytest.approx([5e-4, 6.25e-4, 7.5e-4])


def test_a_resumed_run_goes_on_counting() -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=random_rule())
    train(model, optimizer, 7)
    notes, fresh = Notes(), NFNOptimizer(model, rule=random_rule())
    watching = watch(fresh, notes, every=5)
    fresh.load_state_dict(optimizer.state_dict())
    train(model, fresh, 4)
    assert watching.step == 11
    assert [step for step, _ in notes.found["optimizer.cosine/all"]] == [8, 10]


def test_two_optimizers_on_one_writer(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for name in ("generator", "critic"):
            model = net()
            optimizer = NFNOptimizer(model, rule=random_rule())
            with watch(optimizer, writer, every=1, name=name):
                train(model, optimizer, 1)
    layout = layout_in(tmp_path)
    assert [category.title for category in layout.category] == ["generator: the network", "critic: the network"]


def test_a_group_added_later_is_shown() -> None:
    model, more, notes = net(), nn.Linear(3, 3), Notes()
    whole = nn.Sequential(model, more)
    optimizer = NFNOptimizer(model, rule=random_rule())
    with watch(optimizer, notes, every=1) as watching:
        train(model, optimizer, 1)
        few = watching.layout
        optimizer.add_param_group({"params": list(more.parameters()), "lr": 0.5})
        train(whole, optimizer, 1)
    assert notes.last("lr", "group1") == 0.5
    assert few != watching.layout


@pytest.mark.parametrize(
    ("optimizer", "writer", "every", "error", "message"),
    [
        ("AdamW", Notes(), 1, TypeError, "expected an NFNOptimizer, found AdamW"),
        ("NFN", object(), 1, TypeError, "add_scalar"),
        ("NFN", Notes(), 0, ValueError, "every >= 1"),
    ],
)
def test_what_cannot_be_watched(
    optimizer: str, writer: object, every: int, error: type[Exception], message: str
) -> None:
    model = net()
    made = NFNOptimizer(model) if optimizer == "NFN" else torch.optim.AdamW(model.parameters())
    with pytest.raises(error, match=message):
        watch(made, writer, every=every)


def test_the_page_about_it_is_true() -> None:
    page = (Path(__file__).parent.parent / "docs" / "monitoring.md").read_text()
    scope: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], scope)
    events = EventAccumulator(scope["folder"]).Reload()
    assert [event.step for event in events.Scalars("optimizer.gain/all")] == [1, 50, 100]
    assert events.Scalars("optimizer.final/loss")[0].value == pytest.approx(scope["loss"].item())


# -------------------------------------------------------------------------------------------------- charts and pages

VIT_MODULES = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.0", "mlp.2")
VIT_BLOCKS = [f"blocks.{k}.{module}.{w}" for k in range(12) for module in VIT_MODULES for w in ("weight", "bias")]
NAMES = {
    "MLP": [f"{k}.{w}" for k in (0, 2) for w in ("weight", "bias")],
    "ViT": ["cls", "pos", *VIT_BLOCKS, "norm.weight", "norm.bias", "head.weight", "head.bias"],
    "many layers": [f"{k}.{w}" for k in range(200) for w in ("weight", "bias")],
    "bare": [f"0.{k}" for k in range(100)],
    "flat": [f"p{k}" for k in range(50)],
    "deep": [".".join("abcdefgh"[:k]) + ".weight" for k in range(1, 9)],
    "one": ["weight"],
}  # fmt: skip


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_charts_have_room_and_every_tensor_a_line(names: list[str]) -> None:
    parts = grouping.parts_of(names)
    assert [name for part in parts.values() for name in part] == names
    assert len(parts) <= grouping.ROOM
    for part in parts.values():
        shown = grouping.lines_of(part)
        assert sorted(name for line in shown.values() for name in line) == sorted(part)
        assert len(shown) <= grouping.ROOM
    written = grouping.all_lines(names)
    assert written[grouping.WHOLE] == tuple(names)
    assert len(written) <= 3 * grouping.MANY
    if len(names) <= grouping.MANY:
        assert all(written[name] == (name,) for name in names)


def test_repeated_blocks_are_laid_on_top_of_each_other() -> None:
    parts = grouping.parts_of(NAMES["ViT"])
    assert list(parts) == ["cls", "pos", "blocks.0-5", "blocks.6-11", "norm", "head"]
    assert list(grouping.lines_of(parts["blocks.6-11"])) == [f"blocks.6-11.{module}" for module in VIT_MODULES]


def layout_in(folder: Path) -> Layout:
    """The layout that was written last."""
    events = EventAccumulator(str(folder)).Reload()
    found = Layout()
    found.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a network that has a part of several tensors."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))), nn.Linear(6, 3))
    optimizer = NFNOptimizer(model, total_steps=40)
    with SummaryWriter(str(folder)) as writer:
        watching = watch(optimizer, writer, every=4)
        train(model, optimizer, 20)
        watching.close(accuracy=0.5)
    return folder


def test_every_chart_has_lines_and_every_line_values(run: Path) -> None:
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()["scalars"]
    layout = layout_in(run)
    assert [category.title for category in layout.category] == [
        "optimizer: the network", "optimizer: 0", "optimizer: 1.0", "optimizer: 1.1", "optimizer: 1.2",
        "optimizer: 1.3", "optimizer: 2"]  # fmt: skip
    for category in layout.category:
        assert 6 <= len(category.chart) <= 12  # what fits on one page
        for chart in category.chart:
            assert 1 <= len(chart.multiline.tag) <= grouping.ROOM
            for pattern in chart.multiline.tag:
                assert [tag for tag in tags if re.match(pattern, tag)] != [], pattern
    for word in QUANTITIES:
        assert [event.step for event in events.Scalars(f"optimizer.{word}/all")] == [1, 4, 8, 12, 16, 20]


def test_the_text_says_which_rule_and_which_symmetry(run: Path) -> None:
    events = EventAccumulator(str(run)).Reload()

    def text(title: str) -> str:
        found: bytes = events.Tensors(f"optimizer.about/{title}/text_summary")[-1].tensor_proto.string_val[0]
        return found.decode()

    assert "| cosine to AdamW's update |" in text("1_how_to_read")
    assert pretrained.digest(pretrained.load())[:12] in text("2_rule")
    assert pretrained.card() in text("2_rule")
    assert "0.weight    h0 in0" in text("3_symmetry")


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows the run."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = (re.search(r"at (http://\S+?)/? ", line) for line in process.stderr)
            address = next(match[1] for match in found if match)
            until = time.monotonic() + 60
            while not ask(f"{address}/data/runs") and time.monotonic() < until:
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def ask(address: str, **body: object) -> Any:
    """What the server answers, from JSON."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_tensorboard_serves_charts_and_lines(server: str) -> None:
    layout = ask(f"{server}/data/plugin/custom_scalars/layout")
    charts = layout["category"][0]["chart"]
    assert [chart["title"] for chart in charts][:3] == [
        "update / weight (RMS)", "gain (1: as AdamW)", "cosine to AdamW's update"]  # fmt: skip
    for chart in charts:
        for pattern in chart["multiline"]["tag"]:
            query = urllib.parse.urlencode({"run": ".", "tag": pattern})
            found = ask(f"{server}/data/plugin/custom_scalars/scalars?{query}")
            assert len(found["tag_to_events"]) == 1


def test_tensorboard_serves_hyperparameters_and_what_came_of_them(server: str) -> None:
    query = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN"], "startIndex": 0,
             "sliceSize": 10, "colParams": []}  # fmt: skip
    sessions = ask(f"{server}/data/plugin/hparams/session_groups", **query)["sessionGroups"]
    assert len(sessions) == 1
    assert sessions[0]["hparams"]["rule"] == "default"
    assert sessions[0]["hparams"]["total_steps"] == 40
    metrics = {metric["name"]["tag"]: metric["value"] for metric in sessions[0]["metricValues"]}
    assert metrics["optimizer.final/accuracy"] == 0.5
    assert metrics["optimizer.final/fallbacks"] == 0


CHARTS = """
const children = node => [...(node.shadowRoot ? node.shadowRoot.children : []), ...node.children];
const inside = node => children(node).flatMap(child => [child, ...inside(child)]);
return inside(document.body).filter(one => one.tagName == "TF-CUSTOM-SCALAR-MULTI-LINE-CHART-CARD").map(card => {
    const title = inside(card).find(one => one.matches(".heading-label.name"));
    const lines = inside(card).filter(one => one.matches("path.line") && one.getAttribute("d"));
    return [title ? title.innerText : "", lines.length];
});
"""  # title and number of lines drawn of every chart on the page


def test_a_browser_draws_the_charts(server: str, run: Path, tmp_path: Path) -> None:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium and chromedriver here; on Debian: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                     "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                     "window-size=1400,1200", f"user-data-dir={tmp_path}"):  # fmt: skip
        options.add_argument(f"--{argument}")
    expected = {chart.title: len(chart.multiline.tag) for chart in layout_in(run).category[0].chart}
    drawn: list[tuple[str, int]] = []
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as page:
        page.get(f"{server}/#custom_scalars")
        until = time.monotonic() + 60
        while time.monotonic() < until and not (len(drawn) >= len(expected) and all(lines for _, lines in drawn)):
            time.sleep(0.5)
            drawn = page.execute_script(CHARTS)
    assert [title for title, _ in drawn][: len(expected)] == list(expected)
    for (title, count), lines_there in zip(drawn, expected.values(), strict=False):
        assert count >= lines_there, title
