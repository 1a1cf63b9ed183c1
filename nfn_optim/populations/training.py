"""Training many small networks of one architecture together.

All networks take a step at once: their parameters are stacked, the forward pass is mapped over the stack
(`torch.func.vmap`, so that linear layers become one batched product and convolutions one grouped convolution), and
every network has its own learning rate, weight decay, momentum or Adam, batch and loss.

References:
    Adam (Kingma and Ba, 2015), arXiv:1412.6980
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

Params = dict[str, Tensor]


@dataclass(frozen=True)
class StepSettings:
    """How every network takes its steps; `(N,)` each.

    Attributes:
        learning_rate: Per step; for SGD of the gradient.
        weight_decay: L2 penalty, added to the gradient.
        adam: Whether a network uses Adam, otherwise SGD with momentum 0.9.
    """

    learning_rate: Tensor
    weight_decay: Tensor
    adam: Tensor

    @classmethod
    def same(cls, count: int, learning_rate: float) -> StepSettings:
        """Adam with one learning rate for `count` networks."""
        return cls(torch.full((count,), learning_rate), torch.zeros(count), torch.ones(count, dtype=torch.bool))


def stacked(models: Sequence[nn.Module]) -> Params:
    """The parameters of modules of one architecture, name -> `(N, *shape)`, detached.

    Raises:
        ValueError: They differ in shape, or a module has buffers, which `train_together` would not update.
    """
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in models]
    for n, other in enumerate(shapes):
        if other != shapes[0]:
            raise ValueError(f"expected networks of one architecture, {shapes[0]}, network {n} has {other}")
    params, buffers = stack_module_state(list(models))
    if buffers:
        raise ValueError(f"expected networks without buffers, found {sorted(buffers)}")
    return {name: x.detach() for name, x in params.items()}


def train_together(
    module: nn.Module,
    params: Mapping[str, Tensor],
    batches: Iterable[tuple[tuple[Tensor, ...], Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    settings: StepSettings,
    schedule: Callable[[int], float] = lambda _: 1.0,
) -> Iterable[Params]:
    """Train all networks of a stack, one step for each batch.

    Args:
        module: The architecture; its own parameters are not used.
        params: Name -> `(N, *shape)`; not changed.
        batches: Inputs, each `(N, ...)`, and targets `(N, ...)`.
        loss: Of the outputs and targets of one network, a scalar.
        settings: For every network.
        schedule: Factor of the learning rates at step 0, 1, ...

    Yields:
        The parameters after every step: the same tensors each time, so clone what is to be kept. A network whose
        gradient is not finite stays where it is.
    """

    def loss_of(values: Params, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        return loss(functional_call(module, values, inputs), targets)

    losses_of = vmap(loss_of, randomness="different")
    values = {name: x.detach().clone().requires_grad_() for name, x in params.items()}
    stack = list(values.values())
    first, second = ([torch.zeros_like(x) for x in stack] for _ in range(2))
    wide = [(-1, *(1,) * (x.dim() - 1)) for x in stack]
    any_sgd, any_decay = not bool(settings.adam.all()), bool(settings.weight_decay.any())
    for step, (inputs, targets) in enumerate(batches):
        grads = torch.autograd.grad(losses_of(values, inputs, targets).sum(), stack)
        rate = settings.learning_rate * schedule(step)
        with torch.no_grad():
            for x, g, m, v, shape in zip(stack, grads, first, second, wide, strict=True):
                finite = g.isfinite().flatten(1).all(1).reshape(shape)
                g = torch.where(finite, g, 0.0) if not finite.all() else g  # noqa: PLW2901
                if any_decay:
                    g = g + settings.weight_decay.reshape(shape) * x  # noqa: PLW2901
                m.lerp_(g, 0.1)
                v.lerp_(g.square(), 0.001)
                root = (v / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
                change = m / (1 - 0.9 ** (step + 1)) / root
                if any_sgd:  # momentum 0.9 sums gradients, ten times their mean
                    change = torch.where(settings.adam.reshape(shape), change, 10.0 * m)
                x.sub_(change * rate.reshape(shape))
        yield values
