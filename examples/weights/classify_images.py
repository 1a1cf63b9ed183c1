"""Classify images by reading the weights of the networks that represent them.

Every image is a SIREN, a network from positions to grey values, fitted from initial weights of its own; several fits of
one image are its views. Classifiers read weights of some images and are tested on others, with one view for every test
image and with the mean answer of all views. Two tracks: weights only, and queries (running the networks at points).
Every row is trained in the same call, on the same SIRENs.

    python examples/weights/classify_images.py --quick
    python examples/weights/classify_images.py --images fashion_mnist --data FOLDER --count 9000 --views 10
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from accuracies import cells_of, difference_note
from baselines import flat_perceptron, recipe_layers
from command_line import SEEDS, add_numbers, parsed, parser_of, write
from matplotlib.figure import Figure
from siren_readers import Messages, Moved, Queries
from siren_split import SirenSplit
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor, nn

from nfn_optim.layers import DeepSets, InvariantPool, NFLinear, Pointwise, Predictor, Statistics, free_ends
from nfn_optim.populations import (
    FitSettings,
    Population,
    Report,
    SirenZoo,
    apply,
    bootstrap_weights,
    fit,
    interval,
    load_images,
    sirens,
    weighted_mean,
)

NAME = "weights_classification"
CLASSES = 10
QUERIES = 64
CHEAP = 5
"""Times as many steps for messages and queries, of which a step takes about a fifth of the time."""

HIDDEN = 256
"""Neurons in each layer of the head of nfn's recipe; 1,000 in the paper."""

COLOURS = mpl.colormaps["tab20"].colors
"""One for each method."""

RECIPE = "nfn's recipe (NP)"
OURS = "messages, canonical signs, moved"
WITH_QUERIES = f"queries: {QUERIES} learned points, moved"


def recipe(population: Population, layer: Callable[..., nn.Module], channels: int) -> nn.Module:
    """The paper's classifier, narrower: Fourier values of raw weights, three layers with ReLU, means, two layers.

    Args:
        population: Whose weights are read.
        layer: `NFLinear`, `DeepSets` or `Pointwise`.
        channels: 512 in the paper.
    """
    symmetry = free_ends(population.symmetry)
    layers = recipe_layers(population, symmetry, layer, channels)
    pool = InvariantPool(symmetry, channels)
    head: list[nn.Module] = []
    for n, m in ((pool.out_features, HIDDEN), (HIDDEN, HIDDEN)):
        head += [nn.Linear(n, m), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*layers, pool, *head, nn.Linear(HIDDEN, CLASSES))


def loss_of(out: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, `(N,)`."""
    return F.cross_entropy(out, columns["class"], reduction="none")


@dataclass
class Outcome:
    """Answers of a method for the test images.

    Attributes:
        answers: Training views -> probabilities `(images, views, classes)` for every seed.
        seconds: For all seeds and views.
    """

    answers: dict[int, list[Tensor]] = field(default_factory=dict)
    seconds: float = 0.0

    def right(self, training_views: int, test_views: int, classes: Tensor) -> Tensor:
        """How often the mean answer of `test_views` views is right, mean over seeds; `(images,)`.

        Args:
            training_views: Of every training image.
            test_views: Of every test image; the mean over disjoint groups of views.
            classes: `(images,)`.
        """
        found = []
        for p in self.answers[training_views]:
            whole = p.shape[1] // test_views * test_views
            mean = p[:, :whole].unflatten(1, (-1, test_views)).mean(2)  # (images, groups, classes)
            found.append((mean.argmax(-1) == classes[:, None]).float().mean(1))
        return torch.stack(found).mean(0)


class Experiment:
    """SIRENs, split by image, and how classifiers are trained on them.

    Args:
        population: The SIRENs.
        zoo: Their definition.
        steps: Of networks of NF-layers; others take `CHEAP` times as many.
    """

    def __init__(self, population: Population, zoo: SirenZoo, steps: int) -> None:
        self.module, self.views, self.steps = zoo.module(), zoo.views, steps
        self.sirens = SirenSplit(population, self.module, 8)
        self.classes = population.select(self.sirens.in_test).columns["class"][:: self.views]

    def parts(self, canonical: bool, views: int) -> tuple[Population, Population, Population]:
        """For training and validation as many views as given; for testing all."""
        population = self.sirens.canonical if canonical else self.sirens.raw
        few = population.columns["view"] < views
        masks = (self.sirens.in_train & few, self.sirens.in_validation & few, self.sirens.in_test)
        train, validation, test = (population.select(mask) for mask in masks)
        return train, validation, test

    def network(
        self, build: Callable[[Population], nn.Module], views: int, canonical: bool, settings: FitSettings
    ) -> Tensor:
        """Train a classifier; probabilities for the test images, `(images, views, classes)`."""
        train, validation, test = self.parts(canonical, views)
        torch.manual_seed(settings.seed)
        model = build(train)
        fit(model, train, validation, loss_of, settings)
        answers: Tensor = apply(model, test)
        return answers.softmax(-1).unflatten(0, (-1, self.views))

    def settings(self, views: int, factor: int, seed: int, permute: bool) -> FitSettings:
        """As many epochs as make the steps; the same for all methods but for the factor."""
        count = int((self.sirens.in_train & (self.sirens.raw.columns["view"] < views)).sum())
        return FitSettings(
            epochs=max(2, round(self.steps * factor * 32 / count)),
            learning_rate=1e-3 if factor == 1 else 3e-3,
            seed=seed,
            permute=permute,
        )

    def boosting(self, views: int) -> Tensor:
        """Boosted trees on statistics of canonical weights; as `network`."""
        train, _, test = self.parts(True, views)
        statistics = Statistics(train.symmetry, 1)
        trees = HistGradientBoostingClassifier(max_iter=40, random_state=0)
        trees.fit(statistics(train.features()).numpy(), train.columns["class"].numpy())
        answers = torch.zeros(len(test), CLASSES)
        answers[:, trees.classes_] = torch.as_tensor(trees.predict_proba(statistics(test.features()).numpy())).float()
        return answers.unflatten(0, (-1, self.views))


def outcomes_of(experiment: Experiment, channels: int) -> dict[str, Outcome]:
    """All methods, trained on one view and on all."""
    e, start, found = experiment, time.monotonic(), dict[str, Outcome]()

    def run(
        name: str,
        build: Callable[[Population], nn.Module],
        *,
        canonical: bool = False,
        factor: int = 1,
        permute: bool = False,
    ) -> None:
        outcome, begin = Outcome(), time.monotonic()
        for views in sorted({1, e.views}):
            outcome.answers[views] = [
                e.network(build, views, canonical, e.settings(views, factor, seed, permute)) for seed in range(SEEDS)
            ]
        outcome.seconds = time.monotonic() - begin
        found[name] = outcome
        accuracy = [100 * float(outcome.right(v, v, e.classes).mean()) for v in outcome.answers]
        print(f"{name}: {', '.join(f'{x:.1f}' for x in accuracy)} % after {time.monotonic() - start:.0f} s", flush=True)

    def flat(population: Population) -> nn.Module:
        return flat_perceptron(population, CLASSES)

    def messages(population: Population, sines: bool = False) -> nn.Module:
        return Messages(population, e.module.frequency, CLASSES, sines=sines)

    def queries(_: Population) -> nn.Module:
        return Queries(e.module, points, CLASSES, True)

    def moved(build: Callable[[Population], nn.Module], canonical: bool) -> Callable[[Population], nn.Module]:
        return lambda p: Moved(build(p), p, e.module, canonical)

    points = 2 * torch.rand(QUERIES, 2, generator=torch.Generator().manual_seed(0)) - 1
    begin = time.monotonic()
    answers = {views: [e.boosting(views)] for views in sorted({1, e.views})}
    found["statistics, boosting"] = Outcome(answers, time.monotonic() - begin)
    run("flat perceptron", flat)
    run("flat perceptron, permuted", flat, permute=True)
    run("flat perceptron, permuted, canonical signs", flat, permute=True, canonical=True)
    run("Pointwise", lambda p: recipe(p, Pointwise, channels))
    run("DeepSets", lambda p: recipe(p, DeepSets, channels))
    run(RECIPE, lambda p: recipe(p, NFLinear, channels))
    run(f"{RECIPE}, canonical signs", lambda p: recipe(p, NFLinear, channels), canonical=True)
    run(
        "Predictor, canonical signs",
        lambda p: Predictor(p.symmetry, CLASSES).fit(p.features()),
        canonical=True,
    )
    run("messages, signs as they are", messages, factor=CHEAP)
    run("messages, canonical signs", messages, canonical=True, factor=CHEAP)
    run(OURS, moved(messages, True), canonical=True, factor=CHEAP)
    sines = moved(lambda p: messages(p, sines=True), True)
    run("messages with sines, canonical signs, moved", sines, canonical=True, factor=CHEAP)
    run(f"queries: {QUERIES} learned points", queries, factor=CHEAP)
    run(WITH_QUERIES, moved(queries, False), factor=CHEAP)
    return found


def report(experiment: Experiment, outcomes: dict[str, Outcome], title: str) -> Report:
    """Accuracies with intervals over test images, and differences to nfn's recipe."""
    e, many = experiment, experiment.views
    weights = bootstrap_weights(torch.arange(len(e.classes)))
    plans = {"one view": (1, 1), f"{many} training views, one to test": (many, 1), f"{many} views": (many, many)}
    made = Report(title, ["method, accuracy in %", *plans, "95 %", "s"])
    for name, outcome in outcomes.items():
        right = {plan: outcome.right(*both, e.classes) for plan, both in plans.items()}
        last = right[f"{many} views"]
        cells = [cells_of(x, weights)[0] for x in right.values()]
        made.rows.append([name, *cells, cells_of(last, weights)[1], f"{outcome.seconds:.0f}"])
        made.data[name] = {
            "accuracy": {plan: float(x.mean()) for plan, x in right.items()},
            "interval": list(interval(weighted_mean(last, weights))),
            "seconds": outcome.seconds,
        }
    for plan, both in plans.items():
        difference = outcomes[OURS].right(*both, e.classes) - outcomes[RECIPE].right(*both, e.classes)
        made.notes.append(difference_note(f"{OURS} less {RECIPE}, {plan}", difference, weights))
    return made


def draw(experiment: Experiment, outcomes: dict[str, Outcome]) -> Figure:
    """Accuracy over the number of averaged test views, trained on one view and on all."""
    e = experiment
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True, sharey=True)
    counts = [n for n in range(1, e.views + 1) if e.views % n == 0]
    for axis, training in zip(axes, (1, e.views), strict=True):
        for number, (name, outcome) in enumerate(outcomes.items()):
            accuracy = [float(outcome.right(training, n, e.classes).mean()) for n in counts]
            style = "s--" if name.startswith("queries") else "o-"
            width = 3 if name == OURS else 1.2
            axis.plot(counts, accuracy, style, color=COLOURS[number], lw=width, label=name)
        axis.axhline(1 / CLASSES, color="black", lw=0.8)
        axis.set(title=f"trained on {training} view{'s' * (training > 1)} of every image", xticks=counts)
        axis.set_xlabel("test views whose answers are averaged")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on other images")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def main() -> None:
    """Fit the SIRENs, train the classifiers, then report."""
    parser = parser_of(__doc__, "small SIRENs of 8x8 digits that a package carries", None, "classification")
    add_numbers(
        parser,
        count="images for training",
        held_out="images for testing",
        views="SIRENs of every image",
        fit_steps="steps of every SIREN",
        steps=f"of classifiers; messages and queries {CHEAP} times",
        channels="of NF-layers",
    )
    quick = {"images": "digits", "count": 400, "held_out": 200, "fit_steps": 100, "steps": 100, "channels": 8}
    full = {"images": "mnist5k", "count": 4000, "held_out": 1000, "fit_steps": 1000, "steps": 3000, "channels": 32}
    given, start = parsed(parser, quick=quick | {"views": 10}, full=full | {"views": 10}), time.monotonic()
    side = 8 if given.images == "digits" else 28
    images = load_images(given.images, given.data, side)
    zoo = SirenZoo(count=given.count, held_out=given.held_out, views=given.views, steps=given.fit_steps)
    if side == 8:  # noqa: PLR2004 - fewer pixels than a SIREN of the usual size has weights
        zoo = SirenZoo(
            (2, 16, 16, 1), given.count, given.held_out, given.views, given.fit_steps, 32, 1e-2, frequency=10.0
        )
    population = sirens(zoo, images, given.populations)
    fitted = time.monotonic() - start
    print(f"{len(population)} SIRENs, {population.columns['psnr'].median():.1f} dB, after {fitted:.0f} s", flush=True)
    experiment = Experiment(population, zoo, given.steps)
    outcomes = outcomes_of(experiment, given.channels)
    made = report(experiment, outcomes, f"Classes of images from SIRENs {zoo.sizes}, {images.name}")
    made.notes += [
        experiment.sirens.note,
        f"{given.count} images to train and choose epochs on, {given.held_out} others to test; fitted to "
        f"{population.columns['psnr'].median():.1f} dB (median) in {given.fit_steps} steps; NF-layers of "
        f"{given.channels} channels; {given.steps} steps, {CHEAP * given.steps} for messages and queries, but at "
        f"least two passes; mean of {SEEDS} seeds, intervals over images",
        f"{time.monotonic() - start:.0f} s, {fitted:.0f} s of them for the SIRENs",
    ]
    write(made, NAME, given, {"": draw(experiment, outcomes)})


if __name__ == "__main__":
    main()
