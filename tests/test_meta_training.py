"""Meta-training: the gradient is right, a killed run resumes bit for bit, and nothing bad gets into theta."""

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

from meta_train import checkpoint, trainer
from meta_train.meta_gradient import MetaGradient, truncated_backprop
from meta_train.recipes import smoke
from meta_train.tasks import MLPTask, Tensors, digits
from meta_train.tasks.mlp import Augment, MLPShape
from meta_train.unroll import Carry, start, unroll
from nfn_optim import RuleConfig, UpdateRule
from nfn_optim.pretrained import load

SHAPE = MLPShape(zoom=1, widths=(5, 4), activation="gelu", layer_norm=True, zero_bias=False, batch_size=6)


class DoubleTask(MLPTask):
    """The same task in float64."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensors, Tensors]:
        params, member = super().draw(count, generator)
        return {n: p.double() for n, p in params.items()}, {n: _double(v) for n, v in member.items()}

    def batch(self, count: int, generator: torch.Generator) -> Tensors:
        return {n: _double(v) for n, v in super().batch(count, generator).items()}


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def task() -> DoubleTask:
    return DoubleTask(SHAPE, digits(), Augment())


def rule(form: str = "linear") -> UpdateRule:
    torch.manual_seed(0)
    made = UpdateRule(RuleConfig(hidden=4, form=form, power=1.0)).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made


def carried(members: int = 2) -> Carry:
    """An inner run three steps old."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return unroll(rule(), task(), start(rule(), task(), members, 40, generator), 3, generator)[1]


@pytest.mark.parametrize("form", ["linear", "network"])
@pytest.mark.parametrize("averaged", [0.0, 0.5])
def test_meta_gradient_equals_finite_differences(form: str, averaged: float) -> None:
    learned, carry = rule(form), carried()

    def estimate() -> MetaGradient:
        generator = torch.Generator().manual_seed(2)
        return truncated_backprop(learned, task(), carry, 5, generator, averaged=averaged)

    exact = estimate().grads
    theta = list(learned.parameters())
    torch.manual_seed(3)
    for _ in range(3):
        direction = [torch.randn_like(p) for p in theta]
        values = []
        for sign in (1, -2, 1):  # to +eps, to -eps, and back
            with torch.no_grad():
                for p, d in zip(theta, direction, strict=True):
                    p.add_(d, alpha=sign * 1e-5)
            values.append(estimate().objective.item())
        numeric = (values[0] - values[1]) / 2e-5
        analytic = sum((g * d).sum().item() for g, d in zip(exact, direction, strict=True))
        assert analytic == pytest.approx(numeric, rel=1e-6)


def test_first_order_gradients_differ_and_the_unroll_does_not() -> None:
    found = {
        second: truncated_backprop(rule(), task(), carried(), 4, torch.Generator().manual_seed(2), second_order=second)
        for second in (True, False)
    }
    assert torch.equal(found[True].losses, found[False].losses)
    assert not torch.allclose(found[True].grads[0], found[False].grads[0], rtol=1e-3)


def test_members_are_trained_as_if_alone() -> None:
    """A member's losses and parameters are those of an unroll of it alone, on the same batches."""
    carry, members = carried(3), 3

    class Fixed(DoubleTask):
        """Takes its batches from a list, for some of the members only."""

        def batch(self, count: int, generator: torch.Generator) -> Tensors:
            whole = super().batch(members, generator)
            return whole if count == members else {n: v[self.only : self.only + 1] for n, v in whole.items()}

    together, end, _ = unroll(rule(), Fixed(SHAPE, digits(), Augment()), carry, 4, torch.Generator().manual_seed(5))
    for only in range(members):
        one = Fixed(SHAPE, digits(), Augment())
        one.only = only  # type: ignore[attr-defined]
        part = slice(only, only + 1)
        alone = replace(
            carry,
            params={n: p[part] for n, p in carry.params.items()},
            state={n: {k: v[part] for k, v in s.items()} for n, s in carry.state.items()},
            member={n: v[part] for n, v in carry.member.items()},
            total_steps=carry.total_steps[part],
        )
        losses, last, _ = unroll(rule(), one, alone, 4, torch.Generator().manual_seed(5))
        torch.testing.assert_close(losses[:, 0], together[:, only], rtol=1e-10, atol=1e-12)
        for name, p in last.params.items():
            torch.testing.assert_close(p[0], end.params[name][only], rtol=1e-10, atol=1e-12)


def test_a_task_knows_its_symmetry_and_its_reparametrisation() -> None:
    one = task()
    params, member = one.draw(1, torch.Generator().manual_seed(0))
    batch = {n: v[0] for n, v in one.batch(1, torch.Generator().manual_seed(0)).items()}
    single, of_member = {n: p[0] for n, p in params.items()}, {n: v[0] for n, v in member.items()}
    before = one.loss(single, of_member, batch)
    one.symmetry.check(single)
    permuted = one.symmetry.permute(single, one.symmetry.random_permutations(torch.Generator().manual_seed(0)))
    torch.testing.assert_close(one.loss(permuted, of_member, batch), before, rtol=1e-12, atol=0)
    assert set(one.symmetry.free) == {"h0", "h1"}
    plain = {n: p * of_member[n] for n, p in single.items()}
    ones = {n: torch.ones_like(v) if n in single else v for n, v in of_member.items()}
    torch.testing.assert_close(one.loss(plain, ones, batch), before, rtol=1e-12, atol=0)
    assert any(not torch.equal(plain[n], single[n]) for n in single)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "meta_train", *words]


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    straight = subprocess.Popen(command("train", "smoke", "--out", str(whole)), stderr=subprocess.DEVNULL)
    broken = subprocess.Popen(command("train", "smoke", "--out", str(killed)), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / checkpoint.NAME).exists() or checkpoint.load(killed)["iteration"] < 20:
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
    while not (tmp_path / checkpoint.NAME).exists() or checkpoint.load(tmp_path)["iteration"] < 5:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "resume" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert trainer.restore(smoke(), checkpoint.load(tmp_path)).iteration >= 5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "nothing", "--out", "{}/new"), "one of ['broad', 'digits', 'smoke']"),
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
def config() -> trainer.Config:
    return replace(smoke(), iterations=4, window=2)


def test_a_run_is_not_overwritten(tmp_path: Path, config: trainer.Config) -> None:
    trainer.train(config, tmp_path, {})
    before = (tmp_path / trainer.THETA).read_bytes()
    with pytest.raises(FileExistsError, match="resume"):
        trainer.train(config, tmp_path, {})
    assert (tmp_path / trainer.THETA).read_bytes() == before


def test_a_broken_gradient_is_dropped_and_its_slot_restarted(
    config: trainer.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(rule: UpdateRule, task: MLPTask, carry: Carry, *args: object, **kwargs: object) -> MetaGradient:
        grads = tuple(torch.full_like(p, torch.nan) for p in rule.parameters())
        return MetaGradient(grads, torch.tensor(0.0), torch.zeros(2, 2), carry)

    run = trainer.begin(config)
    before = [p.clone() for p in run.rule.parameters()]
    slot = run.slots[0]
    monkeypatch.setattr(trainer, "truncated_backprop", broken)
    report = trainer.iterate(run, config)
    assert all(torch.equal(p, q) for p, q in zip(run.rule.parameters(), before, strict=True))
    assert run.dropped == report["meta/dropped"] == 1
    assert run.slots[0][1] is not slot[1]
    assert run.slots[0][1].steps == 0


def test_large_gradients_are_clipped(config: trainer.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def large(rule: UpdateRule, task: MLPTask, carry: Carry, *args: object, **kwargs: object) -> MetaGradient:
        grads = tuple(torch.full_like(p, 1e3) for p in rule.parameters())
        return MetaGradient(grads, torch.tensor(0.0), torch.zeros(2, 2), carry)

    run = trainer.begin(config)
    monkeypatch.setattr(trainer, "truncated_backprop", large)
    monkeypatch.setattr(
        run.optimizer,
        "step",
        lambda: seen.append(torch.cat([p.grad.flatten() for p in run.rule.parameters()]).norm().item()),  # type: ignore[union-attr]
    )
    trainer.iterate(run, config)
    assert seen == [pytest.approx(config.clip, rel=1e-5)]


def test_a_diverging_inner_run_is_restarted(config: trainer.Config) -> None:
    run = trainer.begin(config)
    task_, carry = run.slots[0]
    huge = {name: p * 1e4 for name, p in carry.params.items()}
    run.slots[0] = (task_, replace(carry, params=huge))
    assert trainer.iterate(run, config)["meta/restarted"] == 1
    assert run.slots[0][1].steps == 0


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, {"iteration": 1})
    save = torch.save

    def full(content: object, file: object) -> None:
        save(content, file)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, {"iteration": 2})
    assert checkpoint.load(tmp_path) == {"iteration": 1}


def test_meta_training_improves_unseen_members(tmp_path: Path) -> None:
    """After sixty iterations on tiny networks the exported rule beats AdamW, where it began, on tasks not seen."""
    learned = trainer.train(smoke(), tmp_path, {})
    generator = torch.Generator().manual_seed(123)
    means = {"learned": [], "adamw": []}
    for _ in range(6):
        one = smoke().distribution.sample(generator)
        carry = start(learned, one, 4, 40, generator)
        seed = int(torch.randint(10**6, (), generator=generator))
        for name, made in (("learned", learned), ("adamw", UpdateRule(smoke().rule).zero_())):
            with torch.no_grad():
                losses = unroll(made, one, carry, 40, torch.Generator().manual_seed(seed))[0]
            means[name].append(losses.mean().item())
    assert sum(means["learned"]) < 0.9 * sum(means["adamw"])


def test_a_run_starts_from_a_rule_of_its_architecture() -> None:
    theta = trainer.begin(trainer.Config(start="default")).average.state_dict()
    assert all(torch.equal(theta[name], value) for name, value in load("default").state_dict().items())
    with pytest.raises(ValueError, match="expected a rule to start from of architecture"):
        trainer.begin(replace(smoke(), start="default"))


def test_meta_gradients_that_exploded_leave_theta_alone() -> None:
    config = replace(smoke(), reject=0.0)
    run = trainer.begin(config)
    before = [p.clone() for p in run.rule.parameters()]
    assert trainer.iterate(run, config)["meta/dropped"] == 1
    assert all(torch.equal(p, q) for p, q in zip(run.rule.parameters(), before, strict=True))
