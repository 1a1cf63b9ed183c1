"""Classify images by reading the weights of the networks that represent them.

Every image is a SIREN, a network from positions to grey values, fitted from initial weights of its own; several fits of
one image are its views. Classifiers read weights of some images and are tested on others, with one view for every test
image and with the mean answer of all views. Two tracks: weights only, and queries (running the networks at points).
Every row is trained in the same call, on the same SIRENs.

    python examples/weights/classify_images.py --quick
    python examples/weights/classify_images.py --images fashion_mnist --data FOLDER --count 9000 --views 10
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor, nn

from nfn_optim.layers import (
    DeepSets,
    Entrywise,
    FourierValues,
    Head,
    InvariantPool,
    NFLinear,
    Pointwise,
    PositionEncoding,
    Predictor,
    Standardise,
    Statistics,
    canonical_signs,
    free_ends,
    function_change,
)
from nfn_optim.populations import (
    FitSettings,
    Population,
    Report,
    Siren,
    SirenZoo,
    apply,
    bootstrap_weights,
    fit,
    interval,
    load_images,
    outputs,
    positions,
    sirens,
    weighted_mean,
)

NAME = "weights_classification"
SEEDS = 3
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


class Messages(nn.Module):
    """Neurons are vectors, layer by layer; what arrives at a neuron is multiplied by the weights it came along.

        h_k = f(w b_k, sum_j w W_kj h_j),   in the first layer h_k = f(w b_k, w W_k),   w the frequency of the SIREN

    Invariant to the order of hidden neurons. With sines for f it is odd: signs of neurons make no difference, and
    running the SIREN at learned points is a special case.

    Args:
        population: SIRENs; the last layer is divided by root mean squares, as it has no frequency.
        frequency: Of their sines.
        sines: Whether f has sines and no biases, instead of GELU.
        channels: Length of the vectors.
    """

    scales: Tensor

    def __init__(self, population: Population, frequency: float, *, sines: bool = False, channels: int = 64) -> None:
        super().__init__()
        names = list(population.params)
        self.layers = list(zip(names[::2], names[1::2], strict=True))  # weight and bias
        last = [1 / population.params[name].square().mean().sqrt() for name in names[-2:]]
        self.register_buffer("scales", torch.tensor([frequency] * (len(names) - 2) + [float(x) for x in last]))
        self.function = torch.sin if sines else F.gelu
        self.inner = nn.ModuleList()
        for n in range(len(self.layers) - 1):
            size = population.params[names[0]].shape[-1] if n == 0 else channels
            sizes = ((size + 1, channels), (channels, channels))
            self.inner.append(nn.ModuleList(nn.Linear(*both, bias=not sines) for both in sizes))
        self.head = Head(channels + 1, CLASSES, dropout=0.2)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Classify. Name -> `(N, *shape, 1)` to `(N, classes)`."""
        scaled = {name: x[..., 0] * s for (name, x), s in zip(features.items(), self.scales, strict=True)}
        arriving = scaled[self.layers[0][0]]  # (N, neurons, inputs)
        for n, (weight, bias) in enumerate(self.layers):
            if n > 0:
                arriving = scaled[weight] @ arriving  # (N, neurons, channels)
            if n < len(self.inner):
                arriving = torch.cat([arriving, scaled[bias].unsqueeze(-1)], -1)
                for linear in self.inner[n]:
                    arriving = self.function(linear(arriving))
        out: Tensor = self.head(torch.cat([arriving.flatten(1), scaled[self.layers[-1][1]]], 1))
        return out


class Moved(nn.Module):
    """In training, move the images that the networks represent, by their first layer: u(A x + t) for random A and t.

    Args:
        body: The classifier.
        population: SIRENs.
        module: Their architecture.
        canonical: Whether signs are made canonical again.
        strength: Standard deviation of the entries of A - 1 and t; images reach from -1 to 1.
    """

    def __init__(
        self, body: nn.Module, population: Population, module: Siren, canonical: bool, strength: float = 0.1
    ) -> None:
        super().__init__()
        self.body, self.symmetry, self.canonical, self.strength = body, population.symmetry, canonical, strength
        self.half_period = module.half_period
        self.first = list(population.params)[:2]

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Name -> `(N, *shape, 1)` to what the body returns."""
        if self.training:
            weight, bias = (features[name][..., 0] for name in self.first)  # (N, h, 2), (N, h)
            matrix = torch.eye(2) + self.strength * torch.randn(len(weight), 2, 2)
            shift = weight @ (self.strength * torch.randn(len(weight), 2, 1))
            moved = zip(self.first, ((weight @ matrix).unsqueeze(-1), bias.unsqueeze(-1) + shift), strict=True)
            features = {**features, **dict(moved)}
            if self.canonical:
                features = canonical_signs(features, self.symmetry, half_period=self.half_period)
        out: Tensor = self.body(features)
        return out


class Queries(nn.Module):
    """A perceptron on what the networks compute at some points: not weights only.

    Args:
        module: The architecture.
        points: `(points, 2)`.
        learned: Whether points are trained, too.
    """

    def __init__(self, module: Siren, points: Tensor, learned: bool) -> None:
        super().__init__()
        self.points = nn.Parameter(points.clone(), requires_grad=learned)
        self.run = lambda params, x: outputs(module, params, x, chunk=None)
        self.head = Head(len(points), CLASSES, dropout=0.2)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Classify. Name -> `(N, *shape, 1)` to `(N, classes)`."""
        out: Tensor = self.head(self.run({name: x[..., 0] for name, x in features.items()}, self.points)[..., 0])
        return out


class Flat(nn.Module):
    """A perceptron on all weights in a row, which does not know about permutations."""

    def __init__(self, population: Population) -> None:
        super().__init__()
        self.standardise = Standardise(population.symmetry, 1).fit(population.features())
        self.head = Head(sum(x[0].numel() for x in population.params.values()), CLASSES)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Classify. Name -> `(N, *shape, 1)` to `(N, classes)`."""
        out: Tensor = self.head(torch.cat([x.flatten(1) for x in self.standardise(features).values()], 1))
        return out


def recipe(population: Population, layer: Callable[..., nn.Module], channels: int) -> nn.Module:
    """The paper's classifier, narrower: Fourier values of raw weights, three layers with ReLU, means, two layers.

    Args:
        population: Whose weights are read.
        layer: `NFLinear`, `DeepSets` or `Pointwise`.
        channels: 512 in the paper.
    """
    symmetry, encode = free_ends(population.symmetry), PositionEncoding(population.symmetry)
    layers: list[nn.Module] = [FourierValues(1, channels, scale=3.0), encode]
    for n, m in itertools.pairwise([2 * channels + encode.extra_channels, channels, channels, channels]):
        layers += [layer(symmetry, n, m), Entrywise(nn.ReLU())]
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
    """SIRENs, raw and canonical, split by image.

    Args:
        population: The SIRENs.
        zoo: Their definition.
        steps: Of networks of NF-layers; others take `CHEAP` times as many.
    """

    def __init__(self, population: Population, zoo: SirenZoo, steps: int) -> None:
        self.module, self.views, self.steps, self.raw = zoo.module(), zoo.views, steps, population
        signed = canonical_signs(population.features(), population.symmetry, half_period=self.module.half_period)
        self.certificate = float(function_change(self.module, population.features(), signed, positions(8)).max())
        self.canonical = population.with_features(signed)
        self.in_test = population.columns["test"]
        inner = population.select(~self.in_test).split([0.9, 0.1], seed=0)
        self.in_train, self.in_validation = (torch.isin(population.runs, part.runs) for part in inner)
        test = population.select(self.in_test)
        self.classes = test.columns["class"][:: self.views]

    def parts(self, canonical: bool, views: int) -> tuple[Population, Population, Population]:
        """For training and validation as many views as given; for testing all."""
        population = self.canonical if canonical else self.raw
        few = population.columns["view"] < views
        masks = (self.in_train & few, self.in_validation & few, self.in_test)
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
        count = int((self.in_train & (self.raw.columns["view"] < views)).sum())
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

    def moved(build: Callable[[Population], nn.Module], canonical: bool) -> Callable[[Population], nn.Module]:
        return lambda p: Moved(build(p), p, e.module, canonical)

    begin = time.monotonic()
    answers = {views: [e.boosting(views)] for views in sorted({1, e.views})}
    found["statistics, boosting"] = Outcome(answers, time.monotonic() - begin)
    run("flat perceptron", Flat)
    run("flat perceptron, permuted", Flat, permute=True)
    run("flat perceptron, permuted, canonical signs", Flat, permute=True, canonical=True)
    run("Pointwise", lambda p: recipe(p, Pointwise, channels))
    run("DeepSets", lambda p: recipe(p, DeepSets, channels))
    run(RECIPE, lambda p: recipe(p, NFLinear, channels))
    run(f"{RECIPE}, canonical signs", lambda p: recipe(p, NFLinear, channels), canonical=True)
    run(
        "Predictor, canonical signs",
        lambda p: Predictor(p.symmetry, CLASSES).fit(p.features()),
        canonical=True,
    )
    frequency = e.module.frequency
    run("messages, signs as they are", lambda p: Messages(p, frequency), factor=CHEAP)
    run("messages, canonical signs", lambda p: Messages(p, frequency), canonical=True, factor=CHEAP)
    run(OURS, moved(lambda p: Messages(p, frequency), True), canonical=True, factor=CHEAP)
    sines = moved(lambda p: Messages(p, frequency, sines=True), True)
    run("messages with sines, canonical signs, moved", sines, canonical=True, factor=CHEAP)
    points = 2 * torch.rand(QUERIES, 2, generator=torch.Generator().manual_seed(0)) - 1
    run(f"queries: {QUERIES} learned points", lambda p: Queries(e.module, points, True), factor=CHEAP)
    run(WITH_QUERIES, moved(lambda p: Queries(e.module, points, True), False), factor=CHEAP)
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
        low, high = interval(weighted_mean(last, weights))
        cells = [f"{100 * x.mean():.1f}" for x in right.values()]
        made.rows.append([name, *cells, f"{100 * low:.1f} to {100 * high:.1f}", f"{outcome.seconds:.0f}"])
        made.data[name] = {
            "accuracy": {plan: float(x.mean()) for plan, x in right.items()},
            "interval": [low, high],
            "seconds": outcome.seconds,
        }
    for plan, both in plans.items():
        difference = outcomes[OURS].right(*both, e.classes) - outcomes[RECIPE].right(*both, e.classes)
        low, high = (100 * x for x in interval(weighted_mean(difference, weights)))
        made.notes.append(
            f"{OURS} less {RECIPE}, {plan}: {100 * difference.mean():+.1f} points (95 %: {low:+.1f} to {high:+.1f})"
        )
    return made


def draw(experiment: Experiment, outcomes: dict[str, Outcome], path: Path) -> None:
    """Accuracy over the number of averaged test views, trained on one view and on all."""
    mpl.use("Agg")
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    """Of the command, filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small SIRENs of 8x8 digits that a package carries")
    parser.add_argument("--images", default=None, help="digits, mnist5k, or a file NAME.npz in --data")
    parser.add_argument("--data", type=Path, default=None, help="folder of NAME.npz")
    parser.add_argument("--count", type=int, default=None, help="images for training")
    parser.add_argument("--held-out", type=int, default=None, help="images for testing")
    parser.add_argument("--views", type=int, default=10, help="SIRENs of every image")
    parser.add_argument("--fit-steps", type=int, default=None, help="steps of every SIREN")
    parser.add_argument("--steps", type=int, default=None, help=f"of classifiers; messages and queries {CHEAP} times")
    parser.add_argument("--channels", type=int, default=None, help="of NF-layers")
    parser.add_argument("--populations", type=Path, default=Path("runs/populations"), help="where SIRENs are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/classification"), help="output folder")
    given = parser.parse_args()
    quick = {"images": "digits", "count": 400, "held_out": 200, "fit_steps": 100, "steps": 100, "channels": 8}
    full = {"images": "mnist5k", "count": 4000, "held_out": 1000, "fit_steps": 1000, "steps": 3000, "channels": 32}
    for name, value in (quick if given.quick else full).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def main() -> None:
    """Fit the SIRENs, train the classifiers, then report."""
    given, start = arguments(), time.monotonic()
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
        f"canonical signs change no pixel by more than {experiment.certificate:.0e} of the largest",
        f"{given.count} images to train and choose epochs on, {given.held_out} others to test; fitted to "
        f"{population.columns['psnr'].median():.1f} dB (median) in {given.fit_steps} steps; NF-layers of "
        f"{given.channels} channels; {given.steps} steps, {CHEAP * given.steps} for messages and queries, but at "
        f"least two passes; mean of "
        f"{SEEDS} seeds, intervals over images",
        f"{time.monotonic() - start:.0f} s, {fitted:.0f} s of them for the SIRENs",
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    draw(experiment, outcomes, given.out / f"{NAME}.png")
    made.write(given.out, NAME, vars(given))
    print(made)
    print(f"wrote {given.out}/{NAME}.json, .md, .png")


if __name__ == "__main__":
    main()
