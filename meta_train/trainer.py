"""Meta-training: the loop, top to bottom.

Inner runs of several tasks stand in *slots*, each at another age. An iteration takes the next slot, trains its members
for one window under the current theta, differentiates, moves theta, and puts the slot back, or starts a new task in it
when its horizon is reached. All randomness comes from one generator, so that a run continues bit for bit from its
checkpoint.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from meta_train import checkpoint
from meta_train.meta_gradient import truncated_backprop
from meta_train.tasks import MLPDistribution, Task, TaskDistribution
from meta_train.unroll import Carry, start
from nfn_optim import pretrained
from nfn_optim.rule import RuleConfig, UpdateRule

THETA = "theta.safetensors"


@dataclass(frozen=True)
class Config:
    """What a meta-training run is made of.

    Args:
        rule: The architecture of the rule.
        start: Name or file of the rule to start from, of that architecture; None for a new one.
        distribution: What it is trained on.
        iterations: Updates of theta that the learning rate is scheduled for.
        until: Updates of theta after which to stop, if earlier.
        members: Members of a task that are trained side by side.
        slots: Tasks that are under way at once.
        window: Steps differentiated at once.
        horizon: Shortest and longest inner run, in steps, log-uniform, rounded up to whole windows.
        lr: Peak learning rate of theta (AdamW), per iteration; linear warm-up, then cosine to a tenth.
        warmup: Iterations of warm-up.
        clip: Meta-gradients of larger norm are scaled down to it.
        reject: Meta-gradients of larger norm come from a window that exploded; they are dropped.
        average: Decay of the exponential moving average of theta that is exported, per iteration.
        second_order: Whether inner gradients are differentiated too.
        averaged: Share of the objective that is measured at the average of a window's parameters, 0 to 1.
        seed: Of everything random.
        checkpoint_every: Iterations between checkpoints.
    """

    rule: RuleConfig = field(default_factory=RuleConfig)
    start: str | None = None
    distribution: TaskDistribution[Any] = field(default_factory=MLPDistribution)
    iterations: int = 5000
    until: int | None = None
    members: int = 8
    slots: int = 16
    window: int = 20
    horizon: tuple[int, int] = (100, 1000)
    lr: float = 1e-3
    warmup: int = 50
    clip: float = 1.0
    reject: float = math.inf
    average: float = 0.99
    second_order: bool = True
    averaged: float = 0.0
    seed: int = 0
    checkpoint_every: int = 100

    @property
    def last(self) -> int:
        """The iteration after which the run is over."""
        return self.iterations if self.until is None else min(self.until, self.iterations)


@dataclass
class Run:
    """The state of a run between two iterations.

    Attributes:
        rule: Theta as it is being trained.
        average: Its exponential moving average.
        optimizer: The outer one.
        slots: Tasks and where their inner runs stand.
        generator: The only source of randomness.
        iteration: Updates of theta tried so far.
        dropped: Those of them that were not finite, or far too large, and left theta as it was.
        seconds: Time spent so far.
    """

    rule: UpdateRule
    average: UpdateRule
    optimizer: torch.optim.Optimizer
    slots: list[tuple[Task, Carry]]
    generator: torch.Generator
    iteration: int = 0
    dropped: int = 0
    seconds: float = 0.0


def train(config: Config, out: Path, describe: dict[str, Any], *, resume: bool = False) -> UpdateRule:
    """Meta-train a rule.

    Args:
        config: What the run is made of.
        out: Folder for checkpoint, exported theta and TensorBoard events.
        describe: How to make `config` again; stored in the checkpoint.
        resume: Continue the run in `out` instead of starting one.

    Returns:
        The rule with the averaged theta, also exported to `out / "theta.safetensors"`.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        FileNotFoundError: `out` holds no run and `resume` is True.
        KeyboardInterrupt: Ctrl-C was pressed; the iteration under way was finished and the checkpoint written.
    """
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import
    from tqdm import tqdm  # noqa: PLC0415 - an extra

    if not resume and (out / checkpoint.NAME).exists():
        raise FileExistsError(f"{out} holds a run already; continue it with `resume {out}` or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    run = restore(config, checkpoint.load(out)) if resume else begin(config)
    if not resume:
        save(run, config, out, describe)
    writer = SummaryWriter(str(out), purge_step=run.iteration + 1)
    progress = tqdm(total=config.last, initial=run.iteration, desc="meta-training", dynamic_ncols=True)
    begun = time.monotonic() - run.seconds
    try:
        with deferred_interrupt() as interrupted:
            while run.iteration < config.last and not interrupted.is_set():
                report = iterate(run, config)
                run.seconds = time.monotonic() - begun
                for tag, value in report.items():
                    writer.add_scalar(tag, value, run.iteration)
                if run.iteration % config.checkpoint_every == 0:
                    save(run, config, out, describe)
                progress.update()
                progress.set_postfix(objective=f"{report['meta/objective']:.3f}", dropped=run.dropped, refresh=False)
            save(run, config, out, describe)
        if interrupted.is_set():
            raise KeyboardInterrupt
    finally:
        writer.close()
        progress.close()
    return run.average


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event instead of stopping an iteration half way; a second one stops at once."""
    event = threading.Event()

    def note(_signal: int, _frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, note) if main else None
    try:
        yield event
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def iterate(run: Run, config: Config) -> dict[str, float]:
    """One iteration: differentiate a window, move theta, put the slot back.

    Returns:
        Scalars to watch, by TensorBoard tag.
    """
    place = run.iteration % config.slots
    task, carry = run.slots[place]
    found = truncated_backprop(
        run.rule,
        task,
        carry,
        config.window,
        run.generator,
        second_order=config.second_order,
        averaged=config.averaged,
    )
    run.iteration += 1
    norm = torch.cat([g.flatten() for g in found.grads]).norm()
    rate = learning_rate(config, run.iteration)
    if found.finite and norm <= config.reject:
        scale = min(1.0, config.clip / (norm.item() + 1e-12))
        for p, g in zip(run.rule.parameters(), found.grads, strict=True):
            p.grad = g * scale
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(run.average.parameters(), run.rule.parameters(), strict=True):
                slow.lerp_(fast, 1 - min(config.average, 1 - 1 / run.iteration))
    else:
        run.dropped += 1
    alive = found.finite and is_sound(found.carry, found.losses)
    over = not alive or found.carry.steps >= found.carry.horizon
    run.slots[place] = fresh_slot(run.rule, config, run.generator) if over else (task, found.carry)
    return {
        "meta/objective": found.objective.item(),
        "meta/gradient_norm": norm.item(),
        "meta/dropped": float(run.dropped),
        "meta/learning_rate": rate,
        f"inner_loss/{task.name.split('-')[0]}": found.losses[-1].mean().item(),
        "meta/restarted": float(not alive),
        "inner/steps": float(carry.steps),
    }


def learning_rate(config: Config, iteration: int) -> float:
    """The outer learning rate at an iteration, counted from 1."""
    warm = min(1.0, iteration / max(config.warmup, 1))
    return config.lr * warm * (0.55 + 0.45 * math.cos(math.pi * min(iteration / config.iterations, 1.0)))


def begin(config: Config) -> Run:
    """A run before its first iteration."""
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        rule, average = UpdateRule(config.rule), UpdateRule(config.rule)
    if config.start is not None:
        rule.load_state_dict(started_from(config.start, config.rule).state_dict())
    average.load_state_dict(rule.state_dict())
    average.requires_grad_(False)
    optimizer = torch.optim.AdamW(rule.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    slots = [fresh_slot(rule, config, generator) for _ in range(config.slots)]
    return Run(rule, average, optimizer, slots, generator)


def started_from(name: str, config: RuleConfig) -> UpdateRule:
    """Load the rule to start from.

    Raises:
        ValueError: It has another architecture.
    """
    found = pretrained.load(name)
    if replace(found.config, power=config.power, cooldown=config.cooldown) != config:  # these may change
        raise ValueError(f"expected a rule to start from of architecture {config}, found {found.config} in {name}")
    return found


def fresh_slot(rule: UpdateRule, config: Config, generator: torch.Generator) -> tuple[Task, Carry]:
    """Draw a task, its members and a horizon of whole windows."""
    task = config.distribution.sample(generator)
    low, high = config.horizon
    steps = low * (high / low) ** torch.rand((), generator=generator, dtype=torch.float64).item()
    horizon = math.ceil(steps / config.window) * config.window
    return task, start(rule, task, config.members, horizon, generator)


def is_sound(carry: Carry, losses: Tensor) -> bool:
    """Whether an inner run is worth continuing: no member is worse than twice where it began."""
    return bool((losses[-1] < 2 * carry.first_loss + 1).all())  # False for NaN


def save(run: Run, config: Config, out: Path, describe: dict[str, Any]) -> None:
    """Write the checkpoint, and the averaged theta as a rule file."""
    slots: list[dict[str, Any]] = [
        {"task": config.distribution.describe(task), "carry": vars(carry)} for task, carry in run.slots
    ]
    checkpoint.save(
        out,
        {
            "describe": describe,
            "rule": run.rule.state_dict(),
            "average": run.average.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "slots": slots,
            "generator": run.generator.get_state(),
            "iteration": run.iteration,
            "dropped": run.dropped,
            "seconds": run.seconds,
        },
    )
    pretrained.save(run.average, out / THETA)


def restore(config: Config, content: dict[str, Any]) -> Run:
    """The run that a checkpoint holds."""
    run = begin(config)
    run.rule.load_state_dict(content["rule"])
    run.average.load_state_dict(content["average"])
    run.optimizer.load_state_dict(content["optimizer"])
    run.slots = [(config.distribution.rebuild(slot["task"]), Carry(**slot["carry"])) for slot in content["slots"]]
    generator_state: Tensor = content["generator"]
    run.generator.set_state(generator_state)
    run.iteration, run.dropped, run.seconds = content["iteration"], content["dropped"], content["seconds"]
    return run
