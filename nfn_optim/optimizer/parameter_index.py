"""Names and symmetry of the parameters of an optimizer.

    names       given with the parameters; the module's; the previous ones; or "group.index"
    symmetry    given by hand; traced from the observed forward passes; or every dimension an axis of its own

Both are determined when they are needed, and again when the groups have other parameters or other shapes. Nothing is
keyed by the parameters that the constructor received: wrappers replace them at any time.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nfn_optim.engine.form import Form
from nfn_optim.optimizer.discovery import Discovery, names_of
from nfn_optim.optimizer.param_groups import moves
from nfn_optim.optimizer.real_view import symmetry_of_views
from nfn_optim.optimizer.wrapper import unwrap
from nfn_optim.rule.members import forms_of
from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.merging import complete, merge

Groups = Sequence[dict[str, Any]]
"""As `torch.optim.Optimizer.param_groups`."""
MAX_WAITS = 3  # steps, with calls of modules before them, after which no owner of the parameters is expected
MAX_RESTRICTIONS = 64  # cached symmetries of subsets, for steps in which some parameters have no gradient


class ParameterIndex:
    """Names and symmetry of the parameters in an optimizer's groups.

    Args:
        model: The module that owns the parameters, if it is known. Only weakly referenced.

    Attributes:
        names: Of all parameters in the order of the groups, unique; as of the last `update`.
        symmetry: Of all parameters by name; None before it is known.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.symmetry: Symmetry | None = None
        self.names: list[str] = []
        self._discovers = self._traced = self._warned = False
        self._waits, self._resumes = 0, False
        self._before: Symmetry | None = None
        self._used: frozenset[str] = frozenset()
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._owners = [] if model is None else [weakref.ref(unwrap(model))]
        self._reset()

    def _reset(self) -> None:
        """Reset everything that is determined again."""
        self._identities: list[tuple[int, torch.Size, torch.device]] = []
        self._restrictions: dict[frozenset[str], Symmetry] = {}
        self._discovery: Discovery | None = None

    def __getstate__(self) -> dict[str, Any]:
        saved = ("names", "symmetry", "_discovers", "_traced", "_warned", "_waits", "_used", "_before")
        observing = self._discovery is not None or self._resumes
        return {"observing": observing, **{key: self.__dict__[key] for key in saved}}

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Belong to an optimizer, which is only weakly referenced; a copy goes on observing where the original did."""
        self._optimizer = weakref.ref(optimizer)
        if self._resumes:
            self._resumes = False
            self.observe()

    def _parameters(self) -> list[Tensor]:
        """The parameters of the optimizer as they are now."""
        optimizer = None if self._optimizer is None else self._optimizer()
        return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        observing = state.pop("observing")
        self.__dict__.update(state, _owners=[], _optimizer=None)
        self._reset()
        self._resumes = observing

    # ------------------------------------------------------------------------------------------------------- names

    def update(self, groups: Groups) -> bool:
        """Update names and symmetry if the groups have other parameters, shapes or devices than before.

        Returns:
            Whether they have.
        """
        if [(id(p), p.shape, p.device) for group in groups for p in group["params"]] == self._identities:
            return False
        self.update_names(groups)
        return True

    def update_names(self, groups: Groups) -> None:
        """Name all parameters anew, and keep the part of the symmetry that still applies."""
        params = [p for group in groups for p in group["params"]]
        names = names_of(groups, self._modules(), self.names)
        if self.symmetry is not None:
            removed, new = set(self.names) - set(names), set(names) - set(self.names)
            pairs = zip(self.names, names, strict=False)  # a renamed parameter keeps its position
            renamed = {old: name for old, name in pairs if old in removed and name in new}
            self._fit(self.symmetry.rename(renamed), dict(zip(names, params, strict=True)))
        self._identities, self.names = [(id(p), p.shape, p.device) for p in params], names
        self._restrictions.clear()

    def _fit(self, symmetry: Symmetry, params: Mapping[str, Tensor]) -> None:
        """Keep the symmetry of those parameters that it still fits; the others will be traced again."""
        known = [n for n, p in params.items() if n in symmetry.dims and symmetry.shape_of(n) == tuple(p.shape)]
        changed = {axis for name in symmetry.dims.keys() - set(known) for axis in symmetry.axes_of(name)}
        part = symmetry.restrict(known)
        fixed = part.fixed | (changed & part.sizes.keys())  # they may mean something else now
        nested = {axis: outer for axis, outer in part.nested.items() if axis not in fixed}
        self.symmetry = complete(Symmetry(part.dims, part.sizes, fixed, nested), params)
        if len(known) < len(params):
            self.observe()

    def _named(self, groups: Groups) -> dict[str, Tensor]:
        """All parameters by name."""
        return dict(zip(self.names, (p for group in groups for p in group["params"]), strict=True))

    def label(self, groups: Groups) -> None:
        """Write the module's names into groups that have none, so that saved states have them too."""
        owned = self._owned()
        params = [p for group in groups for p in group["params"]]
        if not any("param_names" in group for group in groups) and all(id(p) in owned for p in params):
            for group in groups:
                group["param_names"] = [owned[id(p)] for p in group["params"]]

    def labelled(self, group: dict[str, Any], groups: Groups) -> dict[str, Any]:
        """A group to be added to others; torch requires names in all groups or in none."""
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        if not isinstance(params, Iterable) or isinstance(params, set) or not any("param_names" in g for g in groups):
            return group
        owned, params = self._owned(), list(params)
        pairs = [
            p if isinstance(p, tuple) else (owned.get(id(p), f"{len(groups)}.{i}"), p) for i, p in enumerate(params)
        ]
        return {**group, "params": pairs}

    def _modules(self) -> list[nn.Module]:
        """The modules that own the parameters, if known and alive."""
        return [module for owner in self._owners if (module := owner()) is not None]

    def _owned(self) -> dict[int, str]:
        """Names in the module, if there is exactly one, by id of the parameter."""
        modules = self._modules()
        return {id(p): name for name, p in modules[0].named_parameters()} if len(modules) == 1 else {}

    # ---------------------------------------------------------------------------------------------------- symmetry

    def adopt(self, symmetry: Symmetry, groups: Groups) -> None:
        """Use a symmetry given by hand.

        Raises:
            ValueError: It does not name all parameters, or a shape does not fit.
        """
        params = [p for group in groups for p in group["params"]]
        if not self._owners and not any("param_names" in group for group in groups):
            if len(symmetry.dims) != len(params):
                raise ValueError(
                    f"expected a symmetry of {len(params)} tensors, one for each parameter in order, found "
                    f"{len(symmetry.dims)}; pass model= or model.named_parameters() to match them by name"
                )
            self.names = list(symmetry.dims)
        self.update_names(groups)
        named = self._named(groups)
        if missing := [name for name in named if name not in symmetry.dims]:
            raise ValueError(
                f"expected the symmetry to name every parameter, {missing} are not among {list(symmetry.dims)}; "
                f"trace the whole model, or rename with symmetry.rename"
            )
        restricted = symmetry.restrict(named)
        restricted.check(named)
        self.symmetry = restricted

    def discover(self, model: nn.Module | None) -> None:
        """Determine the symmetry from the next forward passes."""
        self._discovers = True
        self._discovery = Discovery(self._parameters, None if model is None else unwrap(model))

    def observe(self) -> None:
        """Observe forward passes again, if the symmetry is determined from them."""
        if self._discovers and self._discovery is None:
            self._discovery, self._waits = Discovery(self._parameters, recalls=False), 0

    def resolve(self, groups: Groups) -> None:
        """Make sure that there is a symmetry: traced from the observed calls, or separate axes."""
        if self._discovery is None and self.symmetry is not None and not self._look_again(groups):
            return
        if self._discovery is not None:
            self._resolve_from_calls(self._discovery, groups)
        if self.symmetry is None:
            self.symmetry = Symmetry.separate({name: p.shape for name, p in self._named(groups).items()})
        waiting = self._discovery is not None and not self._traced
        if waiting and not self._warned and any(moves(group) for group in groups):
            self._warned = True
            warnings.warn(
                "no forward pass of a module that owns these parameters was seen before step(): the optimizer works, "
                "but treats every tensor by itself. Use NFNOptimizer(model), or model= with groups, and call the model "
                "before the first step, or pass symmetry=.",
                stacklevel=8,  # the caller of step, outside of the wrappers of torch
            )

    def _resolve_from_calls(self, discovery: Discovery, groups: Groups) -> None:
        """Take the symmetry from the observed calls, or go on waiting for them."""
        params = self._named(groups)
        found = discovery.found(params)
        if found is not None and not self._owners:
            self._owners, self.symmetry = [weakref.ref(module) for module in found.modules], None
            self.update_names(groups)
            params = self._named(groups)
            found = discovery.found(params)
        if found is None:
            self._waits += discovery.has_seen_calls
            self._warned |= discovery.is_void
            if self._waits < MAX_WAITS:
                discovery.wait()
                return
        else:
            parts = [found.symmetry.restrict(name for name in params if name in found.used)]
            if self._before is not None:  # seen before, on another branch
                parts.append(self._before.restrict(n for n in params if n in self._used and n in self._before.dims))
            self.symmetry, self._traced, self._before = complete(merge(parts[::-1]), params), True, None
            # Parameters that have gradients and no part in a call are used outside of modules.
            self._used = found.used | {name for name, p in params.items() if p.grad is not None or name in self._used}
            self._restrictions.clear()
        self._discovery = None
        discovery.close()

    def _look_again(self, groups: Groups) -> bool:
        """Observe the next forward pass if parameters have gradients for the first time: another branch has run.

        The branch may relate axes that were separate before it, so that no symmetry is certain until then.
        """
        params = self._named(groups) if self._traced else {}
        if all(p.grad is None or name in self._used for name, p in params.items()):
            return False
        self._before = self.symmetry
        self.symmetry = Symmetry.separate({name: p.shape for name, p in params.items()})
        self._restrictions.clear()
        self.observe()
        return True

    def restricted(self, params: Mapping[str, Tensor]) -> Symmetry:
        """The symmetry of some of the parameters, complex ones as their real views.

        That of a single parameter has canonical names, so that what is cached by symmetry serves all of one shape.

        Args:
            params: Name -> parameter.
        """
        assert self.symmetry is not None
        key = frozenset(params)
        if key not in self._restrictions:
            if len(self._restrictions) >= MAX_RESTRICTIONS:
                self._restrictions.clear()
            part = self.symmetry.restrict(name for name in self.names if name in key)
            part = symmetry_of_views(part, params)
            self._restrictions[key] = part.rename(dict.fromkeys(key, "0")).canonical() if len(key) == 1 else part
        return self._restrictions[key]

    def forms(self, params: Mapping[str, Tensor]) -> Mapping[str, Form]:
        """How those of the parameters are seen that hold several tensors, complex ones as their real views."""
        forms = forms_of(self.restricted(params))
        return forms if len(params) > 1 else dict(zip(params, forms.values(), strict=False))
