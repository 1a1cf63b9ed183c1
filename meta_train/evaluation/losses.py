"""Losses of benchmark tasks; each function returns the `Training` of a network on data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.evaluation.datasets import Examples
from meta_train.evaluation.networks import VAE, Denoiser
from meta_train.evaluation.task import Scores, Training

HELD = 1000  # examples of held-out scores


def classification(model: nn.Module, data: Examples, batch_size: int, held: int = HELD) -> Training:
    """Cross-entropy, in nats; held-out scores are taken on `held` examples."""

    def loss(batches: torch.Generator) -> Tensor:
        index = torch.randint(len(data.x), (batch_size,), generator=batches)
        return F.cross_entropy(model(data.x[index]), data.y[index])

    def held_out() -> Scores:
        scores = model(data.held_x[:held])
        right = (scores.argmax(-1) == data.held_y[:held]).float().mean().item()
        return {"loss": F.cross_entropy(scores, data.held_y[:held]).item(), "accuracy": right}

    return Training(model, loss, held_out)


def regression(
    model: nn.Module, data: Examples, batch_size: int, error: Callable[[Tensor, Tensor], Tensor] = F.mse_loss
) -> Training:
    """Regression with the loss `error(output, target)`."""

    def loss(batches: torch.Generator) -> Tensor:
        index = torch.randint(len(data.x), (batch_size,), generator=batches)
        return error(model(data.x[index]), data.y[index])

    def held_out() -> Scores:
        return {"loss": error(model(data.held_x[:HELD]), data.held_y[:HELD]).item()}

    return Training(model, loss, held_out)


def language(model: nn.Module, text: Tensor, context: int, batch_size: int) -> Training:
    """Cross-entropy of every next character, in nats; the last tenth of the text is held out."""
    border = len(text) * 9 // 10
    places = torch.arange(context + 1)
    held = text[torch.linspace(border, len(text) - context - 1, 64).long().unsqueeze(-1) + places]

    def of(passages: Tensor) -> Tensor:  # (batch, context + 1)
        return F.cross_entropy(model(passages[:, :-1]).transpose(1, 2), passages[:, 1:])

    def loss(batches: torch.Generator) -> Tensor:
        start = torch.randint(border - context, (batch_size, 1), generator=batches)
        return of(text[start + places])

    return Training(model, loss, lambda: {"loss": of(held).item()})


def variational(model: VAE, data: Examples, batch_size: int, latent: int) -> Training:
    """Negative evidence lower bound: reconstruction error and divergence from the prior, in nats per pixel."""
    noise = torch.randn(HELD, latent, generator=torch.Generator().manual_seed(0))

    def of(x: Tensor, noise: Tensor) -> Tensor:
        x = x.flatten(1)
        again, divergence = model(x, noise)
        bound: Tensor = (0.5 * (again - x).square().sum(-1) / 0.05 + divergence).mean() / x.shape[1]
        return bound

    def loss(batches: torch.Generator) -> Tensor:
        index = torch.randint(len(data.x), (batch_size,), generator=batches)
        return of(data.x[index], torch.randn(batch_size, latent, generator=batches))

    return Training(model, loss, lambda: {"loss": of(data.held_x[:HELD], noise[: len(data.held_x)]).item()})


def denoising(model: Denoiser, data: Examples, batch_size: int) -> Training:
    """Squared error of a diffusion model's noise prediction, on a cosine schedule.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), Alg. 1, arXiv:2006.11239
    """

    def of(x: Tensor, generator: torch.Generator) -> Tensor:
        x = x.flatten(1)
        t = torch.rand(len(x), 1, generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        mixed = (t * math.pi / 2).cos() * x + (t * math.pi / 2).sin() * noise
        return F.mse_loss(model(mixed, t), noise)

    def loss(batches: torch.Generator) -> Tensor:
        return of(data.x[torch.randint(len(data.x), (batch_size,), generator=batches)], batches)

    return Training(model, loss, lambda: {"loss": of(data.held_x[:HELD], torch.Generator().manual_seed(0)).item()})


def contrastive(model: nn.Module, data: Examples, batch_size: int) -> Training:
    """Contrastive loss of shifted, noisy views of an image: cross-entropy over the batch, in nats.

    References:
        A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., 2020), arXiv:2002.05709
    """

    def view(x: Tensor, generator: torch.Generator) -> Tensor:
        by = torch.randint(-2, 3, (2,), generator=generator).tolist()
        return torch.roll(x, by, (-2, -1)) + 0.5 * torch.randn(x.shape, generator=generator)

    def of(x: Tensor, generator: torch.Generator) -> Tensor:
        one, other = (F.normalize(model(view(x, generator)), dim=-1) for _ in range(2))
        return F.cross_entropy(one @ other.T / 0.2, torch.arange(len(x)))

    def loss(batches: torch.Generator) -> Tensor:
        return of(data.x[torch.randint(len(data.x), (batch_size,), generator=batches)], batches)

    def held_out() -> Scores:
        generator = torch.Generator().manual_seed(0)
        parts = torch.split(data.held_x[: 8 * batch_size], batch_size)
        return {"loss": sum(of(part, generator).item() for part in parts) / len(parts)}

    return Training(model, loss, held_out)


def policy_gradient(model: nn.Module, side: int, episodes: int) -> Training:
    """Navigation to a goal on a slippery grid, by REINFORCE with the batch's mean return as baseline.

    A step costs 1 / longest, a tenth of the moves are random, an episode ends at the goal. The *value* of the loss is
    the mean cost of an episode, 0 to 1, and its *gradient* the policy gradient estimate.

    Args:
        model: From position and goal, one-hot `(episodes, 2 * side * side)`, to scores of four moves.
        side: Of the grid, in cells.
        episodes: Episodes per batch.

    References:
        Simple statistical gradient-following algorithms (Williams, 1992)
    """
    longest = 3 * side
    moves = torch.tensor([(0, 1), (0, -1), (1, 0), (-1, 0)])

    def play(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The log probability of every move and whether the goal was not yet reached, `(longest, count)` each."""
        place, goal = torch.randint(side, (2, count, 2), generator=generator)
        said, still = [], []
        for _ in range(longest):
            still.append((place != goal).any(-1).float())
            seen = torch.cat([F.one_hot(xy[:, 0] * side + xy[:, 1], side * side) for xy in (place, goal)], -1).float()
            logits = F.log_softmax(model(seen), -1)  # (count, 4)
            chosen = torch.multinomial(logits.detach().exp(), 1, generator=generator)
            said.append(logits.gather(-1, chosen)[:, 0])
            slips = torch.rand(count, generator=generator) < 0.1  # noqa: PLR2004
            move = torch.where(slips, torch.randint(4, (count,), generator=generator), chosen[:, 0])
            place = torch.where(still[-1].bool().unsqueeze(-1), (place + moves[move]).clamp(0, side - 1), place)
        return torch.stack(said), torch.stack(still)

    def loss(batches: torch.Generator) -> Tensor:
        said, still = play(episodes, batches)
        to_come = still.flip(0).cumsum(0).flip(0) / longest  # cost from this step on
        advantage = (to_come - to_come.mean(1, keepdim=True)) * still
        surrogate = (said * advantage).sum(0).mean()
        return surrogate - surrogate.detach() + still.mean()

    def held_out() -> Scores:
        return {"loss": play(HELD, torch.Generator().manual_seed(0))[1].mean().item()}

    return Training(model, loss, held_out)
