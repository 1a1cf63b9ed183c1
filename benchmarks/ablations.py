"""What every part of the shipped rule is good for: the rule without it, on development tasks.

    python benchmarks/ablations.py --data FOLDER

Nothing is trained anew: a part is taken out of theta, or out of the configuration, and the rest stays; but for the line
`before meta-training`, where the recipe begins. Writes `ablations.md` and `.json` into `benchmarks/results`; a minute a
line and seed on two cores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from meta_train.evaluate import Folders, evaluate
from meta_train.recipes import PLAIN
from nfn_optim import UpdateRule, pretrained
from nfn_optim.layers.incidence import ROLES

Change = Callable[[UpdateRule], UpdateRule]


def configured(rule: UpdateRule, **config: object) -> UpdateRule:
    """The same theta under another configuration, as far as that has a place for it."""
    made = UpdateRule(replace(rule.config, **config))  # type: ignore[arg-type]
    made.load_state_dict({n: v for n, v in rule.state_dict().items() if n in made.state_dict()})
    return made


@torch.no_grad()
def without(rule: UpdateRule, *names: str) -> UpdateRule:
    """Theta with zeros for some tensors."""
    made = configured(rule)
    for name in names:
        made.get_parameter(name).zero_()
    return made


@torch.no_grad()
def with_direction_alone(rule: UpdateRule) -> UpdateRule:
    """The same without the combination of features that is added to the direction."""
    rule.stack.read_tensors.bias[:-1] = 0
    return rule


@torch.no_grad()
def with_gain(rule: UpdateRule, gain: float) -> UpdateRule:
    """The same with another gain: where steps do not grow, the one that was best without it."""
    fresh = UpdateRule(replace(rule.config, gain=gain))
    rule.stack.read_tensors.bias[-1] = fresh.stack.read_tensors.bias[-1]
    return rule


VARIANTS: dict[str, Change] = {
    "shipped": configured,
    "before meta-training": lambda _rule: UpdateRule(PLAIN),
    "no orthogonal directions": lambda rule: without(rule, "share"),
    "steps do not grow": lambda rule: with_gain(configured(rule, growth=0.0, waning=0.0), 5.0),
    "rank 8": lambda rule: configured(rule, rank=8),
    "scale does not count": lambda rule: without(rule, "power"),
    "rows and columns say nothing": lambda rule: without(rule, *(f"stack.bypass_rows.{role}.weight" for role in ROLES)),
    "the direction alone": lambda rule: with_direction_alone(configured(rule)),
    "falls linearly, does not fade": lambda rule: configured(rule, bend=1.0, fading=0.0),
}


FOLDERS = Folders(out=Path("runs/ablations"))
RESULTS = Path("benchmarks/results")
HEAD = """| rule | step reduction | loss reduction | loss as good | told: steps | loss | as good |
|---|---|---|---|---|---|---|"""


def page(summaries: Sequence[dict[str, Any]]) -> str:
    """A line for every variant: not told the horizon, and told."""
    by_name = {summary["optimizer"]: summary for summary in summaries}
    lines = []
    for name in VARIANTS:
        if name in by_name:
            cells = [cell for found in (by_name[name], by_name[f"{name}, told"]) for cell in cells_of(found)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([HEAD, *lines]) + "\n"


def cells_of(summary: dict[str, Any]) -> tuple[str, str, str]:
    """Interquartile means, and the share of the tasks."""
    reduction, loss = (summary[key][0] for key in ("reduction", "loss_reduction"))
    return f"{reduction:.2f}", f"{loss:.2f}", f"{100 * summary['as_good']:.0f} %"


def main(
    variants: tuple[str, ...] = tuple(VARIANTS),
    seeds: int = 1,
    workers: int = 2,
    folders: Annotated[Folders, tyro.conf.arg(name="")] = FOLDERS,
) -> None:
    """Evaluate the shipped rule without its parts.

    Args:
        variants: Which ones.
        seeds: Of every task.
        workers: Processes, one thread each.
        folders: Where data are, what is finished is kept, and the long report goes.
    """
    rule, paths = pretrained.load(), []
    for name in variants:
        path = folders.out / name / "theta.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        pretrained.save(VARIANTS[name](rule), path)
        paths.append(str(path))
    evaluate("development", rule=tuple(paths), seeds=seeds, workers=workers, folders=folders)
    content = json.loads((folders.out / "development.json").read_text())
    (RESULTS / "ablations.md").write_text(page(content["summary"]))
    (RESULTS / "ablations.json").write_text(json.dumps(content["summary"], indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
