"""Which runs a benchmark is made of, and having them made: tuned on seed 0, then run on all seeds.

Every run that is finished is kept at once, so a study that was stopped, or killed, continues where it was. A run is
kept under all that it depends on (`stamp_of`).
"""

from __future__ import annotations

import hashlib
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

from meta_train.evaluation.cache import Cache, Run, Stamp
from meta_train.evaluation.curve import running_mean
from meta_train.evaluation.definition import definition_of
from meta_train.evaluation.loop import train
from meta_train.evaluation.optimizers import Entry, Learned, Setting, fingerprint
from meta_train.evaluation.task import Task

LOOP = 1  # raise it when `loop.train` or `Setting.factor` change what a run gives


class Job(NamedTuple):
    """One run."""

    task: Task
    setting: Setting
    seed: int


@dataclass(frozen=True)
class Result:
    """What an entry did on a task.

    Attributes:
        task: The task.
        entry: The entry.
        setting: The one that was chosen on seed 0.
        runs: With it, one for each seed.
    """

    task: Task
    entry: Entry
    setting: Setting
    runs: list[Run]


def final_loss(run: Run) -> float:
    """The training loss at the end, mean over the last batches: what optimizers are tuned for."""
    return float(running_mean(run.losses)[-1])


def best_held_out_loss(run: Run) -> float:
    """The lowest loss on other data; what the published protocol tunes for."""
    return min((scores["loss"] for _, scores in run.held_out), default=float("inf"))


@dataclass(frozen=True)
class Study:
    """Tasks, entries and seeds.

    Args:
        tasks: What is trained.
        entries: By what.
        seeds: How often.
        data: The data folder.
        cache: Where finished runs are kept.
        criterion: What of a run is lowest for the best setting of a grid.
        known: (Task, entry), by name -> the setting that another study has chosen, as text; it is not looked for again.
    """

    tasks: Sequence[Task]
    entries: Sequence[Entry]
    seeds: int
    data: Path
    cache: Path
    criterion: Callable[[Run], float] = final_loss
    known: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def run(self, workers: int) -> list[Result]:
        """Make the missing runs, in that many processes, and return the results of every task and entry.

        Raises:
            FileNotFoundError: A data file is missing.
            ValueError: A setting that another study has chosen is not in the grid.
        """
        for name in sorted({file for task in self.tasks for file in task.files}):
            if not (self.data / name).is_file():
                raise FileNotFoundError(
                    f"expected {name} in the data folder, found none in {self.data}; give the folder with --data"
                )
        grids = {(t.name, e.name): self._grid(t, e) for t in self.tasks for e in self.entries}
        by_name = {task.name: task for task in self.tasks}
        first = [Job(by_name[name], s, 0) for (name, _), settings in grids.items() for s in settings]
        alone = {names: settings[0] for names, settings in grids.items() if len(settings) == 1}
        self._make([*first, *self._on_other_seeds(alone)], workers, "runs")
        chosen = {
            names: min(settings, key=lambda s: self.criterion(self._kept(Job(by_name[names[0]], s, 0))))
            for names, settings in grids.items()
        }
        self._make(self._on_other_seeds(chosen), workers, "tuned")
        return [
            Result(
                task,
                entry,
                setting := chosen[task.name, entry.name],
                [self._kept(Job(task, setting, seed)) for seed in range(self.seeds)],
            )
            for task in self.tasks
            for entry in self.entries
        ]

    def _grid(self, task: Task, entry: Entry) -> tuple[Setting, ...]:
        """The settings of an entry that are to be tried on a task."""
        known = self.known.get((task.name, entry.name))
        if known is None:
            return entry.grid
        found = tuple(setting for setting in entry.grid if str(setting) == known)
        if not found:
            raise ValueError(
                f"expected a setting of {entry.name} on {task.name} out of {[str(s) for s in entry.grid]}, found "
                f"{known!r} in the other report; tune again, without --tuned"
            )
        return found

    def _on_other_seeds(self, settings: dict[tuple[str, str], Setting]) -> list[Job]:
        """The jobs of chosen settings, by names of task and entry, but for seed 0."""
        by_name = {task.name: task for task in self.tasks}
        return [Job(by_name[name], s, seed) for (name, _), s in settings.items() for seed in range(1, self.seeds)]

    def _kept(self, job: Job) -> Run:
        run = Cache(self.cache).get(stamp_of(job, self.data))
        assert run is not None, f"the run {job} is gone from {self.cache}"
        return run

    def _make(self, jobs: Iterable[Job], workers: int, title: str) -> None:
        """Make the jobs that are not kept yet."""
        from tqdm import tqdm  # noqa: PLC0415 - an extra

        kept = Cache(self.cache)
        stamps = {kept.path(stamp := stamp_of(job, self.data)): (job, stamp) for job in jobs}
        missing = {path: found for path, found in stamps.items() if kept.get(found[1]) is None}
        if not missing:
            return
        with (
            ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker) as pool,
            tqdm(total=len(stamps), initial=len(stamps) - len(missing), desc=title, dynamic_ncols=True) as progress,
        ):
            futures = {pool.submit(_make_one, *found, self.data, self.cache): found[0] for found in missing.values()}
            try:
                for future in as_completed(futures):
                    final = future.result()
                    task, setting, seed = futures[future]
                    now = f"{task.name}: {setting.name} {setting}, seed {seed}, loss {final:.4g}"
                    progress.set_postfix_str(now, refresh=False)
                    progress.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def stamp_of(job: Job, data: Path) -> Stamp:
    """All that a run depends on."""
    task, setting, seed = job
    make = setting.make
    optimizer = [_fingerprint(make.rule), make.apart] if isinstance(make, Learned) else _definition(make)
    return {
        "task": [_definition(task.begin), task.steps, task.checks],
        "files": {name: _checksum(data / name) for name in task.files},
        "packages": {name: version(name) for name in task.packages},
        "optimizer": optimizer,
        "setting": [setting.lr, setting.cosine, setting.warmup, setting.told],
        "seed": seed,
        "torch": torch.__version__,
        "loop": LOOP,
    }


_definition = cache(definition_of)
_fingerprint = cache(fingerprint)


@cache
def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_one(job: Job, stamp: Stamp, data: Path, cache: Path) -> float:
    """In a worker: make a run and keep it, unless another command has. Returns its final loss."""
    kept = Cache(cache)
    run = kept.get(stamp)
    if run is None:
        run = train(*job, data)
        kept.put(stamp, run)
    return final_loss(run)


def _begin_worker() -> None:
    """One thread, runs finished on Ctrl-C, and no life after the parent, not even after `kill -9` of it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
