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
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import torch
import tyro

from meta_train import checkpoint
from meta_train import tasks as task_families
from meta_train.config import Config
from meta_train.distributed import own_rank
from meta_train.evaluate import evaluate
from meta_train.recipes import RECIPES
from meta_train.tasks import TaskDistribution
from meta_train.tasks.folder import use_folder
from meta_train.trainer import BEST, THETA
from meta_train.trainer import train as run_trainer

NOT_FLAGS = ("rule", "distribution", "validation")  # fields of `Config` that only a recipe sets


def overrides_of(config: type[Any]) -> type[Any]:
    """A dataclass of the fields of a configuration as flags, with its docstring for help; None for "as in the recipe".

    The fields of nested configurations become flags of the same level.
    """
    types = get_type_hints(config)
    flags: list[Any] = []
    for name in (f.name for f in fields(config) if f.name not in NOT_FLAGS):
        if is_dataclass(types[name]):
            inner = overrides_of(cast(type[Any], types[name]))
            flags.append((name, Annotated[inner, tyro.conf.arg(name="")], field(default_factory=inner)))
        else:
            flags.append((name, types[name] | None, None))
    return make_dataclass(f"{config.__name__}Overrides", flags, namespace={"__doc__": config.__doc__})


Overrides = overrides_of(Config)
NO_OVERRIDES = Overrides()


def changes_of(overrides: Any) -> dict[str, Any]:
    """The flags that were given, by the names of the fields; those of nested configurations in a dictionary."""
    values = {name: changes_of(v) if is_dataclass(v) else v for name, v in vars(overrides).items()}
    return {name: value for name, value in values.items() if value is not None and value != {}}


def config_of(describe: dict[str, Any]) -> Config:
    """The configuration of a recipe with changes.

    Args:
        describe: `recipe`, a name; `changes`, by field; `data`, the data folder or None.
    """
    use_folder(describe.get("data"))
    config = RECIPES[describe["recipe"]]()
    changes: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in describe["changes"].items()}
    objective = replace(config.objective, **changes.pop("objective", {}))
    return replace(config, objective=objective, **changes)


def train(
    recipe: Annotated[str, tyro.conf.Positional],
    out: Path,
    data: Path | None = None,
    overrides: Annotated[Any, tyro.conf.arg(name="", constructor=Overrides)] = NO_OVERRIDES,
) -> None:
    """Start a meta-training run.

    Args:
        recipe: Name of a recipe; `recipes` lists them.
        out: Folder for checkpoints, theta and TensorBoard events.
        data: Folder with data files that are not part of packages.
        overrides: Changes to the recipe; None leaves a field as in the recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"expected the name of a recipe, one of {sorted(RECIPES)}, found {recipe!r}")
    folder = None if data is None else str(data.resolve())
    _run({"recipe": recipe, "changes": changes_of(overrides), "data": folder}, out)


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
    """List the families of training tasks."""
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
    """Parse the command line; invalid input prints one line and exits with status 1."""
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
