"""Meta-train update rules from the command line.

python -m meta_train train digits --out runs/digits
python -m meta_train resume runs/digits
python -m meta_train evaluate --rule runs/digits/theta.safetensors
tensorboard --logdir runs
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from meta_train import checkpoint
from meta_train.evaluate import evaluate
from meta_train.recipes import RECIPES
from meta_train.trainer import THETA, Config
from meta_train.trainer import train as run_trainer


def _config(describe: dict[str, Any]) -> Config:
    return replace(RECIPES[describe["recipe"]](), **describe["changes"])


@dataclass(frozen=True)
class Changes:
    """What to change in the recipe.

    Args:
        start: Name or file of the rule to start from.
        iterations: Updates of theta that the learning rate is scheduled for.
        until: Updates of theta after which to stop, if earlier.
        members: Members of a task trained side by side.
        window: Steps differentiated at once.
        lr: Peak learning rate of theta, per iteration.
        reject: Meta-gradients of larger norm are dropped.
        second_order: Whether inner gradients are differentiated too.
        averaged: Share of the objective that is measured at the average of a window's parameters, 0 to 1.
        average: Decay of the moving average of theta that is exported, per iteration.
        seed: Of everything random.
    """

    start: str | None = None
    iterations: int | None = None
    until: int | None = None
    members: int | None = None
    window: int | None = None
    lr: float | None = None
    reject: float | None = None
    second_order: bool | None = None
    averaged: float | None = None
    average: float | None = None
    seed: int | None = None


def train(
    recipe: Annotated[str, tyro.conf.Positional],
    out: Path,
    changes: Annotated[Changes, tyro.conf.arg(name="")] = Changes(),
) -> None:
    """Start a meta-training run.

    Args:
        recipe: The name of a recipe; `recipes` lists them.
        out: Folder for checkpoint, theta and TensorBoard events.
        changes: What to change in the recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"expected the name of a recipe, one of {sorted(RECIPES)}, found {recipe!r}")
    describe = {"recipe": recipe, "changes": {key: value for key, value in vars(changes).items() if value is not None}}
    run_trainer(_config(describe), out, describe)
    sys.stdout.write(f"wrote {out / THETA}\n")


def resume(out: Annotated[Path, tyro.conf.Positional]) -> None:
    """Continue a meta-training run from its checkpoint, bit for bit.

    Args:
        out: The folder that `train --out` was given.
    """
    describe = checkpoint.load(out)["describe"]
    run_trainer(_config(describe), out, describe, resume=True)
    sys.stdout.write(f"wrote {out / THETA}\n")


def recipes() -> None:
    """List the recipes."""
    for name, recipe in RECIPES.items():
        sys.stdout.write(f"{name:<12}{(recipe.__doc__ or '').splitlines()[0]}\n")


def main() -> None:
    """Parse the command line; a wrong input ends with one line and exit status 1."""
    torch.set_num_threads(1)
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"train": train, "resume": resume, "evaluate": evaluate, "recipes": recipes},
            prog="python -m meta_train",
            description=(__doc__ or "").splitlines()[0],
        )
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; continue with `python -m meta_train resume DIR`, an evaluation with the same command")


if __name__ == "__main__":
    main()
