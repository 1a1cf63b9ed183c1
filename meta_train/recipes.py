"""Recipes: functions that return the `Config` of a meta-training run. Add yours to `RECIPES`, or pass it to `train`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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

PLAIN = RuleConfig(
    direction="orthogonal",
    rank=32,
    hidden=0,
    rounds=0,
    power=0.5,
    gain=3.0,
    cooldown=1.0,
    cooldown_power=1.5,
    inverse_time_power=0.75,
    refresh_every=4,
    adapt_rate=4.0,
    adapt_decay=0.16,
)
"""Orthogonal directions for matrices, Adam's for vectors; steps in units of the square root of the parameter RMS, with
step-size adaptation by the gradient cosine and a cooldown.

Without hidden channels: gains are linear in the features of rows and tensors, and coefficients are constant.
"""
UNIVERSAL = replace(PLAIN, hidden=16, rounds=2)
"""The same with hidden channels and two rounds of message passing between features and coefficients."""
BASE = replace(
    PLAIN,
    rank=128,
    exact=True,
    mixes=True,
    gradient_part=0.2,
    shrinkage=0.2,
    whitening=0.5,
    minimax_roots=True,
    beta2=0.99,
    gain=4.5,
)
"""The rule `base`: the newest gradient and whitened momentum are mixed in before singular values are made equal.

Nothing is learned.
"""

MILD = Augment(reparametrise=0.25, label_noise=0.1, pixel_noise=0.5, rescale=0.1, loss_scale=0.3)
"""Augmentation of validation tasks: noise low enough that the loss keeps falling, as on most data."""


def digits() -> Config:
    """MLPs of many shapes on scikit-learn's 8x8 digits; the recipe of the first shipped rule.

    Stopped after a quarter of its schedule, when it was fastest on development tasks other than digits.
    """
    return Config(
        rule=RuleConfig(power=1.0, cooldown=0.2),
        validation=Validation((MLPDistribution(),) * 4, members=4, steps=400),
        iterations=2000,
        until=500,
        window=40,
        objective=Objective(averaged_fraction=0.5),
        validate_every=50,
    )


def default_1() -> Config:
    """The rule `default_1`: step sizes, on families of wide tasks, by backpropagation through whole runs; from `PLAIN`.

    Some fifty parameters are trained: the linear map from features to the gain, the step-size adaptation, and the
    biases of the coefficients. Whole runs have no short-horizon bias, and with sensible step sizes from the start their
    gradient is not chaotic. Trained on narrower networks, the rule takes steps that are too long for development tasks.
    It stops after a third of its schedule and exports theta half way between the initial theta and the average;
    beyond that some tasks keep improving and others deteriorate.
    """
    return Config(
        rule=PLAIN,
        trainable=("network.", "direction."),
        distribution=wide(),
        validation=validation(),
        standardised=True,
        window=0,
        segment=20,
        horizon=(250, 800),
        warm_start=0.1,
        objective=Objective(tail_fraction=0.25),
        iterations=60,
        until=20,
        tasks=4,
        members=4,
        inner_runs=4,
        lr=0.01,
        warmup=5,
        clip=3.0,
        ema_decay=0.9,
        export_fraction=0.5,
        checkpoint_every=5,
        validate_every=10,
    )


def network() -> Config:
    """The whole network, messages between neurons and tensors included, on wide tasks through whole inner runs.

    All outputs start at zero, so it starts as the rule `base`: what it learns is what messages and features add.
    """
    return replace(
        default_1(),
        rule=replace(BASE, hidden=8, rounds=2),
        trainable=("",),
        iterations=1000,
        until=None,
        lr=3e-3,
        warmup=10,
        clip=1.0,
        ema_decay=0.95,
        export_fraction=1.0,
        validate_every=20,
    )


def broad() -> Config:
    """All parameters of a larger rule, on all families of tasks, through whole inner runs; an experiment.

    Start it from a rule with sensible step sizes (`--initial default_1`): then the gradient of a whole run is not
    chaotic, and unlike that of a window not biased towards short-term progress. So far it has made validation worse.
    """
    return Config(
        rule=UNIVERSAL,
        distribution=families(),
        validation=validation(),
        window=0,
        horizon=(60, 300),
        warm_start=0.1,
        objective=Objective(tail_fraction=0.25),
        iterations=200,
        tasks=4,
        members=4,
        inner_runs=4,
        lr=3e-3,
        warmup=10,
        clip=0.2,
        reject=1000.0,
        ema_decay=0.95,
        checkpoint_every=10,
        validate_every=30,
    )


def families() -> Mixture:
    """All families of tasks.

    Images and text come from packages, and MNIST and Shakespeare from the data folder if it has them
    (`meta_train.tasks.folder`). A run must be resumed with the data that it was started with.
    """
    images = ("digits", "mnist5k", *(("mnist",) if has_file("mnist.npz") else ()))
    texts = all_texts()
    return Mixture(
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


def all_texts() -> tuple[str, ...]:
    """The texts of packages, and Shakespeare if it is in the data folder."""
    return ("prose", "code", *(("shakespeare",) if has_file("tinyshakespeare.txt") else ()))


def wide() -> Mixture:
    """Families of tasks wide enough that good step sizes transfer to larger networks, with the noise of real data."""
    images = ("mnist5k", "mnist14")
    texts = all_texts()
    mild = replace(MILD, rescale=0.25)
    return Mixture(
        (
            (MLPDistribution(width=(32, 192), batch_size=(24, 96), zooms=(1,), data=images, augment=mild), 4.0),
            (CNNDistribution(width=(6, 12), batch_size=(16, 32), data=images, augment=mild), 2.0),
            (TransformerDistribution(width=(20, 40), context=(16, 24), data=texts, augment=mild), 2.0),
            (GRUDistribution(width=(24, 64), data=texts, augment=mild), 2.0),
            (NgramDistribution(width=(32, 96), data=texts, augment=mild), 1.0),
            (VectorDistribution(width=(24, 96), augment=mild), 1.0),
            (AutoencoderDistribution(width=(32, 96), data=images, augment=replace(mild, label_noise=0.0)), 1.5),
            (INRDistribution(width=(24, 64), augment=replace(mild, label_noise=0.1)), 1.5),
        )
    )


def validation() -> Validation:
    """Fixed tasks of several kinds, wider than those trained on, that select the best theta."""
    return Validation(
        (
            MLPDistribution(width=(64, 128), zooms=(1,), data=("mnist14",), augment=MILD),
            MLPDistribution(width=(32, 64), zooms=(1,), augment=MILD),
            CNNDistribution(data=("mnist14",), augment=MILD),
            TransformerDistribution(data=("code",), width=(32, 48), augment=MILD),
            GRUDistribution(data=("code",), augment=MILD),
            AutoencoderDistribution(data=("mnist5k",), augment=replace(MILD, label_noise=0.0)),
        ),
        steps=700,
    )


def smoke() -> Config:
    """A smoke test of a minute: tiny MLPs, few iterations."""
    return Config(
        rule=RuleConfig(hidden=4, power=1.0),
        distribution=MLPDistribution(width=(4, 8), batch_size=(8, 16), zooms=(1,), augment=Augment(0.5, 0.0, 0.0)),
        validation=Validation((MLPDistribution(width=(8, 12), batch_size=(8, 16), zooms=(1,)),), steps=40),
        iterations=60,
        lr=4e-3,
        members=2,
        inner_runs=3,
        window=5,
        horizon=(10, 30),
        warmup=5,
        checkpoint_every=5,
        validate_every=20,
    )


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe for recipe in (default_1, network, digits, broad, smoke)
}
