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
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from accuracies import cells_of, difference_note
from command_line import SEEDS, add_numbers, parsed, parser_of, write
from matplotlib.figure import Figure
from pruning import GROUP, Trainer, Weights, largest, largest_of_each
from pruning_criteria import Criteria
from ticket_predictors import Gradient, Magnitude, Scores
from torch import Tensor, nn

from nfn_optim.layers import DeepSets, NFLinear, Pointwise
from nfn_optim.populations import (
    ClassifierZoo,
    FitSettings,
    Population,
    Report,
    apply,
    bootstrap_weights,
    fit,
    generate,
    interval,
    load_images,
    stacked,
    weighted_mean,
)

NAME = "weights_tickets"
ROUNDS = 5
"""Of iterative pruning."""

RANDOM = "random, densities of iterative pruning"
BY_POSITION = "random, densities of iterative pruning by input and class"
SNIP = "SNIP"
ONCE = "pruning once (trains the network)"
ITERATIVE = f"pruning in {ROUNDS} rounds (trains it {ROUNDS} times)"
FROM_INIT = "NF-layers, initial weights"
WITH_GRADIENT = "NF-layers, one gradient"


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
        self.criteria = Criteria(trainer.network, trainer.images)
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
        inputs = Gradient(self.criteria) if with_gradient else Magnitude()
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

    magnitude, snip = e.criteria.magnitude(params), e.criteria.snip(params)
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
    run("SynFlow (no data)", lambda _: e.criteria.synflow(params, density))
    run(SNIP, lambda _: largest(snip, density))
    run("SNIP, densities of iterative pruning", lambda _: largest_of_each(snip, e.densities))
    run("GraSP", lambda _: largest(e.criteria.grasp(params), density))
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
        both = sum(float((outcome.masks[n] * aim[n]).sum()) for n in aim) / sum(float(x.sum()) for x in aim.values())
        made.rows.append([name, *cells_of(means[name], weights), f"{both:.2f}", f"{outcome.seconds:.0f}"])
        made.data[name] = {
            "accuracy": [float(x.mean()) for x in outcome.accuracies],
            "interval": list(interval(weighted_mean(means[name], weights))),
            "overlap": both,
            "seconds": outcome.seconds,
        }
    for ours, theirs in (
        (FROM_INIT, RANDOM),
        (FROM_INIT, BY_POSITION),
        (FROM_INIT, "Pointwise, initial weights"),
        (WITH_GRADIENT, SNIP),
    ):
        made.notes.append(difference_note(f"{ours} less {theirs}", means[ours] - means[theirs], weights))
    shown = ", ".join(f"{name} {100 * x:.1f} %" for name, x in experiment.densities.items())
    made.notes.append(f"layer densities of iterative pruning: {shown}")
    return made


def draw(experiment: Experiment, outcomes: dict[str, Outcome]) -> Figure:
    """Masks of the first layer of the first test networks, averaged over neurons: which pixels are seen."""
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
    return figure


def arguments() -> argparse.Namespace:
    """Of the command, filled in."""
    parser = parser_of(__doc__, "few small networks", "mnist5k", "tickets")
    add_numbers(
        parser,
        side="pixels that images are averaged to",
        width="of the two hidden layers",
        pairs="networks to learn masks from",
        held_out="networks to test",
        steps="of every training of a network",
        epochs="of every predictor",
        channels="of every predictor",
    )
    parser.add_argument("--sparsity", type=float, default=0.95, help="fraction of weights that are masked")
    parser.add_argument("--rate", type=float, default=None, help="learning rate of every training, with Adam")
    quick = {"side": 14, "width": 32, "pairs": 60, "held_out": 20, "steps": 200, "rate": 3e-3}
    full = {"side": 14, "width": 64, "pairs": 400, "held_out": 50, "steps": 1000, "rate": 1e-3}
    quick |= {"epochs": 8, "channels": 8}
    full |= {"epochs": 50, "channels": 16}
    given = parsed(parser, quick=quick, full=full)
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
    write(made, NAME, given, {"_masks": draw(experiment, outcomes)})


if __name__ == "__main__":
    main()
