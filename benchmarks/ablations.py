"""Ablations of the rule `default_1`, on development tasks.

    python benchmarks/ablations.py --data FOLDER

No rule is retrained: each variant removes a part from theta or from the configuration and keeps the rest, but for
`before meta-training`, the rule that the recipe starts from. Writes `ablations_default_1.md` and `.json` to
`benchmarks/results`; a minute per variant and seed on two cores.
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
from meta_train.evaluation.optimizers import horizon_known_label
from meta_train.recipes import PLAIN
from nfn_optim import UpdateRule, pretrained
from nfn_optim.layers.incidence import ROLES

Change = Callable[[UpdateRule], UpdateRule]


def configured(rule: UpdateRule, **config: object) -> UpdateRule:
    """The same theta under another configuration, without parameters that it does not have."""
    variant = UpdateRule(replace(rule.config, **config))  # type: ignore[arg-type]
    variant.load_state_dict({n: v for n, v in rule.state_dict().items() if n in variant.state_dict()})
    return variant


@torch.no_grad()
def without(rule: UpdateRule, *names: str) -> UpdateRule:
    """The rule with some parameters set to zero."""
    variant = configured(rule)
    for name in names:
        variant.get_parameter(name).zero_()
    return variant


@torch.no_grad()
def with_direction_alone(rule: UpdateRule) -> UpdateRule:
    """The rule without the combination of features that is added to the direction."""
    rule.network.message_passing.tensor_bias[:-1] = 0
    return rule


@torch.no_grad()
def with_gain(rule: UpdateRule, gain: float) -> UpdateRule:
    """The rule with another gain: the best one without step-size adaptation."""
    fresh = UpdateRule(replace(rule.config, gain=gain))
    rule.network.message_passing.tensor_bias[-1] = fresh.network.message_passing.tensor_bias[-1]
    return rule


VARIANTS: dict[str, Change] = {
    "shipped": configured,
    "before meta-training": lambda _rule: UpdateRule(PLAIN),
    "no orthogonal directions": lambda rule: configured(rule, direction="adam"),
    "no step-size adaptation": lambda rule: with_gain(configured(rule, adapt_rate=0.0, adapt_decay=0.0), 5.0),
    "rank 8": lambda rule: configured(rule, rank=8),
    "no scaling by parameter RMS": lambda rule: without(rule, "network.power"),
    "no row and column features": lambda rule: without(
        rule, *(f"network.message_passing.row_skip.{role}.weight" for role in ROLES)
    ),
    "direction only": lambda rule: with_direction_alone(configured(rule)),
    "linear cooldown, no inverse-time decay": lambda rule: configured(rule, cooldown_power=1.0, inverse_time_power=0.0),
}


FOLDERS = Folders(out=Path("runs/ablations"))
RESULTS = Path("benchmarks/results")
HEAD = """| rule | step reduction | loss reduction | loss as good | horizon known: steps | loss | as good |
|---|---|---|---|---|---|---|"""


def page(summaries: Sequence[dict[str, Any]]) -> str:
    """One line per variant: with the horizon unknown and known."""
    by_name = {summary["optimizer"]: summary for summary in summaries}
    lines = []
    for name in VARIANTS:
        if name in by_name:
            cells = [
                cell for summary in (by_name[name], by_name[horizon_known_label(name)]) for cell in cells_of(summary)
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([HEAD, *lines]) + "\n"


def cells_of(summary: dict[str, Any]) -> tuple[str, str, str]:
    """Interquartile means, and the fraction of tasks with a loss as good as the reference's."""
    reduction, loss = (summary[key][0] for key in ("reduction", "loss_reduction"))
    return f"{reduction:.2f}", f"{loss:.2f}", f"{100 * summary['as_good']:.0f} %"


def main(
    variants: tuple[str, ...] = tuple(VARIANTS),
    seeds: int = 1,
    workers: int = 2,
    folders: Annotated[Folders, tyro.conf.arg(name="")] = FOLDERS,
) -> None:
    """Evaluate variants of the rule.

    Args:
        variants: Names of variants.
        seeds: Seeds per task.
        workers: Processes, one thread each.
        folders: Folders of the data, the cache and the full report.
    """
    rule, paths = pretrained.load("default_1"), []
    for name in variants:
        path = folders.out / name / "theta.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        pretrained.save(VARIANTS[name](rule), path)
        paths.append(str(path))
    evaluate("development", rule=tuple(paths), seeds=seeds, workers=workers, folders=folders)
    content = json.loads((folders.out / "development.json").read_text())
    (RESULTS / "ablations_default_1.md").write_text(page(content["summary"]))
    (RESULTS / "ablations_default_1.json").write_text(json.dumps(content["summary"], indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
