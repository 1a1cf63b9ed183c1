"""Meta-training: the loop, top to bottom.

Inner runs of several tasks stand in *slots*, each at another age and with randomness of its own. An iteration takes the
next slots, estimates the meta-gradient from a window of each under the current theta, moves theta by their mean, and
puts the slots back, or starts a new task where the horizon is reached. Several processes share the slots out among
themselves and see the same theta; a run continues bit for bit from its checkpoint, whatever their number.
"""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from meta_train import checkpoint, theta_vector
from meta_train.config import Config
from meta_train.distributed import ALONE, Ranks, joined, restarts
from meta_train.meta_gradient import Estimate, combine
from meta_train.summary import Summary
from meta_train.tasks import Task
from meta_train.unroll import Carry, restart, start
from meta_train.validation import Comparison, score_of
from nfn_optim import pretrained
from nfn_optim.rule import RuleConfig, UpdateRule

SAID_PLAINLY = ("power", "share", "growth", "waning", "stack.read_tensors.bias")
FREE = ("power", "gain", "cooldown", "bend", "fading", "talk_every", "rank", "growth", "waning")
THETA, BEST = "theta.safetensors", "best.safetensors"
MODULES, COUNTERS = ("rule", "average", "optimizer"), ("iteration", "dropped", "seconds", "best", "stale")  # of a `Run`


@dataclass
class Slot:
    """An inner run under way.

    Attributes:
        task: What is trained.
        carry: Where it stands.
        generator: The only source of its randomness.
    """

    task: Task
    carry: Carry
    generator: torch.Generator


@dataclass
class Run:
    """The state of a run between two iterations.

    Attributes:
        rule: Theta as it is being trained.
        average: Its exponential moving average.
        optimizer: The outer one.
        slots: By number, those of this process.
        iteration: Updates of theta tried so far.
        dropped: Those of them that had no usable estimate and left theta as it was.
        seconds: Time spent so far.
        best: The lowest validation score so far.
        stale: Validations since then.
    """

    rule: UpdateRule
    average: UpdateRule
    optimizer: torch.optim.Optimizer
    slots: dict[int, Slot]
    iteration: int = 0
    dropped: int = 0
    seconds: float = 0.0
    best: float = math.inf
    stale: int = 0


def train(config: Config, out: Path, describe: dict[str, Any], *, resume: bool = False) -> UpdateRule:
    """Meta-train a rule.

    Args:
        config: What the run is made of.
        out: Folder for checkpoints, exported theta and TensorBoard events.
        describe: How to make `config` again; stored in the checkpoint.
        resume: Continue the run in `out` instead of starting one. After a restart by `torchrun` it is continued anyway.

    Returns:
        The rule with the exported theta, also in `out / "theta.safetensors"`; the one with the lowest
        validation score, if there is validation, is in `out / "best.safetensors"`.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        FileNotFoundError: `out` holds no run and `resume` is True.
        ValueError: The slots cannot be shared out among the processes.
        KeyboardInterrupt: Ctrl-C was pressed; the iteration under way was finished and the checkpoint written.
    """
    from tqdm import tqdm  # noqa: PLC0415 - an extra

    with joined(torch.device(config.device)) as ranks, deferred_interrupt() as interrupted:
        found = bool(checkpoint.paths(out))
        resume = resume or (found and restarts() > 0)
        if found and not resume:
            raise FileExistsError(f"{out} holds a run; continue it with `resume {out}` or choose another folder")
        config.check(ranks.size)
        ranks.wait()
        out.mkdir(parents=True, exist_ok=True)
        run = restore(config, ranks, checkpoint.load(out)) if resume else begin(config, ranks)
        summary = Summary(out, run.iteration) if ranks.first else None
        if not resume:
            if config.validation is not None:
                validate(run, config, ranks, out, summary)
            save(run, config, ranks, out, describe)
        progress = tqdm(total=config.last, initial=run.iteration, desc="meta-training", disable=not ranks.first)
        begun = time.monotonic() - run.seconds
        stop = False
        try:
            while run.iteration < config.last and not stop:
                report = iterate(run, config, ranks)
                run.seconds = time.monotonic() - begun
                if summary is not None:
                    summary.scalars(report, run.iteration)
                if config.validates(run.iteration):
                    validate(run, config, ranks, out, summary)
                stop = ranks.any(interrupted.is_set() or is_spent(run, config))
                if run.iteration % config.checkpoint_every == 0 or stop or run.iteration == config.last:
                    save(run, config, ranks, out, describe)
                progress.update()
                progress.set_postfix(objective=f"{report['meta/objective']:.3f}", best=f"{run.best:.3f}", refresh=False)
            if summary is not None:
                scores = {"final/best_score": run.best} if math.isfinite(run.best) else {}
                summary.hparams(config, {"final/dropped": float(run.dropped), "final/seconds": run.seconds, **scores})
        finally:
            progress.close()
            if summary is not None:
                summary.close()
        if interrupted.is_set():
            raise KeyboardInterrupt
    return exported(run, config)


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


def is_spent(run: Run, config: Config) -> bool:
    """Whether the time is used up, or validation has not improved for too long."""
    late = config.minutes is not None and run.seconds >= 60 * config.minutes
    return late or (config.patience is not None and run.stale >= config.patience)


def iterate(run: Run, config: Config, ranks: Ranks = ALONE) -> dict[str, float]:
    """One iteration: estimate, move theta, put the slots back.

    Returns:
        Scalars to watch, by TensorBoard tag.
    """
    estimation = config.estimation(run.iteration)
    places = [(run.iteration * config.tasks + j) % config.slots for j in range(config.tasks)]
    mine = []
    for place in ranks.share(places):
        slot = run.slots[place]
        if slot.carry.copies != estimation.copies:  # another estimator takes over
            slot = run.slots[place] = fresh_slot(run, config, slot.generator)
        mine.append((place, estimation(run.rule, slot.task, slot.carry, slot.generator)))
    samples = torch.cat(ranks.gather([found.samples.cpu() for _, found in mine]))
    reports = ranks.gather([reported(run.slots[place].task, found) for place, found in mine])

    run.iteration += 1
    bounded = estimation.estimator == "backprop"  # the others' estimates are large, and only their mean says something
    each, reject = (config.clip, config.reject) if bounded else (math.inf, math.inf)
    combined = combine(samples, config.clip, each=each, reject=reject)
    rate = learning_rate(config, run.iteration)
    if combined.usable:
        move(run, config, combined.gradient, rate)
    else:
        run.dropped += 1
    for place, found in mine:
        slot = run.slots[place]
        slot = replace(slot, carry=found.carry)
        if not is_sound(found):
            slot = fresh_slot(run, config, slot.generator)
        elif found.carry.steps >= found.carry.horizon:
            slot = next_slot(run, config, slot)
        run.slots[place] = slot
    return {
        "meta/objective": sum(r["objective"] for r in reports) / len(reports),
        "meta/gradient_norm": combined.norm,
        "meta/signal_to_noise": combined.signal_to_noise,
        "meta/dropped": combined.dropped,
        "meta/learning_rate": rate,
        "meta/restarted": float(sum(not r["sound"] for r in reports)),
        "meta/inner_steps": sum(r["steps"] for r in reports) / len(reports),
        **{f"objective/{r['family']}": r["objective"] for r in reports},
    }


def reported(task: Task, found: Estimate) -> dict[str, Any]:
    """What is told of a window: family, mean objective, steps of the inner run, whether it goes on."""
    return {
        "family": task.name.split("-")[0],
        "objective": found.objective.nanmean().item(),
        "steps": float(found.carry.steps),
        "sound": is_sound(found),
    }


def move(run: Run, config: Config, gradient: Tensor, rate: float) -> None:
    """Move theta along a gradient `(size of theta,)`, and its average behind it."""
    for name, value in theta_vector.unflatten(run.rule, gradient).items():
        if (p := run.rule.get_parameter(name)).requires_grad:
            p.grad = value.to(p.device, copy=True)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    with torch.no_grad():
        for slow, fast in zip(run.average.parameters(), run.rule.parameters(), strict=True):
            slow.lerp_(fast, 1 - min(config.average, 1 - 1 / run.iteration))


def validate(run: Run, config: Config, ranks: Ranks, out: Path, summary: Summary | None) -> list[Comparison]:
    """Compare the exported theta with AdamW, and keep it if it is the best so far."""
    assert config.validation is not None
    numbers = ranks.share(range(len(config.validation.distributions)))
    rule = exported(run, config)
    mine = [config.validation.compare(rule, number) for number in numbers]
    found = ranks.gather(mine)
    score = score_of(found)
    run.stale += 1
    if score < run.best:
        run.best, run.stale = score, 0
        if ranks.first:
            pretrained.save(rule, out / BEST)
    if summary is not None:
        summary.validation(rule, found, run.iteration)
    return found


def learning_rate(config: Config, iteration: int) -> float:
    """The outer learning rate at an iteration, counted from 1."""
    warm = min(1.0, iteration / max(config.warmup, 1))
    return config.lr * warm * (0.55 + 0.45 * math.cos(math.pi * min(iteration / config.iterations, 1.0)))


def begin(config: Config, ranks: Ranks = ALONE) -> Run:
    """A run before its first iteration."""
    run = blank(config, beginning(config))
    for place in ranks.share(range(config.slots)):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + place)
        slot = fresh_slot(run, config, generator)
        if config.window:  # staggered: not all at once
            windows = math.ceil(slot.carry.horizon / config.window * (place + 1) / config.slots)
            slot = replace(slot, carry=replace(slot.carry, horizon=windows * config.window))
        run.slots[place] = slot
    return run


def new_rule(config: Config) -> UpdateRule:
    """A rule that has learned nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return UpdateRule(config.rule).to(config.device)


def beginning(config: Config) -> UpdateRule:
    """The rule before the first iteration."""
    rule = new_rule(config)
    if config.initial is not None:
        rule.load_state_dict(rule.state_dict() | started_from(config.initial, config.rule))
    return rule


@torch.no_grad()
def exported(run: Run, config: Config) -> UpdateRule:
    """The rule that is handed out: as far from the beginning to the averaged theta as `reach` says."""
    if config.reach == 1:
        return run.average
    rule = beginning(config).requires_grad_(False)
    for value, goal in zip(rule.parameters(), run.average.parameters(), strict=True):
        value.lerp_(goal, config.reach)
    return rule


def blank(config: Config, rule: UpdateRule) -> Run:
    """A run of a rule, without slots."""
    theta_vector.train_only(rule, config.learn)
    average = copy.deepcopy(rule).requires_grad_(False)
    trained = [p for p in rule.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    return Run(rule, average, optimizer, {})


def started_from(name: str, config: RuleConfig) -> dict[str, Tensor]:
    """Load the theta to start from; of a rule whose network is silent, what another network may stand beside.

    Numbers that only one of the two configurations has a place for (see `FREE`) are left out, or stay as they begin.

    Raises:
        ValueError: It is that of another architecture.
    """
    found = pretrained.load(name)
    wider = replace(found.config, **{key: getattr(config, key) for key in FREE})
    with torch.device("meta"):  # nothing is drawn
        wanted = set(UpdateRule(config).state_dict())
    theta = {n: v for n, v in found.state_dict().items() if n in wanted}
    if wider == config:
        return theta
    wider = replace(wider, hidden=config.hidden, rounds=config.rounds)
    if found.learns and wider == config and config.form == "linear" and found.stack.silent:
        return {n: v for n, v in theta.items() if n in SAID_PLAINLY or ".bypass_" in n}
    raise ValueError(f"expected a rule to start from of architecture {config}, found {found.config} in {name}")


def fresh_slot(run: Run, config: Config, generator: torch.Generator) -> Slot:
    """Draw a task, its members and a horizon of whole windows."""
    task = config.distribution.sample(generator)
    task.to(config.device)
    horizon = drawn_horizon(run, config, generator)
    copies = config.estimation(run.iteration).copies
    return Slot(task, start(run.rule, task, config.members, horizon, generator, copies=copies), generator)


def next_slot(run: Run, config: Config, slot: Slot) -> Slot:
    """What follows an inner run that has reached its horizon: another task, or the same networks once more."""
    if torch.rand((), generator=slot.generator, dtype=torch.float64) >= config.restart:
        return fresh_slot(run, config, slot.generator)
    horizon = drawn_horizon(run, config, slot.generator)
    return replace(slot, carry=restart(run.rule, slot.task, slot.carry, horizon, slot.generator))


def drawn_horizon(run: Run, config: Config, generator: torch.Generator) -> int:
    """The number of steps of an inner run: whole windows, if there are any."""
    low, high = config.horizon_at(run.iteration)
    steps = low * (high / low) ** torch.rand((), generator=generator, dtype=torch.float64).item()
    return math.ceil(steps / config.window) * config.window if config.window else round(steps)


def is_sound(found: Estimate) -> bool:
    """Whether an inner run is worth continuing: at least half of its members have not diverged."""
    return bool(found.carry.alive.float().mean() >= 0.5)  # noqa: PLR2004


def save(run: Run, config: Config, ranks: Ranks, out: Path, describe: dict[str, Any]) -> None:
    """Write a checkpoint, and the exported theta as a rule file."""
    mine = [
        {
            "task": config.distribution.describe(slot.task),
            "carry": vars(slot.carry),
            "generator": slot.generator.get_state(),
        }
        for slot in run.slots.values()
    ]
    slots = ranks.gather(mine)
    if not ranks.first:
        return
    content = {
        "describe": describe,
        "slots": slots,
        **{name: getattr(run, name).state_dict() for name in MODULES},
        **{name: getattr(run, name) for name in COUNTERS},
    }
    checkpoint.save(out, run.iteration, content)
    pretrained.save(exported(run, config), out / THETA)


def restore(config: Config, ranks: Ranks, content: dict[str, Any]) -> Run:
    """The run that a checkpoint holds, with this process's share of the slots."""
    run = blank(config, new_rule(config))
    for name in MODULES:
        getattr(run, name).load_state_dict(content[name])
    for name in COUNTERS:
        setattr(run, name, content[name])
    for place in ranks.share(range(config.slots)):
        slot = content["slots"][place]
        generator = torch.Generator()
        generator.set_state(slot["generator"])
        task = config.distribution.rebuild(slot["task"])
        task.to(config.device)
        run.slots[place] = Slot(task, Carry(**slot["carry"]), generator)
    return run
