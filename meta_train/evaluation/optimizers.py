"""Optimizers under comparison, each made in one line, and how their learning rate goes.

    factor of step k = min(1, (k + 1) / W) (1 + cos(pi k / K)) / 2      K steps in all, W of them warm-up

without the first factor where there is no warm-up, and without the second where the rate is constant.

References:
    Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019), arXiv:1711.05101
    Muon (Jordan et al., 2024): `torch.optim.Muon`, steps of AdamW's size
    The Road Less Scheduled (Defazio et al., 2024), arXiv:2405.15682: package `schedulefree`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import product

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nfn_optim import NFNOptimizer, RuleConfig, Symmetry, pretrained

WARMUP = 0.1  # fraction of the steps
WIDE = 40  # neurons of the network that rules are told apart by
PROBE = 10  # steps after which it is looked where a rule takes a network
Make = Callable[[nn.Module, float, int | None], list[Optimizer]]
"""From a network, a learning rate and the horizon, if it is told, to optimizers that step together."""


def adamw(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """AdamW without weight decay: none of the others has any."""
    return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)]


def adamw_defaults(model: nn.Module, _lr: float, _horizon: int | None) -> list[Optimizer]:
    """AdamW as it comes: learning rate 1e-3, weight decay 1e-2."""
    return [torch.optim.AdamW(model.parameters(), fused=True)]


def adam(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """Adam."""
    return [torch.optim.Adam(model.parameters(), lr=lr, fused=True)]


def sgd(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """SGD with momentum .9."""
    return [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)]


def muon(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """Muon for matrices other than embeddings, AdamW for the rest at the same rate."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    params = list(model.parameters())
    matrices = [p for p in params if p.dim() == 2 and id(p) not in embeddings]  # noqa: PLR2004 - rows and columns
    others = [p for p in params if all(p is not matrix for matrix in matrices)]
    made: list[Optimizer] = []
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    if others:
        made.append(torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True))
    return made


def schedule_free(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """Schedule-free AdamW.

    Raises:
        ModuleNotFoundError: The package `schedulefree` is not installed.
    """
    try:
        from schedulefree import AdamWScheduleFree  # noqa: PLC0415 - an extra, needed by this baseline only
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package schedulefree; install it with `pip install -e '.[evaluate]' -c constraints.txt`"
        ) from error
    optimizer = AdamWScheduleFree(model.parameters(), lr=lr)
    optimizer.train()
    return [optimizer]


@dataclass(frozen=True)
class Learned:
    """NFNOptimizer with a rule.

    Args:
        rule: Name or file of the rule.
        apart: Whether every tensor is treated by itself: no neuron hears of another tensor. What the rule loses by it
            is what the structure of the network brings.
    """

    rule: str
    apart: bool = False

    def __call__(self, model: nn.Module, lr: float, horizon: int | None) -> list[Optimizer]:
        """The optimizer of a network."""
        params = dict(model.named_parameters())
        symmetry = Symmetry.separate({name: p.shape for name, p in params.items()}) if self.apart else None
        return [NFNOptimizer(model, lr=lr, rule=self.rule, symmetry=symmetry, total_steps=horizon)]


@dataclass(frozen=True)
class Setting:
    """An optimizer with everything that can be set.

    Args:
        make: Makes it.
        lr: Learning rate, per step.
        cosine: Whether the rate falls to zero by a cosine, else it is constant.
        warmup: Whether the rate rises linearly over the first `WARMUP` of the steps.
        told: Whether the optimizer is told the horizon.
    """

    make: Make
    lr: float = 1e-3
    cosine: bool = False
    warmup: bool = False
    told: bool = False

    @property
    def name(self) -> str:
        """Of the optimizer, without its numbers."""
        return self.make.rule if isinstance(self.make, Learned) else self.make.__name__

    def optimizers(self, model: nn.Module, steps: int) -> list[Optimizer]:
        """The optimizers of a network that is trained for some steps."""
        return self.make(model, self.lr, steps if self.told else None)

    def schedule(self, optimizer: Optimizer, steps: int) -> LambdaLR | None:
        """What moves an optimizer's rate; None where nothing does."""
        return LambdaLR(optimizer, lambda k: self.factor(k, steps)) if self.cosine or self.warmup else None

    def factor(self, step: int, steps: int) -> float:
        """What the rate of a step, counted from 0, is multiplied by."""
        rising = min(1.0, (step + 1) / max(1.0, WARMUP * steps)) if self.warmup else 1.0
        return rising * (0.5 + 0.5 * math.cos(math.pi * step / steps)) if self.cosine else rising

    def __str__(self) -> str:
        flags = {"warm-up": self.warmup, "cosine": self.cosine, "told": self.told}
        return ", ".join([f"lr {self.lr:g}", *(name for name, on in flags.items() if on)])


@dataclass(frozen=True)
class Entry:
    """A contender: an optimizer, and the settings among which it is tuned for each task.

    Args:
        name: What tables call it.
        grid: The settings; a single one means untuned.
    """

    name: str
    grid: tuple[Setting, ...]


def grid(make: Make, rates: tuple[float, ...], *, cosine: bool = True, warmup: bool = True) -> tuple[Setting, ...]:
    """Every rate, with and without what is asked for."""
    flags = product((False, True) if cosine else (False,), (False, True) if warmup else (False,))
    return tuple(Setting(make, lr, *pair) for pair in flags for lr in rates)


ADAMW_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
SGD_RATES = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
MUON_RATES = FREE_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
RULE_RATES = (5e-4, 1e-3, 2e-3)

TUNED = Entry("AdamW tuned", grid(adamw, ADAMW_RATES))
DEFAULTS = Entry("AdamW defaults", (Setting(adamw_defaults),))
OTHERS = (
    Entry("SGD momentum tuned", grid(sgd, SGD_RATES)),
    Entry("Muon tuned", grid(muon, MUON_RATES, warmup=False)),
    Entry("schedule-free tuned", grid(schedule_free, FREE_RATES, cosine=False)),
    Entry("nominal rule", (Setting(Learned("adamw")),)),
)


def entries_of(rule: str, label: str, *, thorough: bool) -> tuple[Entry, ...]:
    """How a rule takes part: as it comes, and told the horizon; `thorough` adds a tuned rate and tensors apart."""
    plain = Setting(Learned(rule))
    told = replace(plain, told=True)
    found = (Entry(label, (plain,)), Entry(f"{label}, told", (told,)))
    if not thorough:
        return found
    tuned = tuple(replace(told, lr=lr) for lr in RULE_RATES)
    apart = replace(told, make=Learned(rule, apart=True))
    return (*found, Entry(f"{label}, told, lr tuned", tuned), Entry(f"{label}, told, tensors apart", (apart,)))


@torch.random.fork_rng(devices=[])
def fingerprint(rule: str) -> str:
    """What a rule is and does: its configuration, its theta, and where it takes a network, to three digits.

    The network is small, but wide enough for a subspace of `RuleConfig.rank` to be less than the space.

    Two versions of this package that compute the same updates have the same fingerprint.
    """
    loaded = pretrained.load(rule)
    usual = asdict(RuleConfig())
    digest = sha256(repr(sorted((k, v) for k, v in asdict(loaded.config).items() if v != usual[k])).encode())
    for name, value in sorted(loaded.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(3, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE))
    x, y = torch.randn(16, 3), torch.randn(16, WIDE)
    for horizon in (None, PROBE):
        model = deepcopy(start)
        optimizer = NFNOptimizer(model, lr=1e-2, rule=rule, total_steps=horizon)
        for _ in range(PROBE):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for p, before in zip(model.parameters(), start.parameters(), strict=True):
            digest.update(f"{(p - before).norm().item():.3g}".encode())
    return digest.hexdigest()
