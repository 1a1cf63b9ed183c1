"""Meta-training: a killed run resumes bit for bit, invalid gradients do not reach theta, the best theta is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import command
import pytest
import torch
import tyro

from meta_train import checkpoint, theta_vector, trainer
from meta_train.__main__ import Overrides, changes_of, config_of
from meta_train.config import Config
from meta_train.distributed import SINGLE_PROCESS
from meta_train.meta_gradient import Estimate, Estimation
from meta_train.objective import Objective
from meta_train.recipes import smoke
from meta_train.tasks import Task
from meta_train.unroll import Carry, start, unroll
from meta_train.validation import speed_of
from nfn_optim import RuleConfig, Symmetry, UpdateRule
from nfn_optim.pretrained import load, save


def typed(*words: str) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "meta_train", *words]


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    iterations = 30
    words = ("train", "smoke", "--iterations", str(iterations), "--validate-every", "15")
    broken = subprocess.Popen(typed(*words, "--out", str(killed)), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint.paths(killed) or checkpoint.load(killed)["iteration"] < 5:
        assert broken.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(broken.pid, signal.SIGKILL)
    broken.wait()
    assert 5 <= checkpoint.load(killed)["iteration"] < iterations
    for each in (("resume", str(killed)), (*words, "--out", str(whole))):
        done = command.run("meta_train", *each)
        assert done.returncode == 0, done.stderr
    assert (killed / trainer.THETA).read_bytes() == (whole / trainer.THETA).read_bytes()
    ours, theirs = checkpoint.load(killed), checkpoint.load(whole)
    assert ours["iteration"] == theirs["iteration"] == iterations
    for name, value in theirs["rule"].items():
        assert torch.equal(ours["rule"][name], value)
    load(killed / trainer.THETA)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(killed))
    events.Reload()
    steps = [event.step for event in events.Scalars("meta/objective")]
    assert steps == list(range(1, iterations + 1))


@pytest.mark.slow
def test_an_interrupted_run_finishes_its_iteration_and_resumes(tmp_path: Path) -> None:
    run = subprocess.Popen(typed("train", "smoke", "--out", str(tmp_path)), stderr=subprocess.PIPE, text=True)
    while not checkpoint.paths(tmp_path) or checkpoint.load(tmp_path)["iteration"] < 5:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "resume" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert trainer.restore(smoke(), SINGLE_PROCESS, checkpoint.load(tmp_path)).iteration >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "unknown", "--out", "{}/new"), "one of ['broad', 'default_1', 'digits', 'network', 'smoke']"),
        (("resume", "{}"), "expected a checkpoint"),
    ],
)
def test_invalid_commands_print_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = command.run("meta_train", *(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 1
    assert message in done.stderr
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


def patch_estimates(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Replace every meta-gradient by a constant one."""

    def estimate(self: Estimation, rule: UpdateRule, task: Task, carry: Carry, generator: torch.Generator) -> Estimate:
        members = len(carry.alive)
        alive = torch.full_like(carry.alive, value == value)  # noqa: PLR0124 - NaN is not
        samples = torch.full((members, len(theta_vector.flatten(rule))), value)
        return Estimate(samples, torch.zeros(members), torch.zeros(2, members), replace(carry, alive=alive))

    monkeypatch.setattr(Estimation, "__call__", estimate)


def test_an_invalid_gradient_is_dropped_and_its_inner_run_restarted(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer.start_run(config)
    before, inner = theta_vector.flatten(run.rule), run.inner_runs[0]
    patch_estimates(monkeypatch, float("nan"))
    report = trainer.iterate(run, config)
    assert torch.equal(theta_vector.flatten(run.rule), before)
    assert (run.dropped, report["meta/dropped"], report["meta/restarted"]) == (1, 1.0, 1.0)
    assert run.inner_runs[0].carry is not inner.carry
    assert run.inner_runs[0].carry.steps == 0


@pytest.mark.parametrize(("reject", "norm"), [(float("inf"), 1.0), (10.0, 0.0)])
def test_large_gradients_are_clipped_or_rejected(
    config: Config, monkeypatch: pytest.MonkeyPatch, reject: float, norm: float
) -> None:
    run = trainer.start_run(config)
    patch_estimates(monkeypatch, 1e3)
    norms = [0.0]
    step = run.optimizer.step
    monkeypatch.setattr(
        run.optimizer,
        "step",
        lambda: (norms.append(torch.cat([p.grad.flatten() for p in run.rule.parameters()]).norm().item()), step()),  # type: ignore[union-attr]
    )
    before = theta_vector.flatten(run.rule)
    trainer.iterate(run, replace(config, reject=reject))
    assert norms[-1] == pytest.approx(norm, rel=1e-5)
    assert torch.equal(theta_vector.flatten(run.rule), before) == (norm == 0)


def test_a_diverging_inner_run_is_restarted(config: Config) -> None:
    run = trainer.start_run(config)
    inner = run.inner_runs[0]
    huge = {name: p * 1e4 for name, p in inner.carry.params.items()}
    run.inner_runs[0] = replace(inner, carry=replace(inner.carry, params=huge))
    assert trainer.iterate(run, config)["meta/restarted"] == 1
    assert run.inner_runs[0].carry.steps == 0


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, {"iteration": 1})
    save = torch.save

    def full(content: object, file: object) -> None:
        save(content, file)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, {"iteration": 2})
    assert checkpoint.load(tmp_path) == {"iteration": 1}


def test_checkpoints_rotate_and_a_damaged_one_is_skipped(tmp_path: Path) -> None:
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


def test_checkpoints_of_another_format_are_refused(tmp_path: Path) -> None:
    torch.save({"iteration": 1, "slots": []}, tmp_path / "checkpoint-0000001.pt")
    with pytest.raises(ValueError, match="expected a checkpoint of format 2, found format 1"):
        checkpoint.load(tmp_path)


def test_flags_are_the_fields_of_a_configuration() -> None:
    """Given flags change the recipe, nested ones included; the others leave it as it is."""
    overrides = tyro.cli(Overrides, args=["--inner-runs", "6", "--horizon", "3", "9", "--tail-fraction", "0.5"])
    changes = changes_of(overrides)
    assert changes == {"inner_runs": 6, "horizon": (3, 9), "objective": {"tail_fraction": 0.5}}
    expected = replace(smoke(), inner_runs=6, horizon=(3, 9), objective=Objective(tail_fraction=0.5))
    assert vars(config_of({"recipe": "smoke", "changes": changes})) == vars(expected)
    assert vars(config_of({"recipe": "smoke", "changes": changes_of(Overrides())})) == vars(smoke())
    flags = {f.name for f in fields(Overrides)}
    assert {f.name for f in fields(Config)} - flags == {"rule", "distribution", "validation"}


@pytest.mark.exhaustive
def test_meta_training_improves_unseen_members(tmp_path: Path) -> None:
    """After sixty iterations on tiny networks the exported rule beats AdamW, the initial rule, on held-out tasks."""
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
    found = trainer.start_run(Config(rule=shipped.config, initial="default", inner_runs=1)).average.state_dict()
    assert all(torch.equal(found[name], value) for name, value in shipped.state_dict().items())


def test_the_exported_theta_is_interpolated(tmp_path: Path, config: Config) -> None:
    """The export fraction changes the exported rule, and nothing else."""
    average = trainer.train(config, tmp_path / "whole", {}).state_dict()
    partial = trainer.train(replace(config, export_fraction=0.25), tmp_path / "part", {}).state_dict()
    initial = trainer.initial_rule(config).state_dict()
    assert any(not torch.equal(value, initial[name]) for name, value in average.items())
    for name, value in load(tmp_path / "part" / trainer.THETA).state_dict().items():
        torch.testing.assert_close(value, torch.lerp(initial[name], average[name], 0.25))
        assert torch.equal(value, partial[name])
    ends = [checkpoint.load(tmp_path / name)["rule"] for name in ("whole", "part")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    with pytest.raises(ValueError, match="export_fraction"):
        trainer.train(replace(config, export_fraction=0.0), tmp_path / "none", {})


def test_hidden_channels_are_added_to_a_bypass_only_rule(tmp_path: Path) -> None:
    """A larger rule started from it takes the same steps; starting from one with other heads is refused."""
    plain = RuleConfig(hidden=1, rounds=0, power=0.5, gain=2.0, direction="orthogonal", rank=2, adapt_rate=2.0)
    small = UpdateRule(plain)
    with torch.no_grad():
        small.direction.orthogonal_weight.fill_(0.7)
        small.network.adapt_rate.fill_(1.5)
        for value in small.network.message_passing.tensor_skip.parameters():
            value.add_(0.1)
    save(small, tmp_path / "bypass_only.safetensors")
    large = replace(plain, hidden=5, rounds=1)
    started = trainer.start_run(
        Config(rule=large, initial=str(tmp_path / "bypass_only.safetensors"), inner_runs=1)
    ).rule
    params, grads = {"w": torch.randn(3, 4)}, {"w": torch.randn(3, 4)}
    symmetry = Symmetry.separate({"w": (3, 4)})
    steps = [rule(params, grads, rule.init(params), symmetry, lr=0.1)[0]["w"] for rule in (small, started)]
    torch.testing.assert_close(*steps)
    assert (started.direction.orthogonal_weight, started.network.adapt_rate) == (0.7, 1.5)
    without = replace(large, direction="adam", adapt_rate=0.0)
    trainer.start_run(Config(rule=without, initial=str(tmp_path / "bypass_only.safetensors"), inner_runs=1))
    with torch.no_grad():
        small.network.message_passing.tensor_head.weight.add_(0.1)
    save(small, tmp_path / "with_heads.safetensors")
    with pytest.raises(ValueError, match="expected a rule to start from of architecture"):
        trainer.start_run(Config(rule=large, initial=str(tmp_path / "with_heads.safetensors"), inner_runs=1))


def test_pes_replaces_backprop_and_resumes(tmp_path: Path, config: Config) -> None:
    """Backprop first, then PES on new inner runs; a run is restored in the middle of these."""
    mixed = replace(config, iterations=8, until=6, pes_from=3, horizon=(20, 20))
    trainer.train(mixed, tmp_path / "part", {})
    run = trainer.restore(mixed, SINGLE_PROCESS, checkpoint.load(tmp_path / "part"))
    assert {inner.carry.copies for inner in run.inner_runs.values()} == {2}
    assert any(inner.carry.accumulated_perturbation is not None for inner in run.inner_runs.values())
    on = replace(mixed, until=None)
    resumed = trainer.train(on, tmp_path / "part", {}, resume=True)
    uninterrupted = trainer.train(on, tmp_path / "whole", {})
    assert torch.equal(theta_vector.flatten(resumed), theta_vector.flatten(uninterrupted))


@pytest.mark.slow
def test_the_best_theta_is_saved_and_training_stops_without_improvement(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With given scores, from before the first iteration on: the second is the best, and two worse ones end the run."""
    scores = iter([0.3, 0.1, 0.2, 0.4, 0.0])
    thetas: list[torch.Tensor] = []

    def score(_comparisons: object) -> float:
        return next(scores)

    compare = type(smoke().validation).compare

    def recording(self: object, rule: UpdateRule, index: int) -> object:
        thetas.append(theta_vector.flatten(rule))
        return compare(self, rule, index)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "score_of", score)
    monkeypatch.setattr(type(smoke().validation), "compare", recording)
    validated = replace(config, validation=smoke().validation, validate_every=1, patience=2, iterations=5)
    trainer.train(validated, tmp_path, {})
    content = checkpoint.load(tmp_path)
    assert (content["iteration"], content["best"], content["stale"]) == (3, 0.1, 2)
    assert torch.equal(theta_vector.flatten(load(tmp_path / trainer.BEST)), thetas[1])


def test_training_stops_at_the_time_limit(tmp_path: Path, config: Config) -> None:
    trainer.train(replace(config, minutes=0.0), tmp_path, {})
    assert checkpoint.load(tmp_path)["iteration"] == 1


def test_validation_ranks_a_tuned_optimizer_first() -> None:
    """AdamW at the lowest of four learning rates loses to AdamW at the best of them."""
    validation = smoke().validation
    assert validation is not None
    found = validation.compare(UpdateRule.adamw(), 0)  # AdamW at 1e-3, the lowest of the four
    assert found.score > 0.1
    assert found.learned_over_nominal == pytest.approx(0.0, abs=1e-4)
    assert torch.equal(found.horizon_known, found.horizon_unknown)
    assert (found.adamw[-4:] < found.horizon_known[-4:]).all()


def test_speed_is_a_ratio_of_steps() -> None:
    slow = torch.linspace(1, 0, 101)[1:]
    fast = torch.cat([torch.linspace(1, 0, 51)[1:], torch.zeros(50)])
    assert speed_of(slow, slow) == pytest.approx(1.0, rel=0.02)
    assert speed_of(fast, slow) == pytest.approx(2.0, rel=0.1)
    assert speed_of(torch.ones(100), slow) == 0.0


@pytest.mark.parametrize("estimator", ["backprop", "pes"])
def test_an_inner_run_may_start_warm(config: Config, estimator: str) -> None:
    """The networks are those of the run before, the optimizer state is new."""
    warm = replace(config, warm_start=1.0, horizon=(2, 2), inner_runs=1, estimator=estimator)  # type: ignore[arg-type]
    run = trainer.start_run(warm)
    before, ended = run.inner_runs[0], []
    call = Estimation.__call__

    def recording(*args: object) -> Estimate:
        found = call(*args)  # type: ignore[arg-type]
        ended.append(found.carry)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Estimation, "__call__", recording)
        trainer.iterate(run, warm)
    after, count = run.inner_runs[0].carry, 2 // before.carry.copies
    assert run.inner_runs[0].task is before.task
    assert after.steps == 0
    for name, p in ended[0].params.items():
        assert all(torch.equal(copy, p[:count]) for copy in after.params[name].split(count))
        initial = run.rule.init({name: after.params[name]}, 1)[name]
        assert all(torch.equal(value, initial[key]) for key, value in after.state[name].items())


def test_horizons_grow_over_the_curriculum() -> None:
    config = Config(horizon=(100, 1600), curriculum=100)
    assert [config.horizon_at(i) for i in (0, 50, 100, 500)] == [(100, 100), (100, 400), (100, 1600), (100, 1600)]


def test_imitation_is_annealed() -> None:
    config = Config(imitation=1.0, imitation_iterations=100)
    assert [config.estimation(i).imitation for i in (0, 50, 100)] == [1.0, 0.5, 0.0]
    assert config.estimation(99).unrolling.expert is not None
    assert config.estimation(100).unrolling.expert is None


@pytest.mark.slow
def test_every_scalar_has_a_chart_in_tensorboard(tmp_path: Path) -> None:
    """Custom Scalars name every family and validation task; pictures, histograms and hyperparameters are there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    trainer.train(replace(smoke(), iterations=4, validate_every=2), tmp_path, {})
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert {"meta/objective", "meta/signal_to_noise", "objective/mlp", "validation/score"} <= set(tags["scalars"])
    assert [event.step for event in events.Images("curves")] == [0, 2, 4]
    assert any(name.startswith("theta/network.message_passing.row_head") for name in tags["histograms"])
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    charts = {category.title: [chart.title for chart in category.chart] for category in layout.category}
    assert charts["objective by family"] == ["mlp"]
    assert charts["validation: speed, in AdamW's"][0].startswith("mlp-64-")
    charted = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert len(charted) == len(set(charted))
    hparams = EventAccumulator(str(tmp_path / "hparams")).Reload()
    assert "final/best_score" in hparams.Tags()["scalars"]
