"""Statistics of one step, from the parameters before and after it and from what AdamW would have done.

    p, m, v         parameter and moments before the step, g its gradient
    d               change of p in the step
    nominal         m^ / (sqrt(v^) + eps) with g in the moments, by `UpdateRule.adamw`
    a               -lr (nominal + weight_decay p), AdamW's update
    learned         -(d / lr + weight_decay p) / gain - nominal

They are sums over the entries of every tensor, from which those of groups of tensors follow. d is measured on the
parameter: in bfloat16 and float16 it is mostly rounding, and the learned part is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfn_optim.monitor.gains import LogGains
from nfn_optim.monitor.sampling import Sample, local_real_view, to_numpy
from nfn_optim.monitor.writer import Array
from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.optimizer.state import entries_of
from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import Symmetry

HYPERPARAMETERS = ("lr", "weight_decay", "maximize")  # of a parameter group


class Snapshot:
    """Samples of an optimizer's parameters and state before a step.

    Args:
        optimizer: The optimizer.
        sample: The sampled entries; a new sample is drawn if it does not fit.

    Attributes:
        indices: Indices of the sampled parameters, those with entries in this process, in the order of the groups.
        params: The T sampled parameters, each with its parameter group.
        entries: Of the parameters, `(T, S)`.
        moments: State key -> entries, `(T, S)`.
        steps: Steps of every tensor, `(T,)`.
    """

    @torch.no_grad()
    def __init__(self, optimizer: NFNOptimizer, sample: Sample | None = None) -> None:
        params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        self.indices = [index for index, (p, _) in enumerate(params) if local_real_view(p).numel() > 0]
        self.params: list[tuple[Tensor, dict[str, Any]]] = [params[index] for index in self.indices]
        views = [local_real_view(p) for p, _ in self.params]
        self.sample = sample if sample is not None and sample.fits(views) else Sample(views)
        state = [entries_of(optimizer.state.get(p) or {}) for p, _ in self.params]
        self.entries = self.sample.take(views)
        self.moments = {key: self.sample.take(_moments_of(state, key, views)) for key in ("exp_avg", "exp_avg_sq")}
        self.steps = to_numpy([s.get("step", 0.0) for s in state])


class StepStatistics:
    """Statistics of a step; made after it.

    Args:
        before: The snapshot taken before the step.
        optimizer: The optimizer after the step.

    Attributes:
        names: Of the T tensors.
        sums: Name -> sum over every tensor, `(T,)`, 0 for tensors without a gradient.
        neuron_gains: Free axis -> binary logarithm of the gain of every neuron.
    """

    @torch.no_grad()
    def __init__(self, before: Snapshot, optimizer: NFNOptimizer) -> None:
        names, sample = optimizer.names, before.sample
        self.names = tuple(names[index] for index in before.indices)
        params = [p for p, _ in before.params]
        grads = [None if p.grad is None else local_real_view(p.grad) for p in params]
        state = [entries_of(optimizer.state.get(p, {})) for p in params]
        views = [local_real_view(p) for p in params]
        numbers = {id(group): [float(group[key]) for key in HYPERPARAMETERS] for _, group in before.params}
        table = [
            [*numbers[id(group)], g is not None, _is_exact(p)]
            for (p, group), g in zip(before.params, grads, strict=True)
        ]
        columns = np.array(table, before.entries.dtype).reshape(-1, 5).T[..., None]
        lr, decay, maximize, has_grad, is_exact = columns  # (T, 1) each

        p, d = before.entries, sample.take(views) - before.entries  # (T, S)
        nominal = _adam_direction(before, sample.take(grads) * (1 - 2 * maximize))
        adamw = -lr * (nominal + decay * p)
        rate = lr * _lr_factor(before, optimizer)
        log_gains = LogGains(optimizer)
        is_exact *= rate > 0
        with np.errstate(all="ignore"):
            gain = np.exp(log_gains.by_weight(self.names, sample))
            learned = -(d / rate + decay * p) / gain - nominal
        learned[is_exact[:, 0] == 0] = 0.0

        def dot(one: Array, other: Array) -> Array:
            with np.errstate(over="ignore", invalid="ignore"):
                products: Array = (one * other).sum(-1) * sample.sizes / sample.counts
            return products

        second_moments = _moments_of(state, "exp_avg_sq", views)
        sums = {
            "tensors": np.ones(len(params)),
            "size": sample.sizes,
            "p p": dot(p, p),
            "d d": dot(d, d),
            "a a": dot(adamw, adamw),
            "d a": dot(d, adamw),
            "nominal": dot(is_exact * nominal, nominal),
            "learned": dot(learned, learned),
            "log gain": log_gains.by_tensor(self.names) * sample.sizes,
            "g g": _sums_of_squares(grads),
            "m m": _sums_of_squares(_moments_of(state, "exp_avg", views)),
            "v": to_numpy([0.0 if v is None else v.sum(dtype=_sum_dtype(v)) for v in second_moments]),
            "fallbacks": to_numpy([s["fallbacks"].sum() if "fallbacks" in s else 0.0 for s in state]),
        }
        self.sums: dict[str, Array] = {name: value * has_grad[:, 0] for name, value in sums.items()}
        symmetry = optimizer.symmetry
        log_neuron_gains = {} if symmetry is None else log_gains.by_neuron(symmetry)
        self.neuron_gains: dict[str, Array] = {axis: value / np.log(2) for axis, value in log_neuron_gains.items()}

    def by_group(self, membership: Array) -> dict[str, Array]:
        """The quantities shown of groups of tensors.

        Args:
            membership: `(groups, T)`, 1 for the tensors of a group.

        Returns:
            Quantity -> a value for every group, not finite where it is undefined.
        """
        s = {name: membership @ value for name, value in self.sums.items()}
        with np.errstate(divide="ignore", invalid="ignore"):
            has_grad = np.where(s["tensors"] > 0, 1.0, np.nan)
            return {
                "update_over_weight": np.sqrt(s["d d"] / s["p p"]),
                "cosine": s["d a"] / np.sqrt(s["d d"] * s["a a"]),
                "learned_over_nominal": np.sqrt(s["learned"] / s["nominal"]),
                "gain": np.exp(s["log gain"] / s["size"]),
                "gradient_norm": np.sqrt(s["g g"]) * has_grad,
                "first_moment_norm": np.sqrt(s["m m"]) * has_grad,
                "second_moment_norm": np.sqrt(s["v"]) * has_grad,
                "fallbacks": s["fallbacks"] * has_grad,
            }


def _adam_direction(before: Snapshot, grads: Array) -> Array:
    """Adam's direction for sampled entries with gradients `(T, S)`."""
    moments = {key: torch.from_numpy(value) for key, value in before.moments.items()}
    params, grad = torch.from_numpy(before.entries), torch.from_numpy(grads)
    state = {"sample": {**moments, "step": torch.from_numpy(before.steps).to(grad.dtype)}}
    symmetry, rule = _vector_symmetry(grads.shape[1]), UpdateRule.adamw()
    update, _ = rule({"sample": params}, {"sample": grad}, state, symmetry, lr=-1.0, batch_dims=1)
    direction: Array = update["sample"].numpy()
    return direction


@lru_cache(maxsize=16)
def _vector_symmetry(count: int) -> Symmetry:
    """The symmetry of a single vector of so many entries."""
    return Symmetry.separate({"sample": (count,)})


def _lr_factor(before: Snapshot, optimizer: NFNOptimizer) -> Array:
    """The rule's factor of the learning rate at the step, `(T, 1)`."""
    total_steps = optimizer.param_groups[0]["total_steps"]
    factor = optimizer.rule.lr_factor(torch.from_numpy(before.steps + 1), total_steps)
    return np.ones((len(before.steps), 1)) if factor is None else factor.numpy()[:, None]


def _moments_of(state: Iterable[Mapping[str, Any]], key: str, views: Sequence[Tensor]) -> list[Tensor | None]:
    """A moment of every tensor; None where there is none, or one that was edited and does not fit before a step."""
    found = [local_real_view(s[key]) if isinstance(s.get(key), Tensor) else None for s in state]
    return [x if x is not None and x.shape == view.shape else None for x, view in zip(found, views, strict=True)]


def _sums_of_squares(tensors: Sequence[Tensor | None]) -> Array:
    """Sum of squares of every tensor, in float32 at least; 0 for None. `(T,)`."""
    flat = [None if t is None else t.reshape(-1).to(_sum_dtype(t)) for t in tensors]
    return to_numpy([0.0 if t is None else t.dot(t) for t in flat])  # several times faster than a norm


def _sum_dtype(t: Tensor) -> torch.dtype:
    """The dtype for sums over a tensor."""
    return torch.promote_types(t.dtype, torch.float32)


def _is_exact(p: Tensor) -> bool:
    """Whether the learned part follows from the change of a parameter."""
    return p.dtype in (torch.float32, torch.float64) and not hasattr(p, "to_local")
