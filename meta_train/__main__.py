"""Meta-train update rules from the command line.

python -m meta_train recipes
python -m meta_train train digits --out runs/digits
python -m meta_train resume runs/digits
torchrun --nproc-per-node 2 -m meta_train train broad --out runs/broad
python -m meta_train evaluate --rule runs/digits/theta.safetensors
tensorboard --logdir runs
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from meta_train import checkpoint
from meta_train import tasks as task_families
from meta_train.config import Config
from meta_train.distributed import own_rank
from meta_train.evaluate import evaluate
from meta_train.meta_gradient import Estimator
from meta_train.recipes import RECIPES
from meta_train.tasks import TaskDistribution
from meta_train.tasks.folder import use_folder
from meta_train.trainer import BEST, THETA
from meta_train.trainer import train as run_trainer


@dataclass(frozen=True)
class Changes:
    """What to change in the recipe; what is not given stays as the recipe says.

    Args:
        initial: Name or file of the rule to start from.
        iterations: Updates of theta that the learning rate is scheduled for.
        until: Updates of theta after which to stop, if earlier.
        minutes: Wall-clock after which to stop, resumed sessions included.
        patience: Validations without improvement after which to stop.
        tasks: Tasks from whose windows one meta-gradient is estimated; a multiple of the processes.
        members: Members of a task trained side by side.
        slots: Tasks under way at once; a multiple of tasks.
        estimator: How the meta-gradient is estimated.
        polish: Iteration from which "pes" takes over.
        sigma: Standard deviation of the perturbations of theta, with "es" and "pes".
        window: Steps from which one estimate is made; 0 for whole inner runs.
        horizon: Shortest and longest inner run, in steps.
        restart: Share of the inner runs that go on with trained networks and a new optimizer.
        curriculum: Iterations over which the longest inner run grows from the shortest.
        measure: What is minimised: "log" of the mean loss, "mean" or "last" loss over the first.
        averaged: Share of the objective that is measured at the average of a window's parameters, 0 to 1.
        tail: Share of a window's steps, the last ones, that the objective counts.
        held_out: Whether the objective is measured on data held out from inner training.
        expert: Optimizer to be imitated at first.
        imitation: Weight of the imitation at the first iteration.
        imitate: Iterations over which the imitation is annealed away.
        second_order: Whether inner gradients are differentiated too.
        segment: Steps between two points of a window at which activations are kept; 0 keeps all.
        lr: Peak learning rate of theta, per iteration.
        clip: Largest norm of a meta-gradient.
        reject: Members' meta-gradients of larger norm are left out.
        average: Decay of the moving average of theta that is exported, per iteration.
        reach: Share of the way from the beginning to that average at which the exported theta stands, 0 to 1.
        seed: Of everything random.
        checkpoint_every: Iterations between checkpoints.
        validate_every: Iterations between validations.
        device: Where inner training takes place: cpu, cuda.
    """

    initial: str | None = None
    iterations: int | None = None
    until: int | None = None
    minutes: float | None = None
    patience: int | None = None
    tasks: int | None = None
    members: int | None = None
    slots: int | None = None
    estimator: Estimator | None = None
    polish: int | None = None
    sigma: float | None = None
    window: int | None = None
    horizon: tuple[int, int] | None = None
    restart: float | None = None
    curriculum: int | None = None
    measure: Literal["log", "mean", "last"] | None = None
    averaged: float | None = None
    tail: float | None = None
    held_out: bool | None = None
    expert: Literal["adamw", "muon"] | None = None
    imitation: float | None = None
    imitate: int | None = None
    second_order: bool | None = None
    segment: int | None = None
    lr: float | None = None
    clip: float | None = None
    reject: float | None = None
    average: float | None = None
    reach: float | None = None
    seed: int | None = None
    checkpoint_every: int | None = None
    validate_every: int | None = None
    device: str | None = None


OF_OBJECTIVE = ("measure", "averaged", "tail", "held_out")


def config_of(describe: dict[str, Any]) -> Config:
    """The configuration that a recipe and changes to it make.

    Args:
        describe: `recipe`, a name; `changes`, by name; `data`, the folder with data files or None.
    """
    use_folder(describe.get("data"))
    config = RECIPES[describe["recipe"]]()
    changes: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in describe["changes"].items()}
    objective = replace(config.objective, **{name: changes.pop(name) for name in OF_OBJECTIVE if name in changes})
    return replace(config, objective=objective, **changes)


def train(
    recipe: Annotated[str, tyro.conf.Positional],
    out: Path,
    data: Path | None = None,
    changes: Annotated[Changes, tyro.conf.arg(name="")] = Changes(),
) -> None:
    """Start a meta-training run.

    Args:
        recipe: The name of a recipe; `recipes` lists them.
        out: Folder for checkpoints, theta and TensorBoard events.
        data: Folder with data files that do not travel inside packages; `tasks` says who reads what.
        changes: What to change in the recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"expected the name of a recipe, one of {sorted(RECIPES)}, found {recipe!r}")
    changed = {key: value for key, value in vars(changes).items() if value is not None}
    _run({"recipe": recipe, "changes": changed, "data": None if data is None else str(data.resolve())}, out)


def resume(out: Annotated[Path, tyro.conf.Positional]) -> None:
    """Continue a meta-training run from its checkpoint, bit for bit.

    Args:
        out: The folder that `train --out` was given.
    """
    _run(checkpoint.load(out)["describe"], out, resume=True)


def _run(describe: dict[str, Any], out: Path, *, resume: bool = False) -> None:
    run_trainer(config_of(describe), out, describe, resume=resume)
    if own_rank() == 0:
        written = [out / name for name in (THETA, BEST) if (out / name).exists()]
        sys.stdout.write(f"wrote {' and '.join(map(str, written))}\n")


def recipes() -> None:
    """List the recipes."""
    for name, recipe in RECIPES.items():
        sys.stdout.write(f"{name:<12}{(recipe.__doc__ or '').splitlines()[0]}\n")


def tasks() -> None:
    """List the families of tasks that recipes are made of."""
    for name in task_families.__all__:
        family = getattr(task_families, name)
        if isinstance(family, type) and issubclass(family, TaskDistribution) and family is not TaskDistribution:
            sys.stdout.write(f"{name:<26}{(family.__doc__ or '').splitlines()[0]}\n")


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "resume": resume,
    "evaluate": evaluate,
    "recipes": recipes,
    "tasks": tasks,
}


def main() -> None:
    """Parse the command line; a wrong input ends with one line and exit status 1."""
    torch.set_num_threads(1)
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="python -m meta_train", description=(__doc__ or "").splitlines()[0]
        )
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; continue with `python -m meta_train resume DIR`, an evaluation with the same command")


if __name__ == "__main__":
    main()
