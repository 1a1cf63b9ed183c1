"""Find winning tickets: which weights of a network at its initialisation are worth training.

A ticket is a mask of an initialisation; its worth is the test accuracy after training what is left from the same
initial weights, on the same batches. Masks by pruning trained networks, once and iteratively, are the aim; a network of
NF-layers learns to predict the iterative ones from initialisations of other networks, from the initial weights only or
with one gradient. Random masks, some with the layer densities of pruning, magnitude, SNIP, GraSP and SynFlow are the
rows to beat. Every row is trained and scored in the same call.

    python examples/weights/find_winning_tickets.py --quick
    python examples/weights/find_winning_tickets.py --images mnist --data FOLDER --pairs 400 --steps 1000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from nfn_optim.layers import (
    ChannelNorm,
    DeepSets,
    Entrywise,
    LearnedEncoding,
    NFLinear,
    Parallel,
    Pointwise,
    Residual,
    Standardise,
    free_ends,
)
from nfn_optim.populations import (
    ClassifierZoo,
    FitSettings,
    Images,
    Population,
    Report,
    StepSettings,
    apply,
    bootstrap_weights,
    fit,
    generate,
    interval,
    load_images,
    outputs,
    stacked,
    train_together,
    weighted_mean,
)

NAME = "weights_tickets"
SEEDS = 3
GROUP = 20
"""Networks that are trained together."""

ROUNDS = 5
"""Of iterative pruning."""

ONE_BATCH = 256
"""Images of the one gradient that SNIP, GraSP and predictors may see."""

START = 0.1
"""Factor of what a predictor adds to magnitude or SNIP, before training."""

TEMPERATURE = 200.0
"""Logits are divided by it for GraSP, as published."""

SWEEPS = 100
"""Rounds of SynFlow."""

RANDOM = "random, densities of iterative pruning"
BY_POSITION = "random, densities of iterative pruning by input and class"
SNIP = "SNIP"
ONCE = "pruning once (trains the network)"
ITERATIVE = f"pruning in {ROUNDS} rounds (trains it {ROUNDS} times)"
FROM_INIT = "NF-layers, initial weights"
WITH_GRADIENT = "NF-layers, one gradient"

Weights = dict[str, Tensor]
"""Name -> `(N, *shape)`; masks and scores of matrices only."""


class Masked(nn.Module):
    """A network whose matrices are multiplied by masks.

    Args:
        network: The network.
        names: Of the matrices.
    """

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        """Run. Inputs, and a mask for every matrix."""
        params = dict(self.network.named_parameters())
        kept = {name: params[name] * mask for name, mask in zip(self.names, masks, strict=True)}
        out: Tensor = functional_call(self.network, {**params, **kept}, (x,))
        return out


def largest(scores: Weights, density: float) -> Weights:
    """Masks of the largest scores of every network, all matrices together."""
    flat = torch.cat([x.flatten(1) for x in scores.values()], 1)
    chosen = torch.zeros_like(flat).scatter_(1, flat.topk(round(density * flat.shape[1]), 1).indices, 1.0)
    parts = torch.split(chosen, [x[0].numel() for x in scores.values()], 1)
    return {name: part.reshape(x.shape) for (name, x), part in zip(scores.items(), parts, strict=True)}


def largest_of_each(scores: Weights, densities: dict[str, float]) -> Weights:
    """Masks of the largest scores of every matrix of every network."""
    return {name: largest({name: x}, densities[name])[name] for name, x in scores.items()}


class Trainer:
    """Trains and scores masked networks, all on the same batches.

    Args:
        network: Architecture.
        images: What it classifies.
        steps: Of every training.
        rate: Learning rate of Adam.
        batch: Images of a step.
    """

    def __init__(self, network: nn.Module, images: Images, steps: int, rate: float, batch: int = 64) -> None:
        self.network, self.images, self.steps, self.rate, self.batch = network, images, steps, rate, batch
        self.names = [name for name, p in network.named_parameters() if p.dim() > 1]
        self.x, self.y = images.images[:ONE_BATCH], images.classes[:ONE_BATCH]

    def trained(self, params: Weights, masks: Weights) -> Weights:
        """Train from the initial weights; what is masked stays as it is, and is zero in the network."""
        count, module = len(next(iter(params.values()))), Masked(self.network, self.names)
        inputs = [masks[name] for name in self.names]

        def batches() -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
            generator = torch.Generator().manual_seed(1)
            for _ in range(self.steps):
                index = torch.randint(self.images.train, (self.batch,), generator=generator)
                x, y = self.images.images[index], self.images.classes[index]
                yield (x.expand(count, *x.shape), *inputs), y.expand(count, -1)

        settings, last = StepSettings.same(count, self.rate), dict[str, Tensor]()
        start = {f"network.{name}": x for name, x in params.items()}
        for last in train_together(module, start, batches(), F.cross_entropy, settings):  # noqa: B007 - the last is kept
            pass
        return {name: last[f"network.{name}"].detach() for name in params}

    def accuracy(self, params: Weights, masks: Weights) -> Tensor:
        """Of every network, trained with its mask, on held-out images; `(N,)`."""
        found = []
        for start in range(0, len(next(iter(params.values()))), GROUP):
            rows = slice(start, start + GROUP)
            few, kept = ({n: x[rows] for n, x in both.items()} for both in (params, masks))
            after = self.trained(few, kept)
            after |= {name: after[name] * kept[name] for name in self.names}
            logits = outputs(self.network, after, self.images.images[self.images.train :])
            found.append((logits.argmax(-1) == self.images.classes[self.images.train :]).float().mean(1))
        return torch.cat(found)

    def dense(self, params: Weights) -> Weights:
        """Masks of everything."""
        return {name: torch.ones_like(params[name]) for name in self.names}

    def pruned(self, params: Weights, density: float, rounds: int) -> Weights:
        """Masks of iterative magnitude pruning: train, drop the smallest weights, go back to the initial ones."""
        masks = self.dense(params)
        for n in range(1, rounds + 1):
            after = self.trained(params, masks)
            masks = largest({name: after[name].abs() * masks[name] for name in self.names}, density ** (n / rounds))
        return masks

    def gradient(self, params: Weights) -> Weights:
        """Of the loss on one batch, for every network and parameter."""

        def loss(values: Weights) -> Tensor:
            return F.cross_entropy(functional_call(self.network, values, (self.x,)), self.y)

        found: Weights = vmap(grad(loss))(params)
        return found

    def grasp(self, params: Weights) -> Weights:
        """Products of weights and H g: by how much a weight adds to the squared norm of the gradient."""

        def slope(values: Weights) -> Weights:
            def loss(v: Weights) -> Tensor:
                return F.cross_entropy(functional_call(self.network, v, (self.x,)) / TEMPERATURE, self.y)

            found: Weights = grad(loss)(values)
            return found

        def product(values: Weights) -> Weights:
            found: Weights = jvp(slope, (values,), (slope(values),))[1]
            return found

        curved = vmap(product)(params)
        return {name: params[name] * curved[name] for name in self.names}

    def synflow(self, params: Weights, density: float) -> Weights:
        """Masks of SynFlow, which sees no data: |w dR/dw|, R the sum of outputs for ones with absolute weights."""
        ones, masks = torch.ones_like(self.x[:1]), self.dense(params)

        def flow(values: Weights) -> Tensor:
            out: Tensor = functional_call(self.network, values, (ones,)).sum()
            return out

        for n in range(1, SWEEPS + 1):
            positive = {name: x.abs() * masks.get(name, 1.0) for name, x in params.items()}
            slopes = vmap(grad(flow))(positive)
            masks = largest({name: positive[name] * slopes[name] for name in self.names}, density ** (n / SWEEPS))
        return masks


class Gradient(nn.Module):
    """Weights, their gradients on one batch, and the logarithm of the magnitude of the product, as three channels."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.gradient = trainer.gradient

    def forward(self, features: Weights) -> Weights:
        """Name -> `(N, *shape, 1)` to `(N, *shape, 3)`."""
        weights = {name: x[..., 0].detach() for name, x in features.items()}
        grads = self.gradient(weights)
        return {
            name: torch.stack([w, grads[name], (w * grads[name]).abs().clamp(min=1e-12).log()], -1)
            for name, w in weights.items()
        }


class Magnitude(nn.Module):
    """Weights, and the logarithm of their magnitude, as two channels."""

    def forward(self, features: Weights) -> Weights:
        """Name -> `(N, *shape, 1)` to `(N, *shape, 2)`."""
        return {name: torch.cat([x, x.abs().clamp(min=1e-6).log()], -1) for name, x in features.items()}


class Scores(nn.Module):
    """Scores of weights that start as the last of the input channels: magnitude, or SNIP; a network learns the rest.

    Args:
        population: Initial weights to train on.
        inputs: From weights to channels.
        layer: `NFLinear`, `DeepSets` or `Pointwise`.
        channels: Of every layer.
    """

    def __init__(
        self, population: Population, inputs: nn.Module, layer: Callable[..., nn.Module], channels: int
    ) -> None:
        super().__init__()
        symmetry, features = free_ends(population.symmetry), inputs(population.features())
        size = next(iter(features.values())).shape[-1]
        self.inputs, self.standardise = inputs, Standardise(symmetry, size).fit(features)
        self.factors = nn.Parameter(torch.ones(len(symmetry.dims)))
        blocks = [
            Residual(layer(symmetry, channels, channels), Entrywise(nn.GELU()), ChannelNorm(symmetry, channels))
            for _ in range(2)
        ]
        self.body = nn.Sequential(
            *(Parallel(nn.Identity(), Entrywise(torch.abs)), layer(symmetry, 2 * size, channels)),
            *(LearnedEncoding(population.symmetry, channels), Entrywise(nn.GELU()), *blocks),
            layer(symmetry, channels, 1),
        )

    def forward(self, features: Weights) -> Weights:
        """Name -> `(N, *shape, 1)`, in and out."""
        values = self.standardise(self.inputs(features))
        learned = self.body(values)
        return {
            name: factor * x[..., -1:] + START * learned[name]
            for (name, x), factor in zip(values.items(), self.factors, strict=True)
        }


@dataclass
class Outcome:
    """Accuracies `(networks,)` for every seed, the masks of the first, and the seconds of making masks."""

    accuracies: list[Tensor] = field(default_factory=list)
    masks: Weights = field(default_factory=dict)
    seconds: float = 0.0


class Experiment:
    """Initialisations with the masks of iterative pruning, for training, choosing epochs and testing.

    Args:
        trainer: Trains masked networks.
        given: Arguments of the command.
    """

    def __init__(self, trainer: Trainer, given: argparse.Namespace, zoo: ClassifierZoo) -> None:
        self.trainer, self.given, self.density = trainer, given, 1 - given.sparsity
        symmetry = zoo.symmetry(trainer.images)
        self.definition = {
            "name": f"tickets {trainer.images.name}",
            "sizes": zoo.sizes,
            "steps": trainer.steps,
            "batch": trainer.batch,
            "rate": trainer.rate,
            "sparsity": given.sparsity,
            "rounds": ROUNDS,
            "version": 1,
        }

        def group(number: int) -> Population:
            with torch.random.fork_rng():
                torch.manual_seed(number)
                params = stacked([zoo.module() for _ in range(GROUP)])
            masks = trainer.pruned(params, self.density, ROUNDS)
            columns = {f"mask {name}": x.bool() for name, x in masks.items()}
            return Population(symmetry, params, columns, GROUP * number + torch.arange(GROUP))

        count = given.pairs + given.held_out
        whole = generate(given.populations, self.definition, -(-count // GROUP), group).select(torch.arange(count))
        self.test = whole.select(torch.arange(given.held_out))
        self.train, self.validation = whole.select(torch.arange(given.held_out, count)).split([0.85, 0.15])
        masks = self.masks_of(self.train)
        self.densities = {name: float(x.mean()) for name, x in masks.items()}
        self.frequency = dict[str, Tensor]()  # by position on fixed axes, name -> (1, *shape or 1)
        for name, x in masks.items():
            free = [d for d, axis in enumerate(symmetry.dims[name], 1) if axis in symmetry.free]
            self.frequency[name] = x.mean((0, *free), keepdim=True)

    def masks_of(self, population: Population) -> Weights:
        """What iterative pruning keeps."""
        return {name: population.columns[f"mask {name}"].float() for name in self.trainer.names}

    def loss(self, out: Weights, columns: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of scores and masks, every matrix weighing the same; `(N,)`."""
        parts = [
            F.binary_cross_entropy_with_logits(
                out[name][..., 0], columns[f"mask {name}"].float(), reduction="none"
            ).flatten(1)
            for name in self.trainer.names
        ]
        return torch.stack([part.mean(1) for part in parts]).mean(0)

    def predicted(self, layer: Callable[..., nn.Module], with_gradient: bool, seed: int) -> Weights:
        """Train a predictor of masks; its masks of the test networks, with the layer densities of training."""
        inputs = Gradient(self.trainer) if with_gradient else Magnitude()
        torch.manual_seed(seed)
        model = Scores(self.train, inputs, layer, self.given.channels)
        settings = FitSettings(self.given.epochs, batch=8, learning_rate=5e-3, seed=seed)
        fit(model, self.train, self.validation, self.loss, settings)
        scores = apply(model, self.test, batch=8)
        return largest_of_each({name: scores[name][..., 0] for name in self.trainer.names}, self.densities)


def outcomes_of(experiment: Experiment) -> dict[str, Outcome]:
    """All masks of the test networks, and what networks trained with them reach."""
    e, start, found = experiment, time.monotonic(), dict[str, Outcome]()
    trainer, params, density = e.trainer, dict(experiment.test.params), experiment.density

    def run(name: str, make: Callable[[int], Weights], seeds: int = 1) -> None:
        outcome = Outcome()
        for seed in range(seeds):
            begin = time.monotonic()
            masks = make(seed)
            outcome.seconds += (time.monotonic() - begin) / seeds
            outcome.masks = outcome.masks or masks
            outcome.accuracies.append(trainer.accuracy(params, masks))
        found[name] = outcome
        accuracy = 100 * torch.stack(outcome.accuracies).mean()
        print(f"{name}: {accuracy:.1f} % after {time.monotonic() - start:.0f} s", flush=True)

    def noise(seed: int) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(params[name].shape, generator=generator) for name in trainer.names}

    magnitude = {name: params[name].abs() for name in trainer.names}
    grads = trainer.gradient(params)
    snip = {name: (params[name] * grads[name]).abs() for name in trainer.names}
    equal = dict.fromkeys(trainer.names, density)

    def by_position(seed: int) -> Weights:
        """Drawn with the frequency at which pruning keeps weights of the same input or class (Gumbel's trick)."""
        draws = {name: -(-x.clamp(1e-9, 1 - 1e-7).log()).log() for name, x in noise(seed).items()}
        return {name: x + e.frequency[name].clamp(min=1e-6).log() for name, x in draws.items()}

    run("dense", lambda _: trainer.dense(params))
    run("random, equal densities", lambda seed: largest_of_each(noise(seed), equal), SEEDS)
    run(RANDOM, lambda seed: largest_of_each(noise(seed), e.densities), SEEDS)
    run("magnitude, all matrices together", lambda _: largest(magnitude, density))
    run("magnitude, densities of iterative pruning", lambda _: largest_of_each(magnitude, e.densities))
    run(BY_POSITION, lambda seed: largest_of_each(by_position(seed), e.densities), SEEDS)
    run("SynFlow (no data)", lambda _: trainer.synflow(params, density))
    run(SNIP, lambda _: largest(snip, density))
    run("SNIP, densities of iterative pruning", lambda _: largest_of_each(snip, e.densities))
    run("GraSP", lambda _: largest(trainer.grasp(params), density))
    run("Pointwise, initial weights", lambda seed: e.predicted(Pointwise, False, seed), SEEDS)
    run("DeepSets, initial weights", lambda seed: e.predicted(DeepSets, False, seed), SEEDS)
    run(FROM_INIT, lambda seed: e.predicted(NFLinear, False, seed), SEEDS)
    run("Pointwise, one gradient", lambda seed: e.predicted(Pointwise, True, seed), SEEDS)
    run(WITH_GRADIENT, lambda seed: e.predicted(NFLinear, True, seed), SEEDS)
    run(ONCE, lambda _: trainer.pruned(params, density, 1))
    run(ITERATIVE, lambda _: e.masks_of(e.test))
    return found


def report(experiment: Experiment, outcomes: dict[str, Outcome], title: str) -> Report:
    """Accuracies with intervals over test networks, overlap with iterative pruning, and differences."""
    weights = bootstrap_weights(torch.arange(len(experiment.test)))
    made = Report(title, ["mask", "accuracy, %", "95 %", "overlap with iterative pruning", "s"])
    aim = outcomes[ITERATIVE].masks
    means = {name: torch.stack(outcome.accuracies).mean(0) for name, outcome in outcomes.items()}
    for name, outcome in outcomes.items():
        low, high = interval(weighted_mean(means[name], weights))
        both = sum(float((outcome.masks[n] * aim[n]).sum()) for n in aim) / sum(float(x.sum()) for x in aim.values())
        cells = [f"{100 * means[name].mean():.1f}", f"{100 * low:.1f} to {100 * high:.1f}", f"{both:.2f}"]
        made.rows.append([name, *cells, f"{outcome.seconds:.0f}"])
        made.data[name] = {
            "accuracy": [float(x.mean()) for x in outcome.accuracies],
            "interval": [low, high],
            "overlap": both,
            "seconds": outcome.seconds,
        }
    for ours, theirs in (
        (FROM_INIT, RANDOM),
        (FROM_INIT, BY_POSITION),
        (FROM_INIT, "Pointwise, initial weights"),
        (WITH_GRADIENT, SNIP),
    ):
        difference = means[ours] - means[theirs]
        low, high = (100 * x for x in interval(weighted_mean(difference, weights)))
        made.notes.append(f"{ours} less {theirs}: {100 * difference.mean():+.1f} points ({low:+.1f} to {high:+.1f})")
    shown = ", ".join(f"{name} {100 * x:.1f} %" for name, x in experiment.densities.items())
    made.notes.append(f"layer densities of iterative pruning: {shown}")
    return made


def draw(experiment: Experiment, outcomes: dict[str, Outcome], path: Path) -> None:
    """Masks of the first layer of the first test networks, averaged over neurons: which pixels are seen."""
    mpl.use("Agg")
    first, side = experiment.trainer.names[0], experiment.trainer.images.images.shape[-1]
    names = [name for name in outcomes if name != "dense"]
    count = min(5, len(experiment.test))
    figure, axes = plt.subplots(
        count + 1, len(names), figsize=(1.35 * len(names), 1.25 * count + 2.6), constrained_layout=True
    )
    for column, name in zip(axes.T, names, strict=True):
        masks = outcomes[name].masks[first]  # (N, neurons, pixels)
        pictures = [*masks[:count].mean(1), masks.mean((0, 1))]
        for axis, picture in zip(column, pictures, strict=True):
            axis.imshow(picture.reshape(side, side), cmap="magma", vmin=0)
            axis.set(xticks=[], yticks=[])
        column[0].set_title(name.replace(", ", ",\n").replace(" (", "\n("), fontsize=7, rotation=30, ha="left")
    for n, axis in enumerate(axes[:, 0]):
        axis.set_ylabel(f"network {n}" if n < count else "all", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    """Of the command, filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few small networks")
    parser.add_argument("--images", default="mnist5k", help="digits, mnist5k, or a file NAME.npz in --data")
    parser.add_argument("--data", type=Path, default=None, help="folder of NAME.npz")
    parser.add_argument("--side", type=int, default=None, help="pixels that images are averaged to")
    parser.add_argument("--width", type=int, default=None, help="of the two hidden layers")
    parser.add_argument("--sparsity", type=float, default=0.95, help="fraction of weights that are masked")
    parser.add_argument("--pairs", type=int, default=None, help="networks to learn masks from")
    parser.add_argument("--held-out", type=int, default=None, help="networks to test")
    parser.add_argument("--steps", type=int, default=None, help="of every training of a network")
    parser.add_argument("--rate", type=float, default=None, help="learning rate of every training, with Adam")
    parser.add_argument("--epochs", type=int, default=None, help="of every predictor")
    parser.add_argument("--channels", type=int, default=None, help="of every predictor")
    parser.add_argument("--populations", type=Path, default=Path("runs/populations"), help="where pairs are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/tickets"), help="output folder")
    given = parser.parse_args()
    quick = {"side": 14, "width": 32, "pairs": 60, "held_out": 20, "steps": 200, "rate": 3e-3}
    full = {"side": 14, "width": 64, "pairs": 400, "held_out": 50, "steps": 1000, "rate": 1e-3}
    quick |= {"epochs": 8, "channels": 8}
    full |= {"epochs": 50, "channels": 16}
    for name, value in (quick if given.quick else full).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if not 0 < given.sparsity < 1:
        parser.error(f"expected --sparsity between 0 and 1, found {given.sparsity}")
    return given


def main() -> None:
    """Prune the networks, train the predictors, then report."""
    given, start = arguments(), time.monotonic()
    images = load_images(given.images, given.data, 8 if given.images == "digits" else 28)
    images = images.averaged(given.side).standardised()
    sizes = (given.side**2, given.width, given.width, 10)
    zoo = ClassifierZoo("mlp", sizes, runs=1, steps=1)
    trainer = Trainer(zoo.module(), images, given.steps, given.rate)
    experiment = Experiment(trainer, given, zoo)
    pruned = time.monotonic() - start
    print(f"{given.pairs + given.held_out} networks pruned after {pruned:.0f} s", flush=True)
    outcomes = outcomes_of(experiment)
    title = f"Tickets at {100 * given.sparsity:g} % sparsity, perceptron {'-'.join(map(str, sizes))}, {images.name}"
    made = report(experiment, outcomes, title)
    made.notes += [
        f"{given.pairs} networks to learn from and choose epochs on, {given.held_out} others to test, {given.steps} "
        f"steps of {trainer.batch} images each with Adam at {trainer.rate:g}; predictors of {given.channels} channels, "
        f"{given.epochs} epochs; {SEEDS} seeds of predictors and random masks, intervals over test networks; s: time "
        f"of making the masks",
        f"{time.monotonic() - start:.0f} s, {pruned:.0f} s of them for pruning",
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    draw(experiment, outcomes, given.out / f"{NAME}_masks.png")
    made.write(given.out, NAME, vars(given))
    print(made)
    print(f"wrote {given.out}/{NAME}.json, .md, _masks.png")


if __name__ == "__main__":
    main()
