"""Generative adversarial networks, whose two players are trained by one optimizer with one backward pass.

    D's loss    mean s(-D(x)) + mean s(D(G(z))) + gamma/2 mean |dD(x)/dx|^2      s softplus, x images, z noise
    G's loss    mean s(-D(G(z)))

In D's loss G(z) is a constant, in G's loss the parameters of D are. So the gradient of the sum with respect to either
player is that of its own loss, and both step at once. Reversing the gradient of D's loss for G would take a pass less,
but it vanishes wherever D is sure of itself.

References:
    Generative Adversarial Networks (Goodfellow et al., 2014), Sec. 3, arXiv:1406.2661
    Which Training Methods for GANs do actually Converge? (Mescheder et al., 2018), Sec. 4.1, arXiv:1801.04406
    GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), Eq. 6: the distance, arXiv:1706.08500
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from meta_train.evaluation.task import Scores, Training

NOISE = 64  # channels of the noise
PENALTY = 1.0  # gamma


class GAN(nn.Module):
    """A convolutional generator and discriminator of grey images of 14x14 pixels.

    Args:
        channels: Of the images of 14x14 inside; half as many as of those of 7x7.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 2 * channels * 49, bias=False),
            nn.Unflatten(1, (2 * channels, 7, 7)),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 1, 3, 1, 1),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, channels, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * channels * 9, 1),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Images `(batch, 1, 14, 14)` of noise `(batch, NOISE)`."""
        y: Tensor = self.generator(z)
        return y


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Frechet distance of the normal distributions with the means and covariances of two samples.

    Args:
        x: `(count, features)`.
        y: `(other count, features)`.
    """
    x, y = x.double(), y.double()
    root = _symmetric_root(x.T.cov())
    both = _symmetric_root(root @ y.T.cov() @ root)
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return float(apart + x.T.cov().trace() + y.T.cov().trace() - 2 * both.trace())


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root


def adversarial(
    model: GAN, images: Tensor, held: Tensor, features: Callable[[Tensor], Tensor], batch_size: int
) -> Training:
    """The sum of both players' losses; held-out loss is the Frechet distance of generated from held-out images.

    Args:
        model: Both players.
        images: To train on, `(count, 1, 14, 14)`.
        held: Held out, likewise.
        features: From images to features `(batch, features)`, in which distances are taken.
        batch_size: Images of either kind.
    """
    truth = features(held)
    fixed = torch.randn(len(held), NOISE, generator=torch.Generator().manual_seed(0))

    def loss(batches: torch.Generator) -> Tensor:
        x = images[torch.randint(len(images), (batch_size,), generator=batches)].requires_grad_()
        made = model(torch.randn(batch_size, NOISE, generator=batches))
        constant = {name: p.detach() for name, p in model.discriminator.named_parameters()}
        fooled = F.softplus(-functional_call(model.discriminator, constant, (made,))).mean()
        real = model.discriminator(x)
        told = F.softplus(-real).mean() + F.softplus(model.discriminator(made.detach())).mean()
        (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
        total: Tensor = fooled + told + PENALTY / 2 * slope.square().flatten(1).sum(1).mean()
        return total

    def held_out() -> Scores:
        return {"loss": frechet_distance(features(model(fixed)), truth)}

    return Training(model, loss, held_out)
