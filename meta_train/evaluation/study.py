"""The runs of a benchmark: every setting on seed 0, then the best setting on all seeds.

Every run is cached as soon as it is finished, so that an interrupted or killed study resumes. The cache key of a run is
everything that it depends on (`cache_key_of`).
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from meta_train.evaluation.cache import Cache, CacheKey, Run
from meta_train.evaluation.curve import running_mean
from meta_train.evaluation.loop import train
from meta_train.evaluation.optimizers import Contender, Learned, Setting, fingerprint
from meta_train.evaluation.source_text import source_text
from meta_train.evaluation.task import Task

LOOP = 1  # version of `loop.train` and `Setting.factor`; raise it when they change the result of a run

OPTIMIZER_PACKAGES = ("pytorch_optimizer", "schedulefree")  # their versions are part of the key


class Job(NamedTuple):
    """One run."""

    task: Task
    setting: Setting
    seed: int


@dataclass(frozen=True)
class Result:
    """The result of a contender on a task.

    Attributes:
        task: The task.
        contender: The contender.
        setting: The setting selected on seed 0.
        runs: With it, one per seed.
    """

    task: Task
    contender: Contender
    setting: Setting
    runs: list[Run]


def final_loss(run: Run) -> float:
    """The running mean of the training loss after the last step; the tuning criterion by default."""
    return float(running_mean(run.losses)[-1])


def best_held_out_loss(run: Run) -> float:
    """The lowest held-out loss; the tuning criterion of the published protocol."""
    return min((scores["loss"] for _, scores in run.held_out), default=float("inf"))


def final_held_out_loss(run: Run) -> float:
    """The held-out loss after the last step; infinite if training broke off."""
    return run.held_out[-1][1]["loss"] if math.isfinite(run.losses[-1]) else float("inf")


@dataclass(frozen=True)
class Study:
    """Tasks, contenders and seeds.

    Args:
        tasks: The tasks.
        contenders: The optimizers, each with its grid of settings.
        seeds: Seeds per task and contender.
        data: The data folder.
        cache: Folder of finished runs.
        criterion: The tuning criterion; the setting with its lowest value is selected.
        selected: (Task, contender), by name -> the setting that a previous study selected, as text; not tuned again.
    """

    tasks: Sequence[Task]
    contenders: Sequence[Contender]
    seeds: int
    data: Path
    cache: Path
    criterion: Callable[[Run], float] = final_loss
    selected: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def run(self, workers: int) -> list[Result]:
        """Train the missing runs, in `workers` processes, and return the result of every task and contender.

        Raises:
            FileNotFoundError: A data file is missing.
            ValueError: A setting that a previous study selected is not in the grid.
        """
        for name in sorted({file for task in self.tasks for file in task.files}):
            if not (self.data / name).is_file():
                raise FileNotFoundError(
                    f"expected {name} in the data folder, found none in {self.data}; give the folder with --data"
                )
        grids = {(t.name, c.name): self._grid(t, c) for t in self.tasks for c in self.contenders}
        by_name = {task.name: task for task in self.tasks}
        grid_jobs = [Job(by_name[name], s, 0) for (name, _), settings in grids.items() for s in settings]
        untuned = {names: settings[0] for names, settings in grids.items() if len(settings) == 1}
        self._train([*grid_jobs, *self._other_seeds(untuned)], workers, "runs")
        best = {
            names: min(settings, key=lambda s: self.criterion(self._cached(Job(by_name[names[0]], s, 0))))
            for names, settings in grids.items()
        }
        self._train(self._other_seeds(best), workers, "tuned")
        return [
            Result(
                task,
                contender,
                setting := best[task.name, contender.name],
                [self._cached(Job(task, setting, seed)) for seed in range(self.seeds)],
            )
            for task in self.tasks
            for contender in self.contenders
        ]

    def _grid(self, task: Task, contender: Contender) -> tuple[Setting, ...]:
        """The settings of a contender to try on a task."""
        selected = self.selected.get((task.name, contender.name))
        if selected is None:
            return contender.grid
        matching = tuple(setting for setting in contender.grid if str(setting) == selected)
        if not matching:
            raise ValueError(
                f"expected a setting of {contender.name} on {task.name} from {[str(s) for s in contender.grid]}, found "
                f"{selected!r} in the previous report; tune again, without --tuned"
            )
        return matching

    def _other_seeds(self, settings: dict[tuple[str, str], Setting]) -> list[Job]:
        """The jobs of settings, by names of task and contender, on all seeds except 0."""
        by_name = {task.name: task for task in self.tasks}
        return [Job(by_name[name], s, seed) for (name, _), s in settings.items() for seed in range(1, self.seeds)]

    def _cached(self, job: Job) -> Run:
        run = Cache(self.cache).get(cache_key_of(job, self.data))
        assert run is not None, f"the run {job} is missing from {self.cache}"
        return run

    def _train(self, jobs: Iterable[Job], workers: int, title: str) -> None:
        """Train the jobs that are not cached yet."""
        from tqdm import tqdm  # noqa: PLC0415 - an extra

        cached = Cache(self.cache)
        by_path = {cached.path(key := cache_key_of(job, self.data)): (job, key) for job in jobs}
        missing = [(job, key) for job, key in by_path.values() if cached.get(key) is None]
        if not missing:
            return
        with (
            ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _init_worker) as pool,
            tqdm(total=len(by_path), initial=len(by_path) - len(missing), desc=title, dynamic_ncols=True) as progress,
        ):
            futures = {pool.submit(_train_job, job, key, self.data, self.cache): job for job, key in missing}
            try:
                for future in as_completed(futures):
                    loss = future.result()
                    task, setting, seed = futures[future]
                    line = f"{task.name}: {setting.name} {setting}, seed {seed}, loss {loss:.4g}"
                    progress.set_postfix_str(line, refresh=False)
                    progress.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def cache_key_of(job: Job, data: Path) -> CacheKey:
    """Everything that a run depends on."""
    task, setting, seed = job
    make = setting.make
    optimizer = [_fingerprint(make.rule), make.without_symmetry] if isinstance(make, Learned) else _source_text(make)
    packages = (*task.packages, *(name for name in OPTIMIZER_PACKAGES if name in str(optimizer)))
    return {
        "task": [_source_text(task.begin), task.steps, task.checks, task.weight_decay],
        "files": {name: _checksum(data / name) for name in task.files},
        "packages": {name: version(name) for name in packages},
        "optimizer": optimizer,
        "setting": [setting.lr, setting.cosine, setting.warmup, setting.horizon_known],
        "seed": seed,
        "torch": torch.__version__,
        "loop": LOOP,
    }


_source_text = cache(source_text)
_fingerprint = cache(fingerprint)


@cache
def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _train_job(job: Job, key: CacheKey, data: Path, cache: Path) -> float:
    """In a worker: train a run and cache it, unless another command has. Returns its final loss."""
    cached = Cache(cache)
    run = cached.get(key)
    if run is None:
        run = train(*job, data)
        cached.put(key, run)
    return final_loss(run)


def _init_worker() -> None:
    """Use one thread, finish the run on Ctrl-C, and exit when the parent does, even if it is killed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
