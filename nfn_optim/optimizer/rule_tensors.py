"""The tensors of a rule on the devices and in the dtypes of the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from nfn_optim.engine.passes import ALL_TERMS, Terms
from nfn_optim.rule import UpdateRule


class RuleTensors:
    """Theta and buffers of a rule by name, copied where parameters are elsewhere or have another dtype.

    Attributes:
        own: The rule's, as of the last call of `copies`.
    """

    def __init__(self) -> None:
        self.own: dict[str, Tensor] = {}
        self._terms: tuple[list[tuple[int, int]], Terms] = [], ALL_TERMS
        self._cast: dict[tuple[torch.device, torch.dtype], tuple[list[tuple[int, int]], dict[str, Tensor]]] = {}

    def copies(self, rule: UpdateRule, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors on a device and in a dtype, as they are now; empty if `own` already are."""
        if next(rule.parameters(), None) is not next(iter(self.own.values()), None):  # walking through all is slow
            self.own = {**dict(rule.named_parameters()), **dict(rule.named_buffers())}
        if all(t.device == device and t.dtype in (dtype, torch.int64, torch.bool) for t in self.own.values()):
            return {}
        versions = self._versions()
        if self._cast.get((device, dtype), ([], {}))[0] != versions:
            cast = {n: t.detach().to(device, dtype if t.is_floating_point() else None) for n, t in self.own.items()}
            self._cast[device, dtype] = versions, cast
        return self._cast[device, dtype][1]

    def terms(self, rule: UpdateRule) -> Terms:
        """`UpdateRule.terms` with the tensors as they are now, after `copies`."""
        if self._terms[0] != (versions := self._versions()):
            self._terms = versions, rule.terms()
        return self._terms[1]

    def _versions(self) -> list[tuple[int, int]]:
        """What changes with the tensors."""
        return [(id(t), t._version) for t in self.own.values()]
