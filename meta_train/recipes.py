"""Recipes: functions that return the `Config` of a meta-training run. Add your own here, or call `train` with one."""

from __future__ import annotations

from collections.abc import Callable

from meta_train.config import Config
from meta_train.objective import Objective
from meta_train.tasks import (
    Augment,
    AutoencoderDistribution,
    CNNDistribution,
    GRUDistribution,
    INRDistribution,
    Mixture,
    MLPDistribution,
    NgramDistribution,
    QuadraticDistribution,
    TransformerDistribution,
    VectorDistribution,
    ViTDistribution,
    has_file,
)
from meta_train.validation import Validation
from nfn_optim.rule import RuleConfig


def digits() -> Config:
    """MLPs of many shapes on scikit-learn's 8x8 digits; the recipe of the first shipped rule.

    Stopped after a quarter of its schedule, where development tasks other than digits were learned fastest.
    """
    return Config(
        rule=RuleConfig(power=1.0, cooldown=0.2),
        validation=Validation((MLPDistribution(),) * 4, members=4, steps=400),
        iterations=2000,
        until=500,
        window=40,
        objective=Objective(averaged=0.5),
        validate_every=50,
    )


def broad() -> Config:
    """All families of tasks.

    Images and text come from packages; MNIST and Shakespeare join them if the data folder has them
    (`meta_train.tasks.folder`). A run must be resumed with the data that it was started with.
    """
    images = ("digits", "mnist5k", *(("mnist",) if has_file("mnist.npz") else ()))
    texts = ("prose", "code", *(("shakespeare",) if has_file("tinyshakespeare.txt") else ()))
    families = Mixture(
        (
            (MLPDistribution(), 4.0),
            (CNNDistribution(data=(*images, "mnist14")), 3.0),
            (ViTDistribution(data=(*images, "mnist16")), 1.0),
            (TransformerDistribution(data=texts), 2.5),
            (GRUDistribution(data=texts), 1.5),
            (NgramDistribution(data=texts), 1.0),
            (VectorDistribution(), 2.0),
            (AutoencoderDistribution(data=images), 1.5),
            (INRDistribution(), 1.0),
            (QuadraticDistribution(), 0.5),
        )
    )
    return Config(
        rule=RuleConfig(power=1.0, cooldown=0.2),
        distribution=families,
        validation=validation(),
        iterations=2000,
        tasks=4,
        members=6,
        slots=32,
        window=40,
        restart=0.15,
        objective=Objective(averaged=0.75),
        reject=100.0,
        checkpoint_every=50,
        validate_every=50,
    )


def validation() -> Validation:
    """Fixed tasks of several kinds, wider than those trained on, for choosing the best theta."""
    return Validation(
        (
            MLPDistribution(width=(96, 192), zooms=(2,)),
            CNNDistribution(data=("mnist14",)),
            TransformerDistribution(data=("code",), width=(32, 48)),
            GRUDistribution(data=("code",)),
            AutoencoderDistribution(data=("mnist5k",)),
        ),
        steps=300,
    )


def smoke() -> Config:
    """A minute's worth: tiny MLPs, few iterations; shows that everything runs."""
    return Config(
        rule=RuleConfig(hidden=4, power=1.0),
        distribution=MLPDistribution(width=(4, 8), batch_size=(8, 16), zooms=(1,), augment=Augment(0.5, 0.0, 0.0)),
        validation=Validation((MLPDistribution(width=(8, 12), batch_size=(8, 16), zooms=(1,)),), steps=40),
        iterations=60,
        lr=4e-3,
        members=2,
        slots=3,
        window=5,
        horizon=(10, 30),
        warmup=5,
        checkpoint_every=5,
        validate_every=20,
    )


RECIPES: dict[str, Callable[[], Config]] = {recipe.__name__: recipe for recipe in (digits, broad, smoke)}
