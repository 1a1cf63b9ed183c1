"""Predict the test accuracy of networks from their weights, and from what they compute.

A population of small classifiers is trained with hyperparameters that differ from network to network (learning rate,
L2 penalty, dropout, scale of the initial weights, activation, optimizer, number of images). Predictors are trained on
some of the runs and order the networks of others; the score is Kendall's tau. Two tracks: weights only, and weights
with the function on unlabelled images. Every row is trained in the same call, on the same networks.

    python examples/weights/predict_generalization.py --quick
    python examples/weights/predict_generalization.py --zoo cnn --images fashion_mnist --data FOLDER --sizes 300 3000
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from baselines import flat_perceptron
from command_line import SEEDS, add_numbers, parsed, parser_of, write
from matplotlib.figure import Figure
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from torch import Tensor, nn

from nfn_optim.layers import (
    DeepSets,
    Entrywise,
    Head,
    InvariantPool,
    NFLinear,
    Pointwise,
    Predictor,
    Spectrum,
    Standardise,
    Statistics,
)
from nfn_optim.populations import (
    ClassifierZoo,
    FitSettings,
    Images,
    Population,
    Report,
    apply,
    bootstrap_weights,
    classifiers,
    fit,
    interval,
    kendall_tau,
    load_images,
    outputs,
)

NAME = "weights_generalization"
CHANCE = 0.15
"""Accuracy below which a network has learned nothing."""

HEAD_STEPS = 1200
"""Of a perceptron on vectors: they are cheap, and fewer are too few."""

PROBES = 256
"""Unlabelled training images that networks are run on."""

BASELINES = ("statistics, boosting", "nfn's recipe (HNP)")
COLOURS = [f"C{n}" for n in range(6)]
OURS = "Predictor and boosting"
WITH_FUNCTION = ("probes, boosting", "probes, forest")
OURS_WITH_FUNCTION = "probes with consensus, and weights"


def stack_of(layer: Callable[..., nn.Module], population: Population, standardise: bool, hidden: int) -> nn.Module:
    """The paper's network: three layers of 16, 16 and 5 channels, means, a head of two layers."""
    symmetry, layers = population.symmetry, []
    if standardise:
        layers.append(Standardise(symmetry, 1).fit(population.features()))
    for n, m in ((1, 16), (16, 16), (16, 5)):
        layers += [layer(symmetry, n, m), Entrywise(nn.ReLU())]
    pool = InvariantPool(symmetry, 5)
    head = [nn.Linear(pool.out_features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)]
    return nn.Sequential(*layers, pool, *head)


def settings_for(count: int, steps: int, seed: int, **changed: Any) -> FitSettings:
    """As many epochs as make `steps` steps."""
    batch = changed.pop("batch", 32)
    epochs = max(4, round(steps * batch / count))
    return FitSettings(
        **({"epochs": epochs, "batch": batch, "weight_decay": 0.1, "learning_rate": 2e-3, "seed": seed} | changed)
    )


def loss_of(out: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """Cross-entropy with the accuracy as the target."""
    return F.binary_cross_entropy_with_logits(out[:, 0], columns["accuracy"], reduction="none")


def probe_statistics(module: nn.Module, population: Population, images: Tensor) -> tuple[Tensor, Tensor]:
    """Unlabelled: spread, confidence and balance of the answers `(N, 36)`; and the answers themselves, `(N, P, 10)`."""
    answers = []
    for tanh in (False, True):
        module.activation = "tanh" if tanh else "relu"
        rows = (population.columns["tanh"] > 0) == tanh
        part = {name: x[rows].float() for name, x in population.params.items()}
        answers.append((rows.nonzero()[:, 0], outputs(module, part, images)))
    logits = torch.cat([x for _, x in answers])[torch.cat([rows for rows, _ in answers]).argsort()]
    p = logits.softmax(-1)
    top = p.topk(2, -1).values
    entropy = -(p * p.clamp(min=1e-9).log()).sum(-1)
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    parts = [torch.quantile(x, quantiles, dim=1).T for x in (top[..., 0], top[..., 0] - top[..., 1], entropy)]
    chosen = F.one_hot(p.argmax(-1), p.shape[-1]).float().mean(1).sort(-1).values
    scale = torch.stack([logits.std((1, 2)).log1p(), logits.std(1).mean(1).log1p(), logits.mean(-1).std(1).log1p()], 1)
    means = p.mean(1)
    return torch.cat([*parts, chosen, means.sort(-1).values, scale[:, :1]], 1), p


def consensus_statistics(p: Tensor, training: Tensor, accuracy: Tensor) -> Tensor:
    """Agreement with what the training networks say of each image, better ones weighing more: `(N, 6)`.

    Args:
        p: Answers, `(N, P, classes)`.
        training: Indices of the training networks.
        accuracy: Of these, `(n,)`.
    """
    consensus = torch.einsum("n,npc->pc", accuracy**4, p[training])
    consensus = consensus / consensus.sum(-1, keepdim=True)
    label = consensus.argmax(-1)
    index = torch.arange(len(label))
    agreement = (p.argmax(-1) == label).float()
    sure = consensus.max(-1).values
    right = p[:, index, label]
    quantiles = torch.quantile(right, torch.tensor([0.1, 0.5]), dim=1).T
    return torch.cat(
        [
            torch.stack([agreement.mean(1), (agreement * sure).sum(1) / sure.sum(), right.mean(1)], 1),
            right.clamp(min=1e-4).log().mean(1, keepdim=True),
            quantiles,
        ],
        1,
    )


class Experiment:
    """One population, split by run, and the features that do not depend on the training part.

    Args:
        population: The networks.
        module: Their architecture.
        images: What they classify.
        steps: Of every network over weights.
    """

    def __init__(self, population: Population, module: nn.Module, images: Images, steps: int) -> None:
        self.population, self.steps = population, steps  # of networks over weights
        self.train, self.validation, self.test = population.split([0.6, 0.1, 0.3], seed=0)
        symmetry, features = population.symmetry, population.features()
        self.statistics = Statistics(symmetry, 1)(features)
        self.spectra = Spectrum(symmetry)(features)
        self.probes, self.answers = probe_statistics(module, population, images.images[:PROBES])
        names = ("learning_rate", "l2", "dropout", "init_scale", "adam", "fraction", "tanh", "step")
        self.hyperparameters = torch.stack([population.columns[name].float() for name in names], 1)
        position = torch.arange(len(population))
        self.rows = {
            part: position[torch.isin(population.runs, runs.runs)]
            for part, runs in (("train", self.train), ("validation", self.validation), ("test", self.test))
        }
        self.true = population.columns["accuracy"][self.rows["test"]]

    def subset(self, count: int, seed: int) -> Tensor:
        """Indices of about `count` training networks, whole runs."""
        runs = self.population.runs[self.rows["train"]]
        names = torch.unique(runs)
        order = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
        chosen = order[: max(1, round(count * len(order) / len(runs)))]
        return self.rows["train"][torch.isin(runs, chosen)]

    def trees(self, kind: str, features: Tensor, train: Tensor, seed: int) -> Tensor:
        """Boosted trees or a forest on vectors `(N, F)`; predictions for the test part."""
        model = (
            HistGradientBoostingRegressor(random_state=seed)
            if kind == "boosting"
            else RandomForestRegressor(200, random_state=seed, max_features=0.33)
        )
        model.fit(features[train].numpy(), self.population.columns["accuracy"][train].numpy())
        return torch.as_tensor(model.predict(features[self.rows["test"]].numpy()))

    def network(self, build: Callable[[Population], nn.Module], train: Tensor, settings: FitSettings) -> Tensor:
        """A network over weights; predictions for the test part."""
        part = self.population.select(train)
        torch.manual_seed(settings.seed)
        model = build(part)
        fit(model, part, self._validation(len(train)), loss_of, settings)
        return torch.sigmoid(apply(model, self.test)[:, 0])

    def head(self, features: Tensor, train: Tensor, settings: FitSettings) -> Tensor:
        """A `Head` on vectors `(N, F)`; predictions for the test part."""
        torch.manual_seed(settings.seed)
        head = Head(features.shape[1], 1)
        optimizer = torch.optim.AdamW(head.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, HEAD_STEPS)
        generator = torch.Generator().manual_seed(settings.seed)
        for _ in range(HEAD_STEPS):
            rows = train[torch.randint(len(train), (settings.batch,), generator=generator)]
            target = self.population.columns["accuracy"][rows]
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(head(features[rows])[:, 0], target).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return torch.sigmoid(head.eval()(features[self.rows["test"]])[:, 0])

    def _validation(self, count: int) -> Population:
        """As large in proportion to the training part as it is to the whole."""
        keep = max(30, round(len(self.validation) * count / len(self.train)))
        runs = torch.unique(self.validation.runs)
        chosen = runs[: max(1, round(keep * len(runs) / len(self.validation)))]
        return self.validation.select(torch.isin(self.validation.runs, chosen))


def predictions(experiment: Experiment, count: int, seed: int) -> dict[str, Tensor]:
    """All methods, trained on about `count` networks: name -> `(test networks,)`."""
    e, train, steps = experiment, experiment.subset(count, seed), experiment.steps
    plain = settings_for(len(train), steps, seed)

    def flat(population: Population) -> nn.Module:
        return flat_perceptron(population, 1)

    out = {
        "hyperparameters, forest (a leak)": e.trees("forest", e.hyperparameters, train, seed),
        "statistics, boosting": e.trees("boosting", e.statistics, train, seed),
        "statistics, forest": e.trees("forest", e.statistics, train, seed),
        "flat perceptron": e.network(flat, train, plain),
        "flat perceptron, permuted": e.network(flat, train, settings_for(len(train), steps, seed, permute=True)),
        "Pointwise": e.network(lambda p: stack_of(Pointwise, p, True, 256), train, plain),
        "DeepSets": e.network(lambda p: stack_of(DeepSets, p, True, 256), train, plain),
        "nfn's recipe (HNP)": e.network(
            lambda p: stack_of(NFLinear, p, False, 1000),
            train,
            settings_for(len(train), steps, seed, learning_rate=1e-3, weight_decay=0.0),
        ),
    }
    weights = torch.cat([e.statistics, e.spectra], 1)
    boosted = e.trees("boosting", weights, train, seed)
    head = e.head(weights, train, plain)
    out |= {"statistics and spectra, boosting": boosted, "statistics and spectra, head": head}
    predictor = e.network(lambda p: Predictor(p.symmetry).fit(p.features()), train, plain)
    out |= {"Predictor": predictor, OURS: (predictor + head + boosted) / 3}
    consensus = consensus_statistics(e.answers, train, e.population.columns["accuracy"][train])
    answers = torch.cat([e.probes, consensus], 1)
    ours = [e.trees(kind, answers, train, seed) for kind in ("boosting", "forest")]
    ours.append(e.head(torch.cat([answers, weights], 1), train, plain))
    out |= {
        "probes, boosting": e.trees("boosting", e.probes, train, seed),
        "probes, forest": e.trees("forest", e.probes, train, seed),
        "probes and statistics, boosting": e.trees("boosting", torch.cat([e.probes, e.statistics], 1), train, seed),
        OURS_WITH_FUNCTION: torch.stack(ours).mean(0),
    }
    return out


def taus_of(
    experiment: Experiment, found: list[Tensor], weights: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Tau of every seed, their mean: `(R,)` with weights, else a scalar."""
    rows = torch.arange(len(experiment.true)) if rows is None else rows
    kept = None if weights is None else weights[:, rows]
    return torch.stack([kendall_tau(x[rows], experiment.true[rows], kept) for x in found]).mean(0)


def within_settings(experiment: Experiment, found: list[Tensor]) -> float:
    """Mean tau among networks of one activation, optimizer and step, weighted by their number."""
    columns = experiment.test.columns
    cells = columns["tanh"] + 2 * columns["adam"] + 4 * columns["step"]
    total, count = 0.0, 0
    for cell in torch.unique(cells):
        rows = (cells == cell).nonzero()[:, 0]
        tau = float(taus_of(experiment, found, rows=rows))
        if not math.isnan(tau):
            total, count = total + tau * len(rows), count + len(rows)
    return total / max(count, 1)


def report(experiment: Experiment, results: dict[int, dict[str, list[Tensor]]], title: str) -> Report:
    """The table, with intervals at the largest size and differences to the baselines at every size."""
    sizes = list(results)
    last = results[sizes[-1]]
    weights = bootstrap_weights(experiment.test.runs)
    learned = (experiment.true >= CHANCE).nonzero()[:, 0]
    made = Report(title, ["method", *(f"tau, {n} networks" for n in sizes), "95 %", "within settings", "above chance"])
    for name in last:
        cells, low_high = [], interval(taus_of(experiment, last[name], weights))
        for size in sizes:
            taus = [float(taus_of(experiment, [x])) for x in results[size][name]] if name in results[size] else []
            cells.append(f"{sum(taus) / len(taus):.3f}" if taus else "")
            made.data.setdefault("tau", {}).setdefault(name, {})[size] = taus
        others = [within_settings(experiment, last[name]), float(taus_of(experiment, last[name], rows=learned))]
        made.rows.append([name, *cells, f"{low_high[0]:.3f} to {low_high[1]:.3f}", *(f"{x:.3f}" for x in others)])
    for ours, theirs in [(OURS, b) for b in BASELINES] + [(OURS_WITH_FUNCTION, b) for b in WITH_FUNCTION]:
        for size in sizes:
            if theirs in results[size]:
                pair = [taus_of(experiment, results[size][name], weights) for name in (ours, theirs)]
                difference = float(
                    taus_of(experiment, results[size][ours]) - taus_of(experiment, results[size][theirs])
                )
                low, high = interval(pair[0] - pair[1])
                made.notes.append(
                    f"{ours} less {theirs}, {size} networks: {difference:+.3f} tau (95 %: {low:+.3f} to {high:+.3f})"
                )
                made.data.setdefault("differences", []).append([ours, theirs, size, difference, low, high])
    test, accuracy = experiment.test, experiment.true
    made.notes.append(
        f"{len(experiment.population)} networks of {len(torch.unique(experiment.population.runs))} runs, split by run; "
        f"{len(test)} test networks, accuracy {accuracy.min():.2f} to {accuracy.max():.2f}, "
        f"{100 * (accuracy < CHANCE).float().mean():.0f} % at chance; mean of {SEEDS} seeds, intervals over runs"
    )
    return made


def tau_figure(results: dict[int, dict[str, list[Tensor]]], made: Report) -> Figure:
    """Tau over training size."""
    sizes = list(results)
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6), constrained_layout=True)
    tracks = (
        [n for n in results[sizes[-1]] if "probes" not in n],
        [n for n in results[sizes[-1]] if "probes" in n],
    )
    for axis, names, head in zip(axes, tracks, ("weights only", "weights and function"), strict=True):
        for number, name in enumerate(names):
            taus = made.data["tau"][name]
            known = [n for n in sizes if taus[n]]
            ours = name in (OURS, OURS_WITH_FUNCTION)
            means, style = [sum(taus[n]) / len(taus[n]) for n in known], "o-" if number < len(COLOURS) else "s--"
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(known, means, style, color=colour, lw=3 if ours else 1.2, label=name)
        axis.set(title=head, xscale="log", xlabel="training networks", ylabel="Kendall's tau on networks of other runs")
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def scatter_figure(experiment: Experiment, found: dict[str, list[Tensor]], made: Report) -> Figure:
    """Predicted against true accuracy, of the predictors trained on most networks."""
    names = ("statistics, boosting", "nfn's recipe (HNP)", OURS, "probes, forest", OURS_WITH_FUNCTION)
    names = [n for n in names if n in found]
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.6), constrained_layout=True, sharey=True)
    for axis, name in zip(axes, names, strict=True):
        tau = sum(list(made.data["tau"][name].values())[-1]) / SEEDS
        axis.scatter(experiment.true, found[name][0], s=5, alpha=0.5, c=experiment.test.columns["tanh"])
        axis.plot([0, 1], [0, 1], color="black", lw=0.8)
        axis.set(title=f"{name}\ntau {tau:.3f}", xlabel="true accuracy")
        axis.title.set_fontsize(9)
    axes[0].set_ylabel("predicted accuracy (dark: ReLU, bright: tanh)")
    return figure


def main() -> None:
    """Train the population, then the predictors, then report."""
    parser = parser_of(__doc__, "small networks on images that packages carry", "mnist5k", "generalization")
    add_numbers(
        parser,
        runs="training runs of the population",
        zoo_steps="steps of every training run",
        steps="of every network over weights",
    )
    parser.add_argument("--zoo", choices=["mlp", "cnn"], default="mlp", help="networks whose accuracy is predicted")
    parser.add_argument("--sizes", type=int, nargs="+", default=None, help="numbers of training networks")
    quick = {"runs": 800, "sizes": [300, 1000], "steps": 120, "zoo_steps": 300}
    full = {"runs": 3500, "sizes": [100, 300, 1000, 3000], "steps": 1500, "zoo_steps": 750}
    given, start = parsed(parser, quick=quick, full=full), time.monotonic()
    side = 8 if given.zoo == "mlp" else 14
    images = load_images(given.images, given.data).averaged(side).standardised()
    hidden = 16 if given.quick else 32
    shape = (side * side, hidden, hidden, 10) if given.zoo == "mlp" else (16, 10)
    zoo = ClassifierZoo(given.zoo, shape, given.runs, given.zoo_steps, snapshots=3)
    population = classifiers(zoo, images, given.populations)
    trained = time.monotonic() - start
    print(f"{len(population)} networks after {trained:.0f} s", flush=True)
    experiment = Experiment(population, zoo.module(), images, given.steps)
    results: dict[int, dict[str, list[Tensor]]] = {}
    for size in given.sizes:
        for seed in range(SEEDS):
            for name, found in predictions(experiment, size, seed).items():
                results.setdefault(size, {}).setdefault(name, []).append(found)
        print(f"{size} training networks after {time.monotonic() - start:.0f} s", flush=True)
    made = report(experiment, results, f"Kendall's tau, {given.zoo} {'-'.join(map(str, shape))}, {images.name}")
    made.notes.append(f"{time.monotonic() - start:.0f} s, {trained:.0f} s of them for the population")
    figures = {
        "_tau": tau_figure(results, made),
        "_scatter": scatter_figure(experiment, results[given.sizes[-1]], made),
    }
    write(made, NAME, given, figures)


if __name__ == "__main__":
    main()
