"""The monitor: its values are right, it changes nothing, and TensorBoard serves and draws its charts."""

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
from rules import random_rule
from scalar_recorder import ScalarRecorder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from zoo import ZOO, Network

from nfn_optim import NFNOptimizer, UpdateRule, pretrained, watch
from nfn_optim.monitor import grouping, sampling
from nfn_optim.rule.step_size import MAX_LOG_GAIN

X = torch.linspace(-1, 1, 20).reshape(5, 4)
QUANTITIES = ("update_over_weight", "gain", "cosine", "learned_over_nominal", "gradient_norm", "first_moment_norm",
              "second_moment_norm", "fallbacks")  # fmt: skip


def net() -> nn.Sequential:
    """One hidden layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def gains_only() -> UpdateRule:
    """A random rule with Adam's direction and a different gain for every row and tensor."""
    rule = random_rule(0.5)
    with torch.no_grad():
        for head in (*rule.network.message_passing.row_head.values(), rule.network.message_passing.tensor_head):
            for value in head.parameters():
                value[:-1] = 0.0
        rule.network.message_passing.tensor_bias[:-1] = 0.0
    return rule


def constant_rule(channel: int, value: float) -> UpdateRule:
    """A rule with one constant coefficient, the same for all tensors."""
    rule = UpdateRule()
    with torch.no_grad():
        rule.network.message_passing.tensor_bias[channel] = value
    return rule


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Tensor = X) -> None:
    """Train for some steps."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


# ----------------------------------------------------------------------------------------------- values are right

EXPECTED: dict[str, tuple[UpdateRule, dict[str, float]]] = {
    "AdamW": (UpdateRule.adamw(), {"cosine": 1.0, "gain": 1.0, "learned_over_nominal": 0.0}),
    "AdamW by a rule": (UpdateRule(), {"cosine": 1.0, "gain": 1.0, "learned_over_nominal": 0.0}),
    "twice AdamW": (
        constant_rule(-1, MAX_LOG_GAIN * math.atanh(math.log(2) / MAX_LOG_GAIN)),
        {"cosine": 1.0, "gain": 2.0, "learned_over_nominal": 0.0},
    ),
    "1.5 times Adam's direction": (constant_rule(0, 0.5), {"cosine": 1.0, "gain": 1.0, "learned_over_nominal": 0.5}),
    "the opposite direction": (constant_rule(0, -3.0), {"cosine": -1.0, "gain": 1.0, "learned_over_nominal": 3.0}),
}


@pytest.mark.parametrize("case", EXPECTED)
@pytest.mark.parametrize("maximize", [False, True])
def test_known_rules_have_known_values(case: str, maximize: bool) -> None:
    rule, expected = EXPECTED[case]
    model, recorder = net().double(), ScalarRecorder()
    optimizer = NFNOptimizer(model, rule=rule, lr=0.01, maximize=maximize, total_steps=5)
    with watch(optimizer, recorder, every=1):
        train(model, optimizer, 3, X.double())
    for quantity, value in expected.items():
        for group in ("all", "0.weight", "2.bias"):
            assert recorder.last(quantity, group) == pytest.approx(value, abs=1e-6), (quantity, group)


@pytest.mark.parametrize("network", ZOO, ids=lambda network: network.name)
def test_the_gain_of_every_weight_is_right(network: Network) -> None:
    """Divided by its gain, the update is Adam's direction, whatever axes the tensors have."""
    model, inputs = network.module().double(), [x.double() if x.is_floating_point() else x for x in network.inputs()]
    optimizer, recorder = NFNOptimizer(model, rule=gains_only(), lr=1e-3, weight_decay=0.1), ScalarRecorder()
    with watch(optimizer, recorder, every=1):
        for _ in range(2):
            optimizer.zero_grad()
            out = model(*inputs)
            (out[0] if isinstance(out, tuple) else out).square().sum().backward()
            optimizer.step()
    assert recorder.last("learned_over_nominal") < 1e-6
    assert recorder.last("gain") != pytest.approx(1.0, abs=1e-3)
    assert recorder.last("cosine") < 1.0 - 1e-9


def test_updates_and_norms_match_the_tensors() -> None:
    model, recorder = net(), ScalarRecorder()
    optimizer = NFNOptimizer(model, rule=random_rule())
    train(model, optimizer, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with watch(optimizer, recorder, every=1):
        train(model, optimizer, 1)
    for group in ("0.weight", "0.bias", "2.weight", "2.bias", "all"):
        names = [group] if group != "all" else list(before)
        params = dict(model.named_parameters())
        old = torch.cat([before[n].flatten() for n in names])
        new = torch.cat([params[n].detach().flatten() for n in names])
        state = [optimizer.state[params[n]] for n in names]
        grads = torch.cat([p.grad.flatten() for n in names if (p := params[n]).grad is not None])
        assert recorder.last("update_over_weight", group) == pytest.approx(
            ((new - old).norm() / old.norm()).item(), rel=1e-4
        )
        assert recorder.last("gradient_norm", group) == pytest.approx(grads.norm().item(), rel=1e-5)
        m = torch.cat([s["exp_avg"].flatten() for s in state])
        v = torch.cat([s["exp_avg_sq"].flatten() for s in state])
        assert recorder.last("first_moment_norm", group) == pytest.approx(m.norm().item(), rel=1e-5)
        assert recorder.last("second_moment_norm", group) == pytest.approx(v.sum().sqrt().item(), rel=1e-5)


def test_the_cosine_is_to_the_update_of_adamw() -> None:
    model, recorder = net().double(), ScalarRecorder()
    optimizer = NFNOptimizer(model, rule=random_rule(), lr=0.01, weight_decay=0.3)
    train(model, optimizer, 4, X.double())
    adamw_model = copy.deepcopy(model)
    adamw = torch.optim.AdamW(adamw_model.parameters(), lr=0.01, weight_decay=0.3)
    keys = ("step", "exp_avg", "exp_avg_sq")
    for p, q in zip(model.parameters(), adamw_model.parameters(), strict=True):
        adamw.state[q] = {key: optimizer.state[p][key].clone() for key in keys}
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with watch(optimizer, recorder, every=1):
        train(model, optimizer, 1, X.double())
    train(adamw_model, adamw, 1, X.double())
    steps = [torch.cat([p.detach().flatten() for p in m.parameters()]) - before for m in (model, adamw_model)]
    assert recorder.last("cosine") == pytest.approx(torch.cosine_similarity(*steps, dim=0).item(), abs=1e-6)
    assert abs(recorder.last("cosine")) < 0.999


def test_neuron_gains_are_written_by_axis(tmp_path: Path) -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=gains_only())
    with SummaryWriter(str(tmp_path)) as writer, watch(optimizer, writer, every=1):
        train(model, optimizer, 2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["histograms"] == ["optimizer.log2_gain/0.weight.h0"]
    histogram = events.Histograms("optimizer.log2_gain/0.weight.h0")[-1].histogram_value
    assert histogram.num == 6  # neurons
    assert sum(histogram.bucket) == 6
    assert histogram.min < histogram.sum / 6 < histogram.max


def test_a_sample_agrees_with_all_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_values(max_entries: int) -> dict[str, float]:
        monkeypatch.setattr(sampling, "MAX_ENTRIES", max_entries)
        torch.manual_seed(0)
        model, recorder = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)), ScalarRecorder()
        optimizer = NFNOptimizer(model, rule=random_rule(0.1))
        with watch(optimizer, recorder, every=1):
            train(model, optimizer, 3, torch.randn(32, 64))
        return {quantity: recorder.last(quantity) for quantity in QUANTITIES}

    sampled, exact = last_values(2048), last_values(10**6)
    assert sampled != exact
    assert sampled == pytest.approx(exact, rel=0.05)


# ------------------------------------------------------------------------------------------------- nothing is changed


def test_training_is_the_same_to_the_last_bit() -> None:
    trained = []
    for watched in (False, True):
        model = net()
        optimizer = NFNOptimizer(model, rule=random_rule())
        torch.manual_seed(1)
        if watched:
            watch(optimizer, ScalarRecorder(), every=2)
        train(model, optimizer, 5)
        trained.append([*(p.detach() for p in model.parameters()), torch.rand(3)])
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))


def test_other_steps_are_only_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    take = sampling.Sample.take
    monkeypatch.setattr(sampling.Sample, "take", lambda self, tensors: calls.append(1) or take(self, tensors))
    model, recorder = net(), ScalarRecorder()
    optimizer = NFNOptimizer(model, rule=random_rule())
    with watch(optimizer, recorder, every=4):
        counts = []
        for _ in range(9):
            train(model, optimizer, 1)
            counts.append(len(calls))
    assert np.flatnonzero(np.diff([0, *counts])).tolist() == [0, 3, 7]  # steps 1, 4 and 8
    assert [step for step, _ in recorder.scalars["optimizer.cosine/all"]] == [1, 4, 8]


def hooks_of(optimizer: NFNOptimizer) -> int:
    """Number of forward hooks in the rule and of step hooks of the optimizer."""
    forward = sum(len(module._forward_hooks) for module in optimizer.rule.modules())
    return forward + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_no_hook_is_left_behind() -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=random_rule())
    observer = watch(optimizer, ScalarRecorder(), every=1)
    train(model, optimizer, 2)
    assert hooks_of(optimizer) == 2
    model[0].weight.grad = torch.zeros(6, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    train(model, optimizer, 1)
    assert hooks_of(optimizer) == 2
    observer.remove()
    observer.close()
    assert hooks_of(optimizer) == 0
    assert not optimizer._optimizer_load_state_dict_post_hooks


COPIES: dict[str, Callable[[NFNOptimizer], NFNOptimizer]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_is_not_watched(make: Callable[[NFNOptimizer], NFNOptimizer]) -> None:
    model, recorder = net(), ScalarRecorder()
    optimizer = NFNOptimizer(model, rule=random_rule())
    with watch(optimizer, recorder, every=1):
        train(model, optimizer, 1)
        twin = make(optimizer)
        assert hooks_of(twin) == 0
        for group in twin.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        twin.step()
        train(model, optimizer, 1)
    assert [step for step, _ in recorder.scalars["optimizer.cosine/all"]] == [1, 2]


# -------------------------------------------------------------------------------------------- however it is used


def test_bare_groups_and_their_learning_rates() -> None:
    model, recorder = net(), ScalarRecorder()
    groups = [{"params": [model[0].weight, model[2].weight], "lr": 0.01}, {"params": [model[0].bias, model[2].bias]}]
    optimizer = NFNOptimizer(groups, rule=UpdateRule())
    with watch(optimizer, recorder, every=1):
        train(model, optimizer, 2)
    assert recorder.last("lr", "group0") == 0.01
    assert recorder.last("lr", "group1") == 0.001
    for name, _ in model.named_parameters():  # the module was found, and gives the names
        assert recorder.last("cosine", name) == pytest.approx(1.0, abs=1e-5)


def test_an_unknown_symmetry() -> None:
    params, recorder = [torch.randn(3, 2).requires_grad_(), torch.randn(3).requires_grad_()], ScalarRecorder()
    optimizer = NFNOptimizer(params, rule=gains_only())
    with watch(optimizer, recorder, every=1), pytest.warns(UserWarning, match="no forward pass"):
        (params[0].sum() * params[1].square().sum()).backward()
        optimizer.step()
    assert recorder.last("learned_over_nominal", "0.0") < 1e-4


def test_parameters_without_gradients_empty_ones_and_scalars() -> None:
    model, recorder = net(), ScalarRecorder()
    model[0].bias.requires_grad_(False)
    others = [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(2.0))]
    optimizer = NFNOptimizer([*model.parameters(), *others], rule=random_rule(), model=model)
    with watch(optimizer, recorder, every=1):
        optimizer.zero_grad()
        (model(X).square().mean() * others[1]).backward()
        optimizer.step()
    assert "optimizer.cosine/0.weight" in recorder.scalars
    assert "optimizer.gradient_norm/0.bias" not in recorder.scalars
    assert recorder.last("update_over_weight", "0.5") > 0  # the scalar
    assert recorder.last("gradient_norm", "0.5") == pytest.approx(abs(others[1].grad.item()))  # type: ignore[union-attr]


def test_of_a_skipped_step_only_the_count_is_written() -> None:
    model, recorder = net(), ScalarRecorder()
    optimizer = NFNOptimizer(model, rule=random_rule())
    with watch(optimizer, recorder, every=1):
        train(model, optimizer, 1)
        model[0].weight.grad.fill_(float("nan"))  # type: ignore[union-attr]
        optimizer.step()
        train(model, optimizer, 1)
    assert recorder.scalars["optimizer.steps/skipped"] == [(1, 0.0), (2, 1.0), (3, 1.0)]
    assert [step for step, _ in recorder.scalars["optimizer.cosine/all"]] == [1, 3]
    assert all(math.isfinite(value) for values in recorder.scalars.values() for _, value in values)


def test_fallbacks_are_written_by_tensor() -> None:
    model, recorder = net(), ScalarRecorder()
    optimizer = NFNOptimizer(model, rule=constant_rule(0, 1e3))
    with watch(optimizer, recorder, every=1):
        train(model, optimizer, 2)
    assert recorder.last("fallbacks") == 8
    assert recorder.last("fallbacks", "0.weight") == 2
    assert recorder.last("learned_over_nominal") == pytest.approx(0.0, abs=1e-3)
    assert recorder.last("cosine") == pytest.approx(1.0, abs=1e-5)


def test_a_learning_rate_of_zero_and_low_precision() -> None:
    model, recorder = net().bfloat16(), ScalarRecorder()
    optimizer = NFNOptimizer(model, rule=random_rule(), lr=0.0)
    with watch(optimizer, recorder, every=1):
        train(model, optimizer, 1, X.bfloat16())
        assert recorder.last("update_over_weight") == 0.0
        assert "optimizer.cosine/all" not in recorder.scalars
        optimizer.param_groups[0]["lr"] = 0.1
        train(model, optimizer, 1, X.bfloat16())
    assert recorder.last("update_over_weight") > 0.0
    assert "optimizer.learned_over_nominal/all" not in recorder.scalars  # mostly rounding


def test_the_time_of_a_closure_is_not_the_optimizers() -> None:
    """As in Lightning: forward and backward inside of `step`."""
    model, recorder = net(), ScalarRecorder()
    optimizer = NFNOptimizer(model.parameters(), rule=random_rule())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(X).square().mean()
        loss.backward()
        time.sleep(0.05)
        return loss

    with watch(optimizer, recorder, every=1):
        assert all(isinstance(step, Tensor) for step in (optimizer.step(closure), optimizer.step(closure=closure)))  # type: ignore[call-overload]
    assert recorder.last("seconds", "training_step") >= recorder.last("seconds", "optimizer_step") + 0.05
    assert 0 < recorder.last("share_of_time", "optimizer") < 1
    assert len(recorder.scalars["optimizer.cosine/all"]) == 2


def test_wrapped_and_scheduled() -> None:
    """As in accelerate: the optimizer inside of a wrapper, and `step` replaced by a scheduler."""

    class Wrapped:
        def __init__(self, optimizer: NFNOptimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            self.optimizer.step()

    model, recorder = net(), ScalarRecorder()
    optimizer = NFNOptimizer(model.parameters(), rule=random_rule())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=4)
    wrapped = Wrapped(optimizer)
    with watch(wrapped, recorder, every=1):  # type: ignore[arg-type]
        for _ in range(3):
            model(X).sum().backward()
            wrapped.step()
            schedule.step()
    assert [value for _, value in recorder.scalars["optimizer.lr/group0"]] == pytest.approx([5e-4, 6.25e-4, 7.5e-4])


def test_a_resumed_run_continues_the_count() -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=random_rule())
    train(model, optimizer, 7)
    recorder, fresh = ScalarRecorder(), NFNOptimizer(model, rule=random_rule())
    observer = watch(fresh, recorder, every=5)
    fresh.load_state_dict(optimizer.state_dict())
    train(model, fresh, 4)
    assert observer.step == 11
    assert [step for step, _ in recorder.scalars["optimizer.cosine/all"]] == [8, 10]


def test_two_optimizers_on_one_writer(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for name in ("generator", "critic"):
            model = net()
            optimizer = NFNOptimizer(model, rule=random_rule())
            with watch(optimizer, writer, every=1, name=name):
                train(model, optimizer, 1)
    layout = layout_in(tmp_path)
    assert [category.title for category in layout.category] == ["generator: the network", "critic: the network"]


def test_a_parameter_group_added_later_is_written() -> None:
    model, more, recorder = net(), nn.Linear(3, 3), ScalarRecorder()
    whole = nn.Sequential(model, more)
    optimizer = NFNOptimizer(model, rule=random_rule())
    with watch(optimizer, recorder, every=1) as observer:
        train(model, optimizer, 1)
        layout = observer.layout
        optimizer.add_param_group({"params": list(more.parameters()), "lr": 0.5})
        train(whole, optimizer, 1)
    assert recorder.last("lr", "group1") == 0.5
    assert layout != observer.layout


@pytest.mark.parametrize(
    ("optimizer", "writer", "every", "error", "message"),
    [
        ("AdamW", ScalarRecorder(), 1, TypeError, "wrapper around one, found AdamW"),
        ("NFN", object(), 1, TypeError, "add_scalar"),
        ("NFN", ScalarRecorder(), 0, ValueError, "every >= 1"),
    ],
)
def test_wrong_arguments_raise(
    optimizer: str, writer: object, every: int, error: type[Exception], message: str
) -> None:
    model = net()
    made = NFNOptimizer(model) if optimizer == "NFN" else torch.optim.AdamW(model.parameters())
    with pytest.raises(error, match=message):
        watch(made, writer, every=every)


def test_the_example_in_the_docs_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "monitoring.md").read_text()
    scope: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], scope)
    events = EventAccumulator(scope["folder"]).Reload()
    assert [event.step for event in events.Scalars("optimizer.gain/all")] == [1, 50, 100]
    assert events.Scalars("optimizer.final/loss")[0].value == pytest.approx(scope["loss"].item())


# -------------------------------------------------------------------------------------------------- charts and text

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
def test_charts_are_small_and_every_tensor_has_a_group(names: list[str]) -> None:
    parts = grouping.parts_of(names)
    assert [name for part in parts.values() for name in part] == names
    assert len(parts) <= grouping.MAX_CURVES
    for part in parts.values():
        groups = grouping.groups_of(part)
        assert sorted(name for group in groups.values() for name in group) == sorted(part)
        assert len(groups) <= grouping.MAX_CURVES
    written = grouping.all_groups(names)
    assert written[grouping.WHOLE_NETWORK] == tuple(names)
    assert len(written) <= 3 * grouping.MAX_SINGLE_TENSORS
    if len(names) <= grouping.MAX_SINGLE_TENSORS:
        assert all(written[name] == (name,) for name in names)


def test_repeated_blocks_are_merged() -> None:
    parts = grouping.parts_of(NAMES["ViT"])
    assert list(parts) == ["cls", "pos", "blocks.0-5", "blocks.6-11", "norm", "head"]
    assert list(grouping.groups_of(parts["blocks.6-11"])) == [f"blocks.6-11.{module}" for module in VIT_MODULES]


def layout_in(folder: Path) -> Layout:
    """The layout written last."""
    events = EventAccumulator(str(folder)).Reload()
    found = Layout()
    found.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a network with a part of several tensors."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))), nn.Linear(6, 3))
    optimizer = NFNOptimizer(model, total_steps=40)
    with SummaryWriter(str(folder)) as writer:
        observer = watch(optimizer, writer, every=4)
        train(model, optimizer, 20)
        observer.close(accuracy=0.5)
    return folder


def test_every_chart_has_curves_and_every_curve_values(run: Path) -> None:
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()["scalars"]
    layout = layout_in(run)
    assert [category.title for category in layout.category] == [
        "optimizer: the network", "optimizer: 0", "optimizer: 1.0", "optimizer: 1.1", "optimizer: 1.2",
        "optimizer: 1.3", "optimizer: 2"]  # fmt: skip
    for category in layout.category:
        assert 6 <= len(category.chart) <= 12  # fits on one page
        for chart in category.chart:
            assert 1 <= len(chart.multiline.tag) <= grouping.MAX_CURVES
            for pattern in chart.multiline.tag:
                assert [tag for tag in tags if re.match(pattern, tag)] != [], pattern
    for quantity in QUANTITIES:
        assert [event.step for event in events.Scalars(f"optimizer.{quantity}/all")] == [1, 4, 8, 12, 16, 20]


def test_the_text_has_the_rule_and_the_symmetry(run: Path) -> None:
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
    """The address of a TensorBoard that serves the run."""
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
    """The server's answer, from JSON."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_tensorboard_serves_charts_and_curves(server: str) -> None:
    layout = ask(f"{server}/data/plugin/custom_scalars/layout")
    charts = layout["category"][0]["chart"]
    assert [chart["title"] for chart in charts][:3] == [
        "update / weight (RMS)", "gain (1: as AdamW)", "cosine to AdamW's update"]  # fmt: skip
    for chart in charts:
        for pattern in chart["multiline"]["tag"]:
            query = urllib.parse.urlencode({"run": ".", "tag": pattern})
            found = ask(f"{server}/data/plugin/custom_scalars/scalars?{query}")
            assert len(found["tag_to_events"]) == 1


@pytest.mark.slow
def test_tensorboard_serves_hyperparameters_and_results(server: str) -> None:
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
"""  # title and number of curves of every chart on the page


@pytest.mark.slow
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
        while time.monotonic() < until and not (len(drawn) >= len(expected) and all(curves for _, curves in drawn)):
            time.sleep(0.5)
            drawn = page.execute_script(CHARTS)
    assert [title for title, _ in drawn][: len(expected)] == list(expected)
    for (title, count), curves in zip(drawn, expected.values(), strict=False):
        assert count >= curves, title
