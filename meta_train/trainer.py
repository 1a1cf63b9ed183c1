"""The meta-training loop.

`inner_runs` inner runs of several tasks are in progress at once, each at another age and with its own generator. An
iteration advances the next `tasks` of them by a window under the current theta, estimates a meta-gradient from each,
updates theta with their mean, and replaces inner runs that have reached their horizon or diverged. Several processes
divide the inner runs among themselves and hold the same theta; a run resumes bit for bit from its checkpoint, with any
number of processes.
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
from meta_train.distributed import SINGLE_PROCESS, Ranks, process_group, restart_count
from meta_train.meta_gradient import Estimate, combine
from meta_train.summary import Summary
from meta_train.tasks import Task
from meta_train.unroll import Carry, start, warm_start
from meta_train.validation import Comparison, score_of
from nfn_optim import pretrained
from nfn_optim.layers.message_passing import HIDDEN_PARTS
from nfn_optim.rule import RuleConfig, UpdateRule

# Fields of `RuleConfig` in which the rule to start from may differ.
COMPATIBLE_FIELDS = (
    "power",
    "gain",
    "cooldown",
    "cooldown_power",
    "inverse_time_power",
    "refresh_every",
    "direction",
    "rank",
    "adapt_rate",
    "adapt_decay",
)
THETA, BEST = "theta.safetensors", "best.safetensors"
MODULES, COUNTERS = ("rule", "average", "optimizer"), ("iteration", "dropped", "seconds", "best", "stale")  # of a `Run`


@dataclass
class InnerRun:
    """An inner run in progress.

    Attributes:
        task: The task that is trained.
        carry: The state of inner training.
        generator: The only source of its randomness.
    """

    task: Task
    carry: Carry
    generator: torch.Generator


@dataclass
class Run:
    """The state of a meta-training run between two iterations.

    Attributes:
        rule: The current theta.
        average: Its exponential moving average.
        optimizer: The outer optimizer.
        inner_runs: By index, those of this process.
        iteration: Iterations so far.
        dropped: Iterations without a valid estimate, which left theta unchanged.
        seconds: Wall-clock time so far.
        best: The lowest validation score so far.
        stale: Validations since then.
    """

    rule: UpdateRule
    average: UpdateRule
    optimizer: torch.optim.Optimizer
    inner_runs: dict[int, InnerRun]
    iteration: int = 0
    dropped: int = 0
    seconds: float = 0.0
    best: float = math.inf
    stale: int = 0


def train(config: Config, out: Path, describe: dict[str, Any], *, resume: bool = False) -> UpdateRule:
    """Meta-train a rule.

    Args:
        config: The configuration of the run.
        out: Folder for checkpoints, exported theta and TensorBoard events.
        describe: How to make `config` again; stored in the checkpoint.
        resume: Continue the run in `out` instead of starting one; implied after a restart by `torchrun`.

    Returns:
        The rule with the exported theta, also in `out / "theta.safetensors"`; with validation, the one with the lowest
        validation score is in `out / "best.safetensors"`.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        FileNotFoundError: `out` holds no run and `resume` is True.
        ValueError: The inner runs cannot be divided among the processes, or the checkpoint has another format.
        KeyboardInterrupt: Ctrl-C was pressed; the iteration was finished and the checkpoint written.
    """
    from tqdm import tqdm  # noqa: PLC0415 - an extra

    with process_group(torch.device(config.device)) as ranks, deferred_interrupt() as interrupted:
        has_checkpoint = bool(checkpoint.paths(out))
        resume = resume or (has_checkpoint and restart_count() > 0)
        if has_checkpoint and not resume:
            raise FileExistsError(f"{out} holds a run; continue it with `resume {out}` or choose another folder")
        config.check(ranks.size)
        ranks.barrier()
        out.mkdir(parents=True, exist_ok=True)
        run = restore(config, ranks, checkpoint.load(out)) if resume else start_run(config, ranks)
        summary = Summary(out, run.iteration) if ranks.is_main else None
        if not resume:
            if config.validation is not None:
                validate(run, config, ranks, out, summary)
            save(run, config, ranks, out, describe)
        last = config.last_iteration
        progress = tqdm(total=last, initial=run.iteration, desc="meta-training", disable=not ranks.is_main)
        started = time.monotonic() - run.seconds
        stop = False
        try:
            while run.iteration < last and not stop:
                scalars = iterate(run, config, ranks)
                run.seconds = time.monotonic() - started
                if summary is not None:
                    summary.scalars(scalars, run.iteration)
                if config.validates(run.iteration):
                    validate(run, config, ranks, out, summary)
                stop = ranks.any(interrupted.is_set() or out_of_budget(run, config))
                if run.iteration % config.checkpoint_every == 0 or stop or run.iteration == last:
                    save(run, config, ranks, out, describe)
                progress.update()
                progress.set_postfix(
                    objective=f"{scalars['meta/objective']:.3f}", best=f"{run.best:.3f}", refresh=False
                )
            if summary is not None:
                scores = {"final/best_score": run.best} if math.isfinite(run.best) else {}
                summary.hparams(config, {"final/dropped": float(run.dropped), "final/seconds": run.seconds, **scores})
        finally:
            progress.close()
            if summary is not None:
                summary.close()
        if interrupted.is_set():
            raise KeyboardInterrupt
    return exported_rule(run, config)


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event instead of interrupting an iteration; a second one raises at once."""
    event = threading.Event()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, handle) if main else None
    try:
        yield event
    finally:
        if main:
            signal.signal(signal.SIGINT, previous)


def out_of_budget(run: Run, config: Config) -> bool:
    """Whether the time is used up, or validation has not improved for `patience` validations."""
    late = config.minutes is not None and run.seconds >= 60 * config.minutes
    return late or (config.patience is not None and run.stale >= config.patience)


def iterate(run: Run, config: Config, ranks: Ranks = SINGLE_PROCESS) -> dict[str, float]:
    """One iteration: estimate the meta-gradient, update theta, replace inner runs that have ended.

    Returns:
        Scalars by TensorBoard tag.
    """
    estimation = config.estimation(run.iteration)
    indices = [(run.iteration * config.tasks + j) % config.inner_runs for j in range(config.tasks)]
    estimates = {}
    for index in ranks.slice_of(indices):
        inner = run.inner_runs[index]
        if inner.carry.copies != estimation.antithetic_copies:  # the estimator has changed
            inner = run.inner_runs[index] = new_inner_run(run, config, inner.generator)
        estimates[index] = estimation(run.rule, inner.task, inner.carry, inner.generator)
    samples = torch.cat(ranks.gather([estimate.samples.cpu() for estimate in estimates.values()]))
    reports = ranks.gather([window_report(run.inner_runs[index].task, e) for index, e in estimates.items()])

    run.iteration += 1
    clips = estimation.estimator == "backprop"  # single estimates of evolution strategies are large, their mean is not
    clip_each, reject = (config.clip, config.reject) if clips else (math.inf, math.inf)
    combined = combine(samples, config.clip, clip_each=clip_each, reject=reject)
    rate = learning_rate(config, run.iteration)
    if combined.is_valid:
        update_theta(run, config, combined.gradient, rate)
    else:
        run.dropped += 1
    for index, estimate in estimates.items():
        inner = replace(run.inner_runs[index], carry=estimate.carry)
        if not is_valid(estimate):
            inner = new_inner_run(run, config, inner.generator)
        elif estimate.carry.steps >= estimate.carry.horizon:
            inner = next_inner_run(run, config, inner)
        run.inner_runs[index] = inner
    return {
        "meta/objective": sum(r["objective"] for r in reports) / len(reports),
        "meta/gradient_norm": combined.norm,
        "meta/signal_to_noise": combined.signal_to_noise,
        "meta/dropped": combined.dropped,
        "meta/learning_rate": rate,
        "meta/restarted": float(sum(not r["valid"] for r in reports)),
        "meta/inner_steps": sum(r["steps"] for r in reports) / len(reports),
        **{f"objective/{r['family']}": r["objective"] for r in reports},
    }


def window_report(task: Task, estimate: Estimate) -> dict[str, Any]:
    """Family of the task, mean objective, steps of the inner run, and whether it is valid."""
    return {
        "family": task.name.split("-")[0],
        "objective": estimate.objective.nanmean().item(),
        "steps": float(estimate.carry.steps),
        "valid": is_valid(estimate),
    }


def update_theta(run: Run, config: Config, gradient: Tensor, rate: float) -> None:
    """One step of the outer optimizer with a gradient `(size of theta,)`, then of the moving average."""
    for name, value in theta_vector.unflatten(run.rule, gradient).items():
        if (p := run.rule.get_parameter(name)).requires_grad:
            p.grad = value.to(p.device, copy=True)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    with torch.no_grad():
        for average, p in zip(run.average.parameters(), run.rule.parameters(), strict=True):
            average.lerp_(p, 1 - min(config.ema_decay, 1 - 1 / run.iteration))


def validate(run: Run, config: Config, ranks: Ranks, out: Path, summary: Summary | None) -> list[Comparison]:
    """Compare the exported theta with AdamW, and save it if it is the best so far."""
    assert config.validation is not None
    rule = exported_rule(run, config)
    indices = ranks.slice_of(range(len(config.validation.distributions)))
    comparisons = ranks.gather([config.validation.compare(rule, index) for index in indices])
    score = score_of(comparisons)
    run.stale += 1
    if score < run.best:
        run.best, run.stale = score, 0
        if ranks.is_main:
            pretrained.save(rule, out / BEST)
    if summary is not None:
        summary.validation(rule, comparisons, run.iteration)
    return comparisons


def learning_rate(config: Config, iteration: int) -> float:
    """The outer learning rate at an iteration, counted from 1."""
    warm = min(1.0, iteration / max(config.warmup, 1))
    return config.lr * warm * (0.55 + 0.45 * math.cos(math.pi * min(iteration / config.iterations, 1.0)))


def start_run(config: Config, ranks: Ranks = SINGLE_PROCESS) -> Run:
    """A run before its first iteration."""
    run = empty_run(config, initial_rule(config))
    for index in ranks.slice_of(range(config.inner_runs)):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        inner = new_inner_run(run, config, generator)
        if config.window:  # staggered, so that they do not end at the same iteration
            windows = math.ceil(inner.carry.horizon / config.window * (index + 1) / config.inner_runs)
            inner = replace(inner, carry=replace(inner.carry, horizon=windows * config.window))
        run.inner_runs[index] = inner
    return run


def new_rule(config: Config) -> UpdateRule:
    """A rule with a newly initialised theta."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return UpdateRule(config.rule).to(config.device)


def initial_rule(config: Config) -> UpdateRule:
    """The rule before the first iteration: a new one, or `config.initial`."""
    rule = new_rule(config)
    if config.initial is not None:
        rule.load_state_dict(rule.state_dict() | load_initial_theta(config.initial, config.rule))
    return rule


@torch.no_grad()
def exported_rule(run: Run, config: Config) -> UpdateRule:
    """The rule with theta interpolated between the initial theta and the moving average, at `export_fraction`."""
    if config.export_fraction == 1:
        return run.average
    rule = initial_rule(config).requires_grad_(False)
    for p, average in zip(rule.parameters(), run.average.parameters(), strict=True):
        p.lerp_(average, config.export_fraction)
    return rule


def empty_run(config: Config, rule: UpdateRule) -> Run:
    """A run of a rule, without inner runs."""
    theta_vector.train_only(rule, config.trainable)
    average = copy.deepcopy(rule).requires_grad_(False)
    trained = [p for p in rule.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    return Run(rule, average, optimizer, {})


def load_initial_theta(name: str, config: RuleConfig) -> dict[str, Tensor]:
    """Load the theta to start from; from a bypass-only rule, the part that a rule with a hidden channel takes over.

    Parameters that exist under only one of the two configurations (see `COMPATIBLE_FIELDS`) are left out, or keep their
    initial values.

    Raises:
        ValueError: The rule has another architecture.
    """
    loaded = pretrained.load(name)
    adapted = replace(loaded.config, **{key: getattr(config, key) for key in COMPATIBLE_FIELDS})
    with torch.device("meta"):  # no memory, no random numbers
        names = set(UpdateRule(config).state_dict())
    theta = {n: v for n, v in loaded.state_dict().items() if n in names}
    if adapted == config:
        return theta
    adapted = replace(adapted, hidden=config.hidden, rounds=config.rounds)
    if loaded.learned and adapted == config and loaded.network.message_passing.bypass_only:
        return {n: v for n, v in theta.items() if not any(part in n for part in HIDDEN_PARTS)}
    raise ValueError(f"expected a rule to start from of architecture {config}, found {loaded.config} in {name}")


def new_inner_run(run: Run, config: Config, generator: torch.Generator) -> InnerRun:
    """Draw a task, its members and a horizon."""
    task = config.distribution.sample(generator)
    task.to(config.device)
    horizon = draw_horizon(run, config, generator)
    copies = config.estimation(run.iteration).antithetic_copies
    return InnerRun(task, start(run.rule, task, config.members, horizon, generator, copies=copies), generator)


def next_inner_run(run: Run, config: Config, inner: InnerRun) -> InnerRun:
    """The successor of an inner run that has reached its horizon: a new one, or a warm start of the same networks."""
    if torch.rand((), generator=inner.generator, dtype=torch.float64) >= config.warm_start:
        return new_inner_run(run, config, inner.generator)
    horizon = draw_horizon(run, config, inner.generator)
    return replace(inner, carry=warm_start(run.rule, inner.task, inner.carry, horizon, inner.generator))


def draw_horizon(run: Run, config: Config, generator: torch.Generator) -> int:
    """Draw the number of steps of an inner run, a multiple of the window."""
    low, high = config.horizon_at(run.iteration)
    steps = low * (high / low) ** torch.rand((), generator=generator, dtype=torch.float64).item()
    return math.ceil(steps / config.window) * config.window if config.window else round(steps)


def is_valid(estimate: Estimate) -> bool:
    """Whether the inner run can continue: at least half of its members have not diverged."""
    return bool(estimate.carry.alive.float().mean() >= 0.5)  # noqa: PLR2004


def save(run: Run, config: Config, ranks: Ranks, out: Path, describe: dict[str, Any]) -> None:
    """Write a checkpoint, and the exported theta as a rule file."""
    inner_runs = ranks.gather(
        [
            {
                "task": config.distribution.describe(inner.task),
                "carry": vars(inner.carry),
                "generator": inner.generator.get_state(),
            }
            for inner in run.inner_runs.values()
        ]
    )
    if not ranks.is_main:
        return
    content = {
        "describe": describe,
        "inner_runs": inner_runs,
        **{name: getattr(run, name).state_dict() for name in MODULES},
        **{name: getattr(run, name) for name in COUNTERS},
    }
    checkpoint.save(out, run.iteration, content)
    pretrained.save(exported_rule(run, config), out / THETA)


def restore(config: Config, ranks: Ranks, content: dict[str, Any]) -> Run:
    """The run of a checkpoint, with this process's slice of the inner runs."""
    run = empty_run(config, new_rule(config))
    for name in MODULES:
        getattr(run, name).load_state_dict(content[name])
    for name in COUNTERS:
        setattr(run, name, content[name])
    for index in ranks.slice_of(range(config.inner_runs)):
        saved = content["inner_runs"][index]
        generator = torch.Generator()
        generator.set_state(saved["generator"])
        task = config.distribution.rebuild(saved["task"])
        task.to(config.device)
        run.inner_runs[index] = InnerRun(task, Carry(**saved["carry"]), generator)
    return run
