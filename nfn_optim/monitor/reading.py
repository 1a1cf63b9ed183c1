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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfn_optim.monitor.ear import Ear
from nfn_optim.monitor.journal import Array
from nfn_optim.monitor.sample import Sample
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
        self.places = [place for place, (p, _) in enumerate(everyone) if p.numel() > 0]
        self.slots: list[tuple[Tensor, dict[str, Any]]] = [everyone[place] for place in self.places]
        params = [_plain(p) for p, _ in self.slots]
        self.sample = sample if sample is not None and sample.fits(params) else Sample(params)
        state = [optimizer.state.get(p, {}) for p, _ in self.slots]
        self.entries = self.sample.take(params)  # (T, S)
        self.moments = {key: self.sample.take(_tensors(state, key)) for key in ("exp_avg", "exp_avg_sq")}
        self.steps = self.sample.put(_counts(state, "step"))  # (T,)
        self.fallbacks = self.sample.put(_counts(state, "fallbacks"))  # (T,)


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
        grads = [None if p.grad is None else _plain(p.grad) for p in params]
        state = [optimizer.state.get(p, {}) for p in params]
        moments, squares = _tensors(state, "exp_avg"), _tensors(state, "exp_avg_sq")
        hypers = {id(group): [float(group[key]) for key in HYPERS] for _, group in before.slots}
        facts = [
            [*hypers[id(group)], g is not None, _is_exact(p)] for (p, group), g in zip(before.slots, grads, strict=True)
        ]
        lr, decay, up, there, exact = torch.tensor(facts, device=sample.device, dtype=sample.dtype).T[
            ..., None
        ]  # (T, 1)
        fallbacks = sample.put(_counts(state, "fallbacks"))

        p, d = before.entries, sample.take([_plain(p) for p in params]) - before.entries  # (T, S)
        nominal = _nominal(before, sample.take(grads) * (1 - 2 * up))
        adamw = -lr * (nominal + decay * p)
        cooling = optimizer.rule.cooling(before.steps + 1, optimizer.param_groups[0]["total_steps"])
        rate = lr if cooling is None else lr * cooling[:, None]
        gain = ear.by_weight({name: row for row, name in enumerate(self.names)}, sample)
        gain = torch.where((fallbacks > before.fallbacks)[:, None], 0.0, gain)
        exact = exact * (rate > 0)
        learned = torch.where(exact > 0, -(d / rate + decay * p) * torch.exp(-gain) - nominal, 0.0)

        pairs = {
            "p p": p * p,
            "d d": d * d,
            "a a": adamw * adamw,
            "d a": d * adamw,
            "nominal": exact * nominal * nominal,
            "learned": learned * learned,
        }
        sampled = torch.stack(list(pairs.values())).sum(-1) * sample.weights
        rest = {
            "there": torch.ones_like(fallbacks),
            "size": sample.sizes,
            "gain": sample.put(ear.by_tensor(self.names)) * sample.sizes,
            "fallbacks": fallbacks,
            "g": sample.put(_norms(grads, 2)),
            "m": sample.put(_norms(moments, 2)),
            "v": sample.put(_norms(squares, 1)),
        }
        found = (torch.cat([sampled, torch.stack(list(rest.values()))]) * there[:, 0]).double().cpu().numpy()
        self.sums: dict[str, Array] = dict(zip([*pairs, *rest], found, strict=True))
        for norm in ("g", "m"):
            self.sums[f"{norm} {norm}"] = np.square(self.sums.pop(norm))
        heard = ear.by_neuron(optimizer.symmetry) if isinstance(optimizer.symmetry, Symmetry) else {}
        self.neurons: dict[str, Array] = {a: (value.double() / np.log(2)).cpu().numpy() for a, value in heard.items()}

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


def _nominal(before: Before, grads: Tensor) -> Tensor:
    """Adam's direction for entries with gradients `(T, S)`."""
    symmetry = Symmetry.separate({"sample": grads.shape[1:]})
    state = {"sample": {**before.moments, "step": before.steps}}
    update, _ = NOMINAL({"sample": before.entries}, {"sample": grads}, state, symmetry, lr=-1.0, batch_dims=1)
    nominal: Tensor = update["sample"]
    return nominal


def _tensors(state: Iterable[Mapping[str, Tensor]], key: str) -> list[Tensor | None]:
    """An entry of the state of every tensor."""
    return [_plain(s[key]) if key in s else None for s in state]


def _counts(state: Iterable[Mapping[str, Tensor]], key: str) -> list[Tensor | float]:
    """A counter in the state of every tensor; 0 where there is none yet."""
    return [s.get(key, 0.0) for s in state]


def _norms(tensors: Sequence[Tensor | None], order: int) -> list[Tensor | float]:
    """Of all entries of every tensor, in float32 at least; 0 where there is none."""
    there = [t for t in tensors if t is not None]
    dtype = torch.float32 if any(t.dtype in (torch.bfloat16, torch.float16) for t in there) else None
    norms = iter(torch._foreach_norm(there, order, dtype=dtype) if there else [])
    return [0.0 if t is None else next(norms) for t in tensors]


def _plain(tensor: Tensor) -> Tensor:
    """The real numbers that this process holds: of a sharded tensor the local part, of a complex one both parts."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return torch.view_as_real(local) if local.is_complex() else local


def _is_exact(p: Tensor) -> bool:
    """Whether the learned part can be told from the outside."""
    return p.dtype in (torch.float32, torch.float64) and not hasattr(p, "to_local")
