"""What one step did to every tensor, seen from outside: the difference that it made, beside what AdamW had made.

    p, m, v         parameter and moments before the step, g its gradient
    d               what the step added to p
    nominal         m^ / (sqrt(v^) + eps) with g in the moments, by `UpdateRule.nominal`
    a               -lr (nominal + weight_decay p), what AdamW adds
    learned         -(d / lr + weight_decay p) / gain - nominal

Sums over the entries of every tensor are kept, since those of several tensors together follow from them. d is what
arrived in the parameter: in bfloat16 and float16 mostly rounding, so that the learned part is left out there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfn_optim.monitor.gain_hook import Ear
from nfn_optim.monitor.sampling import Sample, numbers, plain
from nfn_optim.monitor.writer import Array
from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import Symmetry

HYPERS = ("lr", "weight_decay", "maximize")
NOMINAL = UpdateRule.nominal()


class Before:
    """The parameters of an optimizer and what it remembers of them, before a step.

    Args:
        optimizer: The optimizer.
        sample: Which entries to look at; made anew if it does not fit.
    """

    @torch.no_grad()
    def __init__(self, optimizer: NFNOptimizer, sample: Sample | None = None) -> None:
        everyone = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        self.places = [place for place, (p, _) in enumerate(everyone) if plain(p).numel() > 0]
        self.slots: list[tuple[Tensor, dict[str, Any]]] = [everyone[place] for place in self.places]
        params = [plain(p) for p, _ in self.slots]
        self.sample = sample if sample is not None and sample.fits(params) else Sample(params)
        state = [optimizer.state.get(p, {}) for p, _ in self.slots]
        self.entries = self.sample.take(params)  # (T, S)
        self.moments = {key: self.sample.take(_tensors(state, key)) for key in ("exp_avg", "exp_avg_sq")}
        self.steps = numbers([s.get("step", 0.0) for s in state])  # (T,)
        self.fallbacks = numbers([s.get("fallbacks", 0.0) for s in state])  # (T,)


class Reading:
    """What a step did; made after it.

    Args:
        before: What there was before.
        optimizer: The optimizer after the step.
        ear: What heard the rule in between.

    Attributes:
        names: Of the T tensors.
        sums: Name -> sum over every tensor, `(T,)`, 0 for tensors without a gradient.
        neurons: Free axis -> binary logarithm of the gain of every neuron.
    """

    @torch.no_grad()
    def __init__(self, before: Before, optimizer: NFNOptimizer, ear: Ear) -> None:
        names, sample = optimizer.names, before.sample
        self.names = tuple(names[place] for place in before.places)
        params = [p for p, _ in before.slots]
        grads = [None if p.grad is None else plain(p.grad) for p in params]
        state = [optimizer.state.get(p, {}) for p in params]
        hypers = {id(group): [float(group[key]) for key in HYPERS] for _, group in before.slots}
        facts = [
            [*hypers[id(group)], g is not None, _is_exact(p)] for (p, group), g in zip(before.slots, grads, strict=True)
        ]
        lr, decay, up, there, exact = np.array(facts, before.entries.dtype).reshape(-1, 5).T[..., None]  # (T, 1)

        p, d = before.entries, sample.take([plain(p) for p in params]) - before.entries  # (T, S)
        nominal = _nominal(before, sample.take(grads) * (1 - 2 * up))
        adamw = -lr * (nominal + decay * p)
        rate = lr * _cooling(before, optimizer)
        fallbacks = numbers([s.get("fallbacks", 0.0) for s in state])
        gain = ear.by_weight({name: row for row, name in enumerate(self.names)}, sample)
        gain *= (fallbacks == before.fallbacks)[:, None]
        exact *= rate > 0
        with np.errstate(all="ignore"):
            learned = -(d / rate + decay * p) * np.exp(-gain) - nominal
        learned[exact[:, 0] == 0] = 0.0

        def dot(one: Array, other: Array) -> Array:
            with np.errstate(over="ignore", invalid="ignore"):
                found: Array = (one * other).sum(-1) * sample.sizes / sample.counts
            return found

        sums = {
            "there": np.ones(len(params)),
            "size": sample.sizes,
            "p p": dot(p, p),
            "d d": dot(d, d),
            "a a": dot(adamw, adamw),
            "d a": dot(d, adamw),
            "nominal": dot(exact * nominal, nominal),
            "learned": dot(learned, learned),
            "gain": ear.by_tensor(self.names) * sample.sizes,
            "g g": _squares(grads),
            "m m": _squares(_tensors(state, "exp_avg")),
            "v": numbers([0.0 if v is None else v.sum(dtype=_precise(v)) for v in _tensors(state, "exp_avg_sq")]),
            "fallbacks": fallbacks,
        }
        self.sums: dict[str, Array] = {name: value * there[:, 0] for name, value in sums.items()}
        heard = ear.by_neuron(optimizer.symmetry) if isinstance(optimizer.symmetry, Symmetry) else {}
        self.neurons: dict[str, Array] = {axis: value / np.log(2) for axis, value in heard.items()}

    def lines(self, members: Array) -> dict[str, Array]:
        """What is shown of lines of tensors.

        Args:
            members: `(lines, T)`, 1 where a tensor belongs to a line.

        Returns:
            Name of a quantity -> a value for every line, not finite where there is nothing to say.
        """
        s = {name: members @ value for name, value in self.sums.items()}
        with np.errstate(divide="ignore", invalid="ignore"):
            there = np.where(s["there"] > 0, 1.0, np.nan)
            return {
                "update_over_weight": np.sqrt(s["d d"] / s["p p"]),
                "cosine": s["d a"] / np.sqrt(s["d d"] * s["a a"]),
                "learned_over_nominal": np.sqrt(s["learned"] / s["nominal"]),
                "gain": np.exp(s["gain"] / s["size"]),
                "gradient_norm": np.sqrt(s["g g"]) * there,
                "first_moment_norm": np.sqrt(s["m m"]) * there,
                "second_moment_norm": np.sqrt(s["v"]) * there,
                "fallbacks": s["fallbacks"] * there,
            }


def _nominal(before: Before, grads: Array) -> Array:
    """Adam's direction for entries with gradients `(T, S)`."""
    moments = {key: torch.from_numpy(value) for key, value in before.moments.items()}
    params, grad = torch.from_numpy(before.entries), torch.from_numpy(grads)
    state = {"sample": {**moments, "step": torch.from_numpy(before.steps).to(grad.dtype)}}
    update, _ = NOMINAL({"sample": params}, {"sample": grad}, state, _separate(grads.shape[1]), lr=-1.0, batch_dims=1)
    nominal: Array = update["sample"].numpy()
    return nominal


@lru_cache(maxsize=16)
def _separate(count: int) -> Symmetry:
    """The symmetry of entries that have nothing to do with each other."""
    return Symmetry.separate({"sample": (count,)})


def _cooling(before: Before, optimizer: NFNOptimizer) -> Array:
    """What the rule multiplies the learning rate by, `(T, 1)`."""
    total = optimizer.param_groups[0]["total_steps"]
    found = optimizer.rule.cooling(torch.from_numpy(before.steps + 1), total)
    return np.ones((len(before.steps), 1)) if found is None else found.numpy()[:, None]


def _tensors(state: Iterable[Mapping[str, Tensor]], key: str) -> list[Tensor | None]:
    """An entry of the state of every tensor."""
    return [plain(s[key]) if key in s else None for s in state]


def _squares(tensors: Sequence[Tensor | None]) -> Array:
    """Sum of the squares of every tensor, in float32 at least; 0 where there is none. `(T,)`."""
    flat = [None if t is None else t.reshape(-1).to(_precise(t)) for t in tensors]
    return numbers([0.0 if t is None else t.dot(t) for t in flat])  # several times faster than a norm


def _precise(t: Tensor) -> torch.dtype:
    """What sums over a tensor are in."""
    return torch.promote_types(t.dtype, torch.float32)


def _is_exact(p: Tensor) -> bool:
    """Whether the learned part can be told from the outside."""
    return p.dtype in (torch.float32, torch.float64) and not hasattr(p, "to_local")
