"""Edit images by editing the weights of the networks that represent them.

Every image is a SIREN, a network from positions to grey values, fitted from initial weights of its own. An editor maps
its weights to other weights, so that the image they represent is dilated, eroded, rotated, ... It is trained on SIRENs
of some images by the pixels that the edited weights render, and tested on others; the score is the mean squared error
of pixels from 0 to 1 (times four for pixels from -1 to 1). Every row is trained in the same call, on the same SIRENs.

    python examples/weights/edit_images.py --quick
    python examples/weights/edit_images.py --edit rotate --images fashion_mnist --data FOLDER --count 9000 --epochs 60
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from baselines import Flat, recipe_layers
from command_line import SEEDS, add_numbers, parsed, parser_of, write
from matplotlib.figure import Figure
from siren_split import SirenSplit
from torch import Tensor, nn

from nfn_optim.layers import Editor, MessageEditor, NFLinear, Pointwise, canonical_signs, free_ends
from nfn_optim.populations import (
    FitSettings,
    Population,
    Report,
    SirenZoo,
    apply,
    bootstrap_weights,
    fit,
    fit_images,
    interval,
    load_images,
    outputs,
    positions,
    sirens,
    stacked,
    weighted_mean,
)
from nfn_optim.symmetry import Symmetry

NAME = "weights_editing"
SIDE = 28
PIXELS = 196
"""Random pixels that the loss of a step is computed on."""

SHOWN = 10
OURS = "MessageEditor, canonical signs"
RECIPE = "nfn's recipe (NP)"


def rotated(images: Tensor, degrees: float = 15.0) -> Tensor:
    """By bilinear interpolation. `(N, 1, side, side)`, in and out."""
    angle = torch.deg2rad(torch.tensor(degrees))
    row = torch.stack([angle.cos(), -angle.sin(), torch.zeros(())])
    matrix = torch.stack([row, torch.stack([angle.sin(), angle.cos(), torch.zeros(())])]).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, align_corners=True)


EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "dilate": lambda x: F.max_pool2d(x, 3, 1, 1),
    "erode": lambda x: -F.max_pool2d(-x, 3, 1, 1),
    "edges": lambda x: F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1),
    "blur": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "contrast": lambda x: (2 * (x - 0.25)).clamp(0, 1),
    "rotate": rotated,
    "shift": lambda x: F.pad(x, (3, 0, 2, 0))[..., : x.shape[-2], : x.shape[-1]],
    "invert": lambda x: 1 - x,
}
"""From images `(N, 1, side, side)`, from 0 to 1, to what the edited weights should represent."""


class Rendered:
    """The loss: mean squared error of the mean image of the edited networks, `(N,)`.

    Args:
        module: The architecture of the SIRENs.
        seed: Of the pixels of a training step.
    """

    def __init__(self, module: nn.Module, seed: int) -> None:
        self.module, self.points = module, positions(SIDE)
        self.generator = torch.Generator().manual_seed(seed)

    def images(self, weights: dict[str, Tensor], points: Tensor) -> Tensor:
        """Name -> `(N, *shape, outputs)` to pixels `(N, points)`."""
        count = next(iter(weights.values())).shape[-1]
        flat = {name: x.movedim(-1, 1).flatten(0, 1) for name, x in weights.items()}  # (N * outputs, *shape)
        values = outputs(self.module, flat, points, chunk=None)[..., 0]
        return (values.unflatten(0, (-1, count)).mean(1) + 1) / 2

    def __call__(self, weights: dict[str, Tensor], columns: dict[str, Tensor]) -> Tensor:
        """On random pixels while training, on all of them otherwise."""
        chosen = torch.arange(SIDE * SIDE)
        if torch.is_grad_enabled():
            chosen = torch.randperm(SIDE * SIDE, generator=self.generator)[:PIXELS]
        target = columns["target"].flatten(1)[:, chosen]
        return (self.images(weights, self.points[chosen]) - target).square().mean(1)


class Recipe(nn.Module):
    """The paper's editor, narrower: Fourier values, three layers with ReLU, a factor of 0.01 for each tensor.

    Args:
        population: Whose weights are edited.
        layer: `NFLinear` or `Pointwise`.
        channels: 128 in the paper.
    """

    def __init__(self, population: Population, layer: Callable[..., nn.Module], channels: int) -> None:
        super().__init__()
        symmetry = free_ends(population.symmetry)
        layers = recipe_layers(population, symmetry, layer, channels, bands=3)
        self.body = nn.Sequential(*layers, layer(symmetry, channels, 1))
        self.factors = nn.ParameterDict({n.replace(".", "/"): torch.tensor(0.01) for n in symmetry.dims})

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name -> `(N, *shape, 1)`, in and out."""
        changes = self.body(features)
        return {n: x + self.factors[n.replace(".", "/")] * changes[n] for n, x in features.items()}


class FlatEditor(nn.Module):
    """A perceptron from all weights in a row to their changes, which does not know about permutations."""

    def __init__(self, population: Population, hidden: int = 256) -> None:
        super().__init__()
        self.flat = Flat(population)
        self.shapes = {name: x.shape[1:] for name, x in population.params.items()}
        size = self.flat.out_features
        self.body = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.last = nn.Linear(hidden, size)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name -> `(N, *shape, 1)`, in and out."""
        found = self.last(self.body(self.flat(features)))
        changes = torch.split(found, [s.numel() for s in self.shapes.values()], 1)
        return {
            name: features[name] + 0.01 * change.reshape(-1, *shape, 1)
            for (name, shape), change in zip(self.shapes.items(), changes, strict=True)
        }


class PixelCNN(nn.Module):
    """Three convolutions on the rendered image: it sees pixels, which an editor of weights does not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
            nn.Conv2d(16, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """`(N, 1, side, side)`, in and out."""
        out: Tensor = images + self.body(images)
        return out


@dataclass
class Outcome:
    """What a method did to the test images.

    Attributes:
        errors: Mean squared error of every test image, for every seed.
        images: `(SHOWN, side * side)` of the first seed.
        seconds: For all seeds.
    """

    errors: list[Tensor] = field(default_factory=list)
    images: Tensor | None = None
    seconds: float = 0.0

    def add(self, images: Tensor, target: Tensor) -> None:
        """Images `(N, side * side)` of one seed."""
        self.errors.append((images - target.flatten(1)).square().mean(1))
        self.images = images[:SHOWN] if self.images is None else self.images


class Experiment:
    """SIRENs with targets, raw and canonical, split by image.

    Args:
        population: The SIRENs.
        zoo: Their definition.
        pixels: All images `(count, 1, side, side)`.
        edit: A name in `EDITS`.
        given: Arguments of the command.
    """

    def __init__(
        self, population: Population, zoo: SirenZoo, pixels: Tensor, edit: str, given: argparse.Namespace
    ) -> None:
        self.zoo, self.module, self.given = zoo, zoo.module(), given
        targets = EDITS[edit](pixels)[:, 0]
        whole = population.with_columns(target=targets[population.columns["image"]])
        self.sirens = SirenSplit(whole, self.module, SIDE)
        self.test = whole.select(self.sirens.in_test)
        self.target = self.test.columns["target"]

    def run(self, build: Callable[[Population], nn.Module], *, canonical: bool, permute: bool = False) -> Outcome:
        """Train and test an editor, for every seed."""
        split, outcome, start = self.sirens, Outcome(), time.monotonic()
        population = split.canonical if canonical else split.raw
        train, validation, test = (population.select(x) for x in (split.in_train, split.in_validation, split.in_test))
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            self.model, loss = build(train), Rendered(self.module, seed)
            rate = self.given.rate if canonical else 1e-3
            settings = FitSettings(
                self.given.epochs, batch=16, learning_rate=rate, weight_decay=1e-3, seed=seed, permute=permute
            )
            fit(self.model, train, validation, loss, settings)
            with torch.no_grad():
                outcome.add(loss.images(apply(self.model, test), loss.points), self.target)
        outcome.seconds = time.monotonic() - start
        return outcome

    def before(self) -> Tensor:
        """What the test SIRENs render, `(N, side * side)`."""
        loss = Rendered(self.module, 0)
        with torch.no_grad():
            return loss.images(self.test.features(), loss.points)

    def pixel_cnn(self) -> Outcome:
        """Trained on rendered training images."""
        outcome, start, loss = Outcome(), time.monotonic(), Rendered(self.module, 0)
        with torch.no_grad():
            train = self.sirens.raw.select(self.sirens.in_train)
            seen = loss.images(train.features(), loss.points).reshape(-1, 1, SIDE, SIDE)
        target = train.columns["target"].unsqueeze(1)
        test = self.before().reshape(-1, 1, SIDE, SIDE)
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = PixelCNN()
            optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
            for _ in range(self.given.epochs * len(seen) // 32):
                index = torch.randint(len(seen), (32,))
                optimizer.zero_grad()
                (model(seen[index]) - target[index]).square().mean().backward()
                optimizer.step()
            with torch.no_grad():
                outcome.add(model(test).flatten(1), self.target)
        outcome.seconds = time.monotonic() - start
        return outcome

    def refitted(self, count: int) -> Outcome:
        """SIRENs fitted to the targets of some test images: the ceiling of one network of this size."""
        start, generator = time.monotonic(), torch.Generator().manual_seed(0)
        test = self.test.select(torch.arange(count))
        outcome, loss = Outcome(), Rendered(self.module, 0)
        torch.manual_seed(0)
        params = {n: x[:, ..., None] for n, x in self._fresh(self.zoo, test.columns["target"], generator).items()}
        with torch.no_grad():
            outcome.add(loss.images(params, loss.points), self.target[:count])
        outcome.seconds = time.monotonic() - start
        return outcome

    def transfer(self, editor: MessageEditor, pixels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """An editor applied to SIRENs of twice the width: errors of no edit and of the editor, `(count,)` each."""
        zoo = replace(self.zoo, sizes=(2, 2 * self.zoo.sizes[1], 2 * self.zoo.sizes[2], 1))
        test = self.test.select(torch.arange(count))
        torch.manual_seed(1)
        wide = self._fresh(zoo, pixels[test.columns["image"], 0], torch.Generator().manual_seed(1))
        population = Population(zoo.symmetry(), wide)
        module = zoo.module()
        signed = canonical_signs(population.features(), zoo.symmetry(), half_period=module.half_period)
        other = message_editor(zoo.symmetry(), self.given)
        other.load_state_dict(editor.state_dict())
        loss = Rendered(module, 0)
        target = self.target[:count].flatten(1)
        with torch.no_grad():
            both = (loss.images(w, loss.points) for w in (signed, other.eval()(signed)))
            before, after = ((x - target).square().mean(1) for x in both)
        return before, after

    def _fresh(self, zoo: SirenZoo, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        params = stacked([zoo.module() for _ in images])
        return fit_images(zoo.module(), params, images, zoo, generator)


def message_editor(symmetry: Symmetry, given: argparse.Namespace, outputs: int = 1) -> MessageEditor:
    """With vectors twice as long as the channels of other editors: an epoch takes half of the time all the same."""
    return MessageEditor(symmetry, channels=2 * given.channels, outputs=outputs)


def report(experiment: Experiment, outcomes: dict[str, Outcome], title: str) -> Report:
    """Errors with intervals over test images, and what is left of the error of nfn's recipe."""
    weights = bootstrap_weights(torch.arange(len(experiment.target)))
    made = Report(title, ["method", "MSE in [0, 1], x 1e-2", "95 %", "MSE in [-1, 1]", "of nfn's recipe", "s"])
    theirs = torch.stack(outcomes[RECIPE].errors).mean(0)
    for name, outcome in outcomes.items():
        errors = torch.stack(outcome.errors).mean(0)
        low, high = interval(weighted_mean(errors, weights[:, : len(errors)]))
        share = float(errors.mean() / theirs[: len(errors)].mean())
        cells = [f"{100 * errors.mean():.2f}", f"{100 * low:.2f} to {100 * high:.2f}", f"{4 * errors.mean():.4f}"]
        made.rows.append([name, *cells, f"{share:.2f}", f"{outcome.seconds:.0f}"])
        by_seed = [float(x.mean()) for x in outcome.errors]
        made.data[name] = {"mse": by_seed, "interval": [low, high], "of_recipe": share, "seconds": outcome.seconds}
    return made


def draw(experiment: Experiment, outcomes: dict[str, Outcome], edit: str) -> Figure:
    """Ten test images: before, target, edited by each method, and the difference of the best editor to the target."""
    target = experiment.target[:SHOWN].flatten(1)
    editors = {name: o for name, o in outcomes.items() if o.images is not None and name != "no edit"}
    best = min((n for n in editors if "Editor" in n), key=lambda n: float(torch.stack(editors[n].errors).mean()))
    rows = {"before": experiment.before()[:SHOWN], f"target: {edit}": target}
    rows |= {name: o.images for name, o in editors.items() if o.images is not None}
    figure, axes = plt.subplots(
        len(rows) + 1, SHOWN, figsize=(SHOWN + 2.6, 1.02 * (len(rows) + 1)), constrained_layout=True, squeeze=False
    )
    for line, (name, images) in zip(axes, rows.items(), strict=False):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.reshape(SIDE, SIDE), cmap="gray", vmin=0, vmax=1)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, image in zip(axes[-1], rows[best] - target, strict=True):
        axis.imshow(image.reshape(SIDE, SIDE), cmap="RdBu", vmin=-1, vmax=1)
    axes[-1][0].set_ylabel(f"{best},\nless target", rotation=0, ha="right", va="center", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


def arguments() -> argparse.Namespace:
    """Of the command, filled in."""
    parser = parser_of(__doc__, "500 images that a package carries", "mnist5k", "editing")
    add_numbers(
        parser,
        count="SIRENs for training",
        held_out="SIRENs for testing",
        fit_steps="steps of every SIREN",
        epochs="of every editor",
        channels="of the editors",
    )
    parser.add_argument("--edit", choices=list(EDITS), default="dilate", help="what the editors learn")
    parser.add_argument("--outputs", type=int, nargs="+", default=[4], help="edited networks that are averaged")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of Editor and MessageEditor")
    quick = {"count": 500, "held_out": 200, "fit_steps": 400, "epochs": 12, "channels": 16}
    full = {"count": 4000, "held_out": 1000, "fit_steps": 1000, "epochs": 40, "channels": 64}
    return parsed(parser, quick=quick, full=full)


def outcomes_of(experiment: Experiment, pixels: Tensor) -> tuple[dict[str, Outcome], tuple[Tensor, Tensor]]:
    """All methods, and what the editor does at twice the width (`Experiment.transfer`)."""
    given, start = experiment.given, time.monotonic()
    outcomes = {"no edit": Outcome()}
    outcomes["no edit"].add(experiment.before(), experiment.target)

    def run(
        name: str, build: Callable[[Population], nn.Module], canonical: bool = False, permute: bool = False
    ) -> None:
        outcomes[name] = experiment.run(build, canonical=canonical, permute=permute)
        error = torch.stack(outcomes[name].errors).mean()
        print(f"{name}: {100 * error:.2f}e-2 after {time.monotonic() - start:.0f} s", flush=True)

    run("flat perceptron", FlatEditor)
    run("flat perceptron, permuted", FlatEditor, permute=True)
    run("Pointwise", lambda p: Recipe(p, Pointwise, given.channels))
    run(RECIPE, lambda p: Recipe(p, NFLinear, given.channels))

    def layers(outputs: int = 1) -> Callable[[Population], nn.Module]:
        return lambda p: Editor(p.symmetry, channels=given.channels, outputs=outputs).fit(p.features())

    def messages(outputs: int = 1) -> Callable[[Population], nn.Module]:
        return lambda p: message_editor(p.symmetry, given, outputs).fit(p.features())

    run("Editor, canonical signs", layers(), canonical=True)
    run("MessageEditor, signs as they are", messages())
    run(OURS, messages(), canonical=True)
    assert isinstance(experiment.model, MessageEditor)
    wide = experiment.transfer(experiment.model, pixels, min(100, given.held_out))
    for count in given.outputs:
        run(f"Editor, canonical signs, mean of {count}", layers(count), canonical=True)
        run(f"{OURS}, mean of {count}", messages(count), canonical=True)
    outcomes["pixel CNN (sees pixels)"] = experiment.pixel_cnn()
    outcomes["refitted to the target (ceiling)"] = experiment.refitted(min(100, given.held_out))
    return outcomes, wide


def main() -> None:
    """Fit the SIRENs, train the editors, then report."""
    given, start = arguments(), time.monotonic()
    images = load_images(given.images, given.data, SIDE)
    zoo = SirenZoo(count=given.count, held_out=given.held_out, steps=given.fit_steps)
    population = sirens(zoo, images, given.populations)
    fitted = time.monotonic() - start
    print(f"{len(population)} SIRENs, {population.columns['psnr'].median():.1f} dB, after {fitted:.0f} s", flush=True)
    experiment = Experiment(population, zoo, images.images, given.edit, given)
    outcomes, wide = outcomes_of(experiment, images.images)
    made = report(experiment, outcomes, f"{given.edit} in weights, SIRENs {zoo.sizes}, {images.name}")
    before, after = (float(x.mean()) for x in wide)
    own = [float(outcomes[n].errors[-1].mean()) for n in ("no edit", OURS)]
    kept = (before - after) / (own[0] - own[1])
    made.data["transfer"] = {"before": before, "after": after, "of_the_gain": kept}
    made.notes += [
        f"applied to SIRENs of twice the width, never seen: {100 * before:.2f}e-2 without an edit, "
        f"{100 * after:.2f}e-2 with the editor of the last seed, {100 * kept:.0f} % of its gain at its own width",
        experiment.sirens.note,
        f"{given.count} SIRENs to train and choose epochs on, {given.held_out} of other images to test; fitted to "
        f"{population.columns['psnr'].median():.1f} dB (median); {given.epochs} epochs, {given.channels} "
        f"channels, {2 * given.channels} of MessageEditor; mean of {SEEDS} seeds, "
        "intervals over images",
        f"{time.monotonic() - start:.0f} s, {fitted:.0f} s of them for the SIRENs",
    ]
    write(made, NAME, given, {f"_{given.edit}": draw(experiment, outcomes, given.edit)})


if __name__ == "__main__":
    main()
