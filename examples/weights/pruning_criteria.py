"""Which weights of networks matter before they are trained, by gradients at their initialisation.

References:
    SNIP (Lee et al., 2019), arXiv:1810.02340
    GraSP: Picking Winning Tickets Before Training by Preserving Gradient Flow (Wang et al., 2020), arXiv:2002.07376
    SynFlow: Pruning neural networks without any data (Tanaka et al., 2020), arXiv:2006.05467
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pruning import Weights, largest
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from nfn_optim.populations import Images

ONE_BATCH = 256
"""Images of the one gradient that SNIP, GraSP and predictors may see."""

TEMPERATURE = 200.0
"""Logits are divided by it for GraSP, as published."""

SWEEPS = 100
"""Rounds of SynFlow."""


class Criteria:
    """Scores of weights, of all networks of a stack.

    Args:
        network: Architecture.
        images: What it classifies; `ONE_BATCH` of them are seen.
    """

    def __init__(self, network: nn.Module, images: Images) -> None:
        self.network = network
        self.names = [name for name, p in network.named_parameters() if p.dim() > 1]
        self.x, self.y = images.images[:ONE_BATCH], images.classes[:ONE_BATCH]

    def magnitude(self, params: Weights) -> Weights:
        """Of the weights themselves."""
        return {name: params[name].abs() for name in self.names}

    def snip(self, params: Weights) -> Weights:
        """Magnitudes of products of weights and their gradients."""
        grads = self.gradient(params)
        return {name: (params[name] * grads[name]).abs() for name in self.names}

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
        ones, masks = torch.ones_like(self.x[:1]), {name: torch.ones_like(params[name]) for name in self.names}

        def flow(values: Weights) -> Tensor:
            out: Tensor = functional_call(self.network, values, (ones,)).sum()
            return out

        for n in range(1, SWEEPS + 1):
            positive = {name: x.abs() * masks.get(name, 1.0) for name, x in params.items()}
            slopes = vmap(grad(flow))(positive)
            masks = largest({name: positive[name] * slopes[name] for name in self.names}, density ** (n / SWEEPS))
        return masks
