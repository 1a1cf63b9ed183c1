"""Recipes: functions that return the `Config` of a meta-training run. Add your own here, or call `train` with one."""

from __future__ import annotations

from collections.abc import Callable

from meta_train.tasks import Augment, MLPDistribution
from meta_train.trainer import Config
from nfn_optim.rule import RuleConfig


def digits() -> Config:
    """MLPs of many shapes on scikit-learn's 8x8 digits; the recipe of the first shipped rule."""
    return Config(rule=RuleConfig(power=1.0), iterations=500, window=40, averaged=0.5)


def smoke() -> Config:
    """A minute's worth: tiny MLPs, few iterations; shows that everything runs."""
    return Config(
        rule=RuleConfig(hidden=4, power=1.0),
        distribution=MLPDistribution(width=(4, 8), batch_size=(8, 16), zooms=(1,), augment=Augment(0.5, 0.0, 0.0)),
        iterations=60,
        lr=4e-3,
        members=2,
        slots=3,
        window=5,
        horizon=(10, 30),
        warmup=5,
        checkpoint_every=5,
    )


RECIPES: dict[str, Callable[[], Config]] = {recipe.__name__: recipe for recipe in (digits, smoke)}
