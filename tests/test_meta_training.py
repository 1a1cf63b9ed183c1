"""Meta-training: a killed run resumes bit for bit, nothing bad gets into theta, and the best theta is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meta_train import checkpoint, theta_vector, trainer
from meta_train.config import Config
from meta_train.distributed import ALONE
from meta_train.meta_gradient import Estimate, Estimation
from meta_train.recipes import smoke
from meta_train.tasks import Task
from meta_train.unroll import Carry, start, unroll
from meta_train.validation import speed_of
from nfn_optim import RuleConfig, Symmetry, UpdateRule
from nfn_optim.pretrained import load, save


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "meta_train", *words]


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    straight = subprocess.Popen(command("train", "smoke", "--out", str(whole)), stderr=subprocess.DEVNULL)
    broken = subprocess.Popen(command("train", "smoke", "--out", str(killed)), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint.paths(killed) or checkpoint.load(killed)["iteration"] < 20:
        assert broken.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(broken.pid, signal.SIGKILL)
    broken.wait()
    assert 20 <= checkpoint.load(killed)["iteration"] < smoke().iterations
    subprocess.run(command("resume", str(killed)), check=True, capture_output=True)
    assert straight.wait(timeout=120) == 0
    assert (killed / trainer.THETA).read_bytes() == (whole / trainer.THETA).read_bytes()
    ours, theirs = checkpoint.load(killed), checkpoint.load(whole)
    assert ours["iteration"] == theirs["iteration"] == smoke().iterations
    for name, value in theirs["rule"].items():
        assert torch.equal(ours["rule"][name], value)
    load(killed / trainer.THETA)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(killed))
    events.Reload()
    steps = [event.step for event in events.Scalars("meta/objective")]
    assert steps == list(range(1, smoke().iterations + 1))


def test_an_interrupted_run_finishes_its_iteration_and_resumes(tmp_path: Path) -> None:
    run = subprocess.Popen(command("train", "smoke", "--out", str(tmp_path)), stderr=subprocess.PIPE, text=True)
    while not checkpoint.paths(tmp_path) or checkpoint.load(tmp_path)["iteration"] < 5:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "resume" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert trainer.restore(smoke(), ALONE, checkpoint.load(tmp_path)).iteration >= 5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "nothing", "--out", "{}/new"), "one of ['broad', 'default', 'digits', 'smoke']"),
        (("resume", "{}"), "expected a checkpoint"),
    ],
)
def test_wrong_commands_end_with_one_line(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = subprocess.run(
        command(*(word.format(tmp_path) for word in words)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def config() -> Config:
    return replace(smoke(), iterations=4, window=2, validation=None)


def test_a_run_is_not_overwritten(tmp_path: Path, config: Config) -> None:
    trainer.train(config, tmp_path, {})
    before = (tmp_path / trainer.THETA).read_bytes()
    with pytest.raises(FileExistsError, match="resume"):
        trainer.train(config, tmp_path, {})
    assert (tmp_path / trainer.THETA).read_bytes() == before


def estimating(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Let every meta-gradient have this value in all entries."""

    def estimate(self: Estimation, rule: UpdateRule, task: Task, carry: Carry, generator: torch.Generator) -> Estimate:
        members = len(carry.alive)
        alive = torch.full_like(carry.alive, value == value)  # noqa: PLR0124 - NaN is not
        samples = torch.full((members, len(theta_vector.flatten(rule))), value)
        return Estimate(samples, torch.zeros(members), torch.zeros(2, members), replace(carry, alive=alive))

    monkeypatch.setattr(Estimation, "__call__", estimate)


def test_a_broken_gradient_is_dropped_and_its_slot_restarted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer.begin(config)
    before, slot = theta_vector.flatten(run.rule), run.slots[0]
    estimating(monkeypatch, float("nan"))
    report = trainer.iterate(run, config)
    assert torch.equal(theta_vector.flatten(run.rule), before)
    assert (run.dropped, report["meta/dropped"], report["meta/restarted"]) == (1, 1.0, 1.0)
    assert run.slots[0].carry is not slot.carry
    assert run.slots[0].carry.steps == 0


@pytest.mark.parametrize(("reject", "norm"), [(float("inf"), 1.0), (10.0, 0.0)])
def test_large_gradients_are_clipped_or_rejected(
    config: Config, monkeypatch: pytest.MonkeyPatch, reject: float, norm: float
) -> None:
    run = trainer.begin(config)
    estimating(monkeypatch, 1e3)
    seen = [0.0]
    step = run.optimizer.step
    monkeypatch.setattr(
        run.optimizer,
        "step",
        lambda: (seen.append(torch.cat([p.grad.flatten() for p in run.rule.parameters()]).norm().item()), step()),  # type: ignore[union-attr]
    )
    before = theta_vector.flatten(run.rule)
    trainer.iterate(run, replace(config, reject=reject))
    assert seen[-1] == pytest.approx(norm, rel=1e-5)
    assert torch.equal(theta_vector.flatten(run.rule), before) == (norm == 0)


def test_a_diverging_inner_run_is_restarted(config: Config) -> None:
    run = trainer.begin(config)
    slot = run.slots[0]
    huge = {name: p * 1e4 for name, p in slot.carry.params.items()}
    run.slots[0] = replace(slot, carry=replace(slot.carry, params=huge))
    assert trainer.iterate(run, config)["meta/restarted"] == 1
    assert run.slots[0].carry.steps == 0


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, {"iteration": 1})
    save = torch.save

    def full(content: object, file: object) -> None:
        save(content, file)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, {"iteration": 2})
    assert checkpoint.load(tmp_path) == {"iteration": 1}


def test_checkpoints_rotate_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    for iteration in (1, 2, 10):
        checkpoint.save(tmp_path, iteration, {"iteration": iteration})
    assert [path.name for path in checkpoint.paths(tmp_path)] == ["checkpoint-0000010.pt", "checkpoint-0000002.pt"]
    newest = checkpoint.paths(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be read"):
        assert checkpoint.load(tmp_path) == {"iteration": 2}
    checkpoint.paths(tmp_path)[1].write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(ValueError, match="start again"):
        checkpoint.load(tmp_path)


def test_meta_training_improves_unseen_members(tmp_path: Path) -> None:
    """After sixty iterations on tiny networks the exported rule beats AdamW, where it began, on tasks not seen."""
    learned = trainer.train(replace(smoke(), validation=None), tmp_path, {})
    generator = torch.Generator().manual_seed(123)
    means: dict[str, list[float]] = {"learned": [], "adamw": []}
    for _ in range(6):
        one = smoke().distribution.sample(generator)
        carry = start(learned, one, 4, 40, generator)
        seed = int(torch.randint(10**6, (), generator=generator))
        for name, made in (("learned", learned), ("adamw", UpdateRule(smoke().rule).zero_())):
            with torch.no_grad():
                losses = unroll(made, one, carry, 40, torch.Generator().manual_seed(seed)).losses
            means[name].append(losses.mean().item())
    assert sum(means["learned"]) < 0.9 * sum(means["adamw"])


def test_a_run_starts_from_a_rule_of_its_architecture() -> None:
    shipped = load("default")
    found = trainer.begin(Config(rule=shipped.config, initial="default", slots=1)).average.state_dict()
    assert all(torch.equal(found[name], value) for name, value in shipped.state_dict().items())


def test_what_is_exported_stands_on_the_way_from_the_beginning(tmp_path: Path, config: Config) -> None:
    """With a part of the way as with all of it, but for the rule that is handed out."""
    all_of_it = trainer.train(config, tmp_path / "whole", {}).state_dict()
    part = trainer.train(replace(config, reach=0.25), tmp_path / "part", {}).state_dict()
    begun = trainer.beginning(config).state_dict()
    assert any(not torch.equal(value, begun[name]) for name, value in all_of_it.items())
    for name, value in load(tmp_path / "part" / trainer.THETA).state_dict().items():
        torch.testing.assert_close(value, torch.lerp(begun[name], all_of_it[name], 0.25))
        assert torch.equal(value, part[name])
    ends = [checkpoint.load(tmp_path / name)["rule"] for name in ("whole", "part")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    with pytest.raises(ValueError, match="reach"):
        trainer.train(replace(config, reach=0.0), tmp_path / "none", {})


def test_a_network_may_stand_beside_a_rule_whose_own_is_silent(tmp_path: Path) -> None:
    """A larger rule started from a silent one takes the same steps; from one that speaks it is refused."""
    plain = RuleConfig(hidden=1, rounds=0, power=0.5, gain=2.0, rank=2, growth=2.0)
    small = UpdateRule(plain)
    with torch.no_grad():
        small.share.fill_(0.7)
        small.growth.fill_(1.5)
        for value in small.stack.bypass_tensors.parameters():
            value.add_(0.1)
    save(small, tmp_path / "silent.safetensors")
    large = replace(plain, hidden=5, rounds=1)
    begun = trainer.begin(Config(rule=large, initial=str(tmp_path / "silent.safetensors"), slots=1)).rule
    params, grads = {"w": torch.randn(3, 4)}, {"w": torch.randn(3, 4)}
    symmetry = Symmetry.separate({"w": (3, 4)})
    steps = [rule(params, grads, rule.init(params), symmetry, lr=0.1)[0]["w"] for rule in (small, begun)]
    torch.testing.assert_close(*steps)
    assert (begun.share, begun.growth) == (0.7, 1.5)
    without = replace(large, rank=0, growth=0.0)
    trainer.begin(Config(rule=without, initial=str(tmp_path / "silent.safetensors"), slots=1))
    with torch.no_grad():
        small.stack.read_tensors.weight.add_(0.1)
    save(small, tmp_path / "speaking.safetensors")
    with pytest.raises(ValueError, match="expected a rule to start from of architecture"):
        trainer.begin(Config(rule=large, initial=str(tmp_path / "speaking.safetensors"), slots=1))


def test_persistence_takes_over_and_resumes(tmp_path: Path, config: Config) -> None:
    """Backprop first, then PES on runs of its own, from whose middle a run is restored."""
    mixed = replace(config, iterations=8, until=6, polish=3, horizon=(20, 20))
    trainer.train(mixed, tmp_path / "part", {})
    run = trainer.restore(mixed, ALONE, checkpoint.load(tmp_path / "part"))
    assert {slot.carry.copies for slot in run.slots.values()} == {2}
    assert any(slot.carry.drift is not None for slot in run.slots.values())
    on = replace(mixed, until=None)
    resumed = trainer.train(on, tmp_path / "part", {}, resume=True)
    straight = trainer.train(on, tmp_path / "whole", {})
    assert torch.equal(theta_vector.flatten(resumed), theta_vector.flatten(straight))


def test_the_best_theta_is_kept_and_training_stops_when_none_comes(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, from before the first iteration on, are given: the second is the best, and two worse ones end the run."""
    scores = iter([0.3, 0.1, 0.2, 0.4, 0.0])
    thetas: list[torch.Tensor] = []

    def score(_found: object) -> float:
        return next(scores)

    compare = type(smoke().validation).compare

    def noted(self: object, rule: UpdateRule, number: int) -> object:
        thetas.append(theta_vector.flatten(rule))
        return compare(self, rule, number)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "score_of", score)
    monkeypatch.setattr(type(smoke().validation), "compare", noted)
    validated = replace(config, validation=smoke().validation, validate_every=1, patience=2, iterations=5)
    trainer.train(validated, tmp_path, {})
    content = checkpoint.load(tmp_path)
    assert (content["iteration"], content["best"], content["stale"]) == (3, 0.1, 2)
    assert torch.equal(theta_vector.flatten(load(tmp_path / trainer.BEST)), thetas[1])


def test_time_runs_out(tmp_path: Path, config: Config) -> None:
    trainer.train(replace(config, minutes=0.0), tmp_path, {})
    assert checkpoint.load(tmp_path)["iteration"] == 1


def test_validation_knows_who_is_better() -> None:
    """AdamW at a thousandth of its learning rate loses to AdamW tuned over four; a copy at the best rate is even."""
    validation = smoke().validation
    assert validation is not None
    found = validation.compare(UpdateRule.nominal(), 0)  # AdamW at 1e-3, the lowest of the four
    assert found.score > 0.1
    assert found.learned_over_nominal == pytest.approx(0.0, abs=1e-4)
    assert torch.equal(found.told, found.untold)
    assert (found.adamw[-4:] < found.told[-4:]).all()


def test_speed_is_steps_over_steps() -> None:
    slow = torch.linspace(1, 0, 101)[1:]
    fast = torch.cat([torch.linspace(1, 0, 51)[1:], torch.zeros(50)])
    assert speed_of(slow, slow) == pytest.approx(1.0, rel=0.02)
    assert speed_of(fast, slow) == pytest.approx(2.0, rel=0.1)
    assert speed_of(torch.ones(100), slow) == 0.0


@pytest.mark.parametrize("estimator", ["backprop", "pes"])
def test_an_inner_run_may_follow_on_another(config: Config, estimator: str) -> None:
    """The networks are those that the run before left, the optimizer's state is new."""
    following = replace(config, restart=1.0, horizon=(2, 2), slots=1, estimator=estimator)  # type: ignore[arg-type]
    run = trainer.begin(following)
    before, ended = run.slots[0], []
    call = Estimation.__call__

    def noted(*args: object) -> Estimate:
        found = call(*args)  # type: ignore[arg-type]
        ended.append(found.carry)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Estimation, "__call__", noted)
        trainer.iterate(run, following)
    after, count = run.slots[0].carry, 2 // before.carry.copies
    assert run.slots[0].task is before.task
    assert after.steps == 0
    for name, p in ended[0].params.items():
        assert all(torch.equal(copy, p[:count]) for copy in after.params[name].split(count))
        assert not any(value.any() for value in after.state[name].values())


def test_horizons_grow_over_the_curriculum() -> None:
    config = Config(horizon=(100, 1600), curriculum=100)
    assert [config.horizon_at(i) for i in (0, 50, 100, 500)] == [(100, 100), (100, 400), (100, 1600), (100, 1600)]


def test_the_expert_is_annealed_away() -> None:
    config = Config(imitation=1.0, imitate=100)
    assert [config.estimation(i).imitation for i in (0, 50, 100)] == [1.0, 0.5, 0.0]
    assert config.estimation(99).unrolling.expert is not None
    assert config.estimation(100).unrolling.expert is None


def test_tensorboard_has_a_chart_for_everything(tmp_path: Path) -> None:
    """Custom Scalars name every family and validation task; pictures, histograms and hyperparameters are there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    trainer.train(replace(smoke(), iterations=4, validate_every=2), tmp_path, {})
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert {"meta/objective", "meta/signal_to_noise", "objective/mlp", "validation/score"} <= set(tags["scalars"])
    assert [event.step for event in events.Images("curves")] == [0, 2, 4]
    assert any(name.startswith("theta/stack.read_rows") for name in tags["histograms"])
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    charts = {category.title: [chart.title for chart in category.chart] for category in layout.category}
    assert charts["objective by family"] == ["mlp"]
    assert charts["validation: speed, in AdamW's"][0].startswith("mlp-64-")
    shown = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert len(shown) == len(set(shown))
    hparams = EventAccumulator(str(tmp_path / "hparams")).Reload()
    assert "final/best_score" in hparams.Tags()["scalars"]
