"""The optimizers under comparison and their learning rate schedules.

    factor of step k = min(1, (k + 1) / W) (1 + cos(pi k / K)) / 2      K steps in all, W of them warm-up

without the first factor if there is no warm-up, and without the second if the rate is constant.

References:
    Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019), arXiv:1711.05101
    those of `meta_train.evaluation.rivals`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import product

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from meta_train.evaluation import rivals
from nfn_optim import NFNOptimizer, RuleConfig, Symmetry, pretrained

WARMUP = 0.1  # fraction of the steps
PROBE_WIDTH = 136  # neurons of the network in a fingerprint: more than the rank of any shipped rule
PROBE_STEPS = 10  # steps in a fingerprint
Make = Callable[[nn.Module, float, int | None], list[Optimizer]]
"""From a network, a learning rate and the horizon, None if unknown, to optimizers that step together."""


def adamw(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """AdamW without weight decay, as all others."""
    return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)]


def adamw_defaults(model: nn.Module, _lr: float, _horizon: int | None) -> list[Optimizer]:
    """AdamW with PyTorch's defaults: learning rate 1e-3, weight decay 1e-2."""
    return [torch.optim.AdamW(model.parameters(), fused=True)]


def adam(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """Adam."""
    return [torch.optim.Adam(model.parameters(), lr=lr, fused=True)]


@dataclass(frozen=True)
class Learned:
    """NFNOptimizer with a rule.

    Args:
        rule: Name or file of the rule.
        without_symmetry: Whether no axis is shared between tensors, so that no message passes from one to another. The
            difference in loss is the benefit of the network's structure.
    """

    rule: str
    without_symmetry: bool = False

    def __call__(self, model: nn.Module, lr: float, horizon: int | None) -> list[Optimizer]:
        """The optimizer of a network."""
        params = dict(model.named_parameters())
        symmetry = Symmetry.separate({name: p.shape for name, p in params.items()}) if self.without_symmetry else None
        return [NFNOptimizer(model, lr=lr, rule=self.rule, symmetry=symmetry, total_steps=horizon)]


@dataclass(frozen=True)
class Setting:
    """An optimizer with its hyperparameters.

    Args:
        make: Constructs the optimizer.
        lr: Learning rate, per step.
        cosine: Whether the rate falls to zero by a cosine, else it is constant.
        warmup: Whether the rate rises linearly over the first `WARMUP` of the steps.
        horizon_known: Whether the optimizer is given the horizon.
    """

    make: Make
    lr: float = 1e-3
    cosine: bool = False
    warmup: bool = False
    horizon_known: bool = False

    @property
    def name(self) -> str:
        """Name of the optimizer, without hyperparameters."""
        return self.make.rule if isinstance(self.make, Learned) else self.make.__name__

    def optimizers(self, model: nn.Module, steps: int, weight_decay: float = 0.0) -> list[Optimizer]:
        """The optimizers for training a network for some steps.

        Args:
            model: The network.
            steps: The horizon.
            weight_decay: Of every parameter, unless it is 0: then what the optimizer is constructed with.
        """
        made = self.make(model, self.lr, steps if self.horizon_known else None)
        for group in (group for optimizer in made for group in optimizer.param_groups):
            group["weight_decay"] = weight_decay or group["weight_decay"]
        return made

    def schedule(self, optimizer: Optimizer, steps: int) -> LambdaLR | None:
        """The learning rate schedule of an optimizer; None for a constant rate."""
        return LambdaLR(optimizer, lambda k: self.factor(k, steps)) if self.cosine or self.warmup else None

    def factor(self, step: int, steps: int) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        rising = min(1.0, (step + 1) / max(1.0, WARMUP * steps)) if self.warmup else 1.0
        return rising * (0.5 + 0.5 * math.cos(math.pi * step / steps)) if self.cosine else rising

    def __str__(self) -> str:
        flags = {"warm-up": self.warmup, "cosine": self.cosine, "horizon known": self.horizon_known}
        return ", ".join([f"lr {self.lr:g}", *(name for name, on in flags.items() if on)])


@dataclass(frozen=True)
class Contender:
    """An optimizer with the settings among which it is tuned for each task.

    Args:
        name: Its label in tables.
        grid: The settings; a single one means untuned.
    """

    name: str
    grid: tuple[Setting, ...]


def grid(
    make: Make, rates: tuple[float, ...], *, cosine: bool = True, warmup: bool = True, horizon_known: bool = False
) -> tuple[Setting, ...]:
    """The product of the rates with the schedules: constant or cosine, without or with warm-up."""
    flags = product((False, True) if cosine else (False,), (False, True) if warmup else (False,))
    return tuple(Setting(make, lr, *pair, horizon_known) for pair in flags for lr in rates)


ADAMW_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
SGD_RATES = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
FREE_RATES = NADAMW_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
MUON_RATES = (*FREE_RATES, 6.4e-2)
SOAP_RATES = FREE_RATES[:5]
ADEMAMIX_RATES = (2.5e-4, 5e-4, *FREE_RATES[:4])
PRODIGY_FACTORS = (0.25, 0.5, 1.0, 2.0)  # of the rate that it estimates
RULE_RATES = (5e-4, 1e-3, 2e-3)

TUNED = Contender("AdamW tuned", grid(adamw, ADAMW_RATES))
DEFAULTS = Contender("AdamW defaults", (Setting(adamw_defaults),))
MUONS = (
    Contender("Muon tuned", grid(rivals.muon, MUON_RATES, warmup=False)),
    Contender("Muon for all matrices tuned", grid(rivals.muon_for_all, MUON_RATES, warmup=False)),
)
SCHEDULE_FREE = Contender("schedule-free tuned", grid(rivals.schedule_free, FREE_RATES, cosine=False))
PRIOR_ENTRIES = (
    Contender("SGD momentum tuned", grid(rivals.sgd, SGD_RATES)),
    *MUONS,
    SCHEDULE_FREE,
    Contender("NadamW tuned", grid(rivals.nadamw, NADAMW_RATES)),
    Contender("SOAP tuned", grid(rivals.soap, SOAP_RATES)),
    Contender("AdEMAMix tuned", grid(rivals.ademamix, ADEMAMIX_RATES, horizon_known=True)),
    Contender("Prodigy tuned", grid(rivals.prodigy, PRODIGY_FACTORS)),
    Contender("Muon stack tuned", grid(rivals.stack, MUON_RATES, warmup=False)),
    Contender("SOAP-Muon stack tuned", grid(rivals.soap_stack, MUON_RATES, warmup=False)),
    Contender("nominal rule", (Setting(Learned("adamw")),)),
)
REAL_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
REAL_MUON_RATES = tuple(3 * lr for lr in REAL_RATES)


def as_used(make: Make, rates: Iterable[float]) -> tuple[Setting, ...]:
    """Settings as people use them: warm-up, then a cosine."""
    return tuple(Setting(make, lr, cosine=True, warmup=True) for lr in rates)


REAL_BASELINES = (
    Contender(TUNED.name, as_used(adamw, REAL_RATES)),
    Contender(MUONS[0].name, as_used(rivals.muon_in_float32, REAL_MUON_RATES)),
)


def horizon_known_label(label: str) -> str:
    """The label of a rule with the horizon known."""
    return f"{label}, horizon known"


def contenders_of(rule: str, label: str, *, thorough: bool) -> tuple[Contender, ...]:
    """A rule with the horizon unknown and known; `thorough` adds one with a tuned rate and one without symmetry."""
    unknown = Setting(Learned(rule))
    known = replace(unknown, horizon_known=True)
    contenders = (Contender(label, (unknown,)), Contender(horizon_known_label(label), (known,)))
    if not thorough:
        return contenders
    tuned = tuple(replace(known, lr=lr) for lr in RULE_RATES)
    without_symmetry = replace(known, make=Learned(rule, without_symmetry=True))
    return (
        *contenders,
        Contender(f"{horizon_known_label(label)}, lr tuned", tuned),
        Contender(f"{label}, without symmetry", (without_symmetry,)),
    )


@torch.random.fork_rng(devices=[])
def fingerprint(rule: str) -> str:
    """A hash of a rule's configuration, its theta, and its effect on a small network, to three digits.

    The network is wide enough for `RuleConfig.rank` to be less than the full rank. Two versions of this package that
    compute the same updates give the same fingerprint.
    """
    loaded = pretrained.load(rule)
    defaults = asdict(RuleConfig())
    digest = sha256(repr(sorted((k, v) for k, v in asdict(loaded.config).items() if v != defaults[k])).encode())
    for name, value in sorted(loaded.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    torch.manual_seed(0)
    initial = nn.Sequential(nn.Linear(3, PROBE_WIDTH), nn.Tanh(), nn.Linear(PROBE_WIDTH, PROBE_WIDTH))
    x, y = torch.randn(16, 3), torch.randn(16, PROBE_WIDTH)
    for horizon in (None, PROBE_STEPS):
        model = deepcopy(initial)
        optimizer = NFNOptimizer(model, lr=1e-2, rule=rule, total_steps=horizon)
        for _ in range(PROBE_STEPS):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for p, before in zip(model.parameters(), initial.parameters(), strict=True):
            digest.update(f"{(p - before).norm().item():.3g}".encode())
    return digest.hexdigest()
