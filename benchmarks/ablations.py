"""What every part of the shipped rule is good for: the rule without it, on development tasks.

    python benchmarks/ablations.py --data FOLDER

Nothing is trained anew: a part is taken out of theta, or out of the configuration, and the rest stays. Writes
`development.md` and its company into `benchmarks/results/ablations`; a minute a line and seed on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from meta_train.evaluate import Folders, evaluate
from nfn_optim import UpdateRule, pretrained

Change = Callable[[UpdateRule], UpdateRule]


def configured(rule: UpdateRule, **config: object) -> UpdateRule:
    """The same theta under another configuration, as far as that has a place for it."""
    made = UpdateRule(replace(rule.config, **config))  # type: ignore[arg-type]
    made.load_state_dict({n: v for n, v in rule.state_dict().items() if n in made.state_dict()})
    return made


@torch.no_grad()
def without(rule: UpdateRule, name: str) -> UpdateRule:
    """Theta with zeros for one tensor."""
    made = configured(rule)
    made.get_parameter(name).zero_()
    return made


VARIANTS: dict[str, Change] = {
    "shipped": configured,
    "no orthogonal directions": lambda rule: without(rule, "share"),
    "rank 8": lambda rule: configured(rule, rank=8),
    "rank 128": lambda rule: configured(rule, rank=128),
    "scale does not count": lambda rule: without(rule, "power"),
    "neurons talk at every step": lambda rule: configured(rule, talk_every=1),
    "falls linearly, does not fade": lambda rule: configured(rule, bend=1.0, fading=0.0),
}


FOLDERS = Folders(out=Path("benchmarks/results/ablations"))


def main(
    variants: tuple[str, ...] = tuple(VARIANTS),
    seeds: int = 1,
    workers: int = 2,
    folders: Folders = FOLDERS,
) -> None:
    """Evaluate the shipped rule without its parts.

    Args:
        variants: Which ones.
        seeds: Of every task.
        workers: Processes, one thread each.
        folders: Where data are, what is finished is kept, and the report goes.
    """
    rule, paths = pretrained.load(), []
    folders.out.mkdir(parents=True, exist_ok=True)
    for name in variants:
        path = Path("runs/ablations") / name / "theta.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        pretrained.save(VARIANTS[name](rule), path)
        paths.append(str(path))
    evaluate("development", rule=tuple(paths), seeds=seeds, workers=workers, folders=folders)


if __name__ == "__main__":
    tyro.cli(main)
