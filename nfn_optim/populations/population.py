"""Many networks of one architecture as one value: stacked parameters, and what is known about every network.

    N networks, C channels

    params      name -> (N, *shape)
    columns     name -> (N, ...)      labels, hyperparameters, seeds; one entry for every network
    runs        (N,)                  networks of one training run, or of one image, have equal numbers

A split keeps runs together: snapshots of one run on both sides of a split leak the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nfn_optim.layers import random_orbit, weight_features
from nfn_optim.symmetry import Symmetry


@dataclass(frozen=True)
class Population:
    r"""Networks of one architecture.

    Args:
        symmetry: The tensors and their axes.
        params: Name -> `(N, *shape)`.
        columns: Name -> `(N, ...)`, what is known about every network: labels, hyperparameters, seeds.
        runs: `(N,)` integers, equal for networks that must stay on one side of a split; default all different.
        about: Anything else that JSON can hold, for example how the networks were made.

    Raises:
        ValueError: A tensor has another shape than the symmetry says, or another number of networks.

    Example:
        >>> models = [nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)) for _ in range(10)]
        >>> symmetry = Symmetry.parse("0.weight h i\n0.bias h\n2.weight o h\n2.bias o\nfree h=3\nfixed i=2 o=1")
        >>> population = Population.of(models, symmetry, {"accuracy": torch.rand(10)}, runs=torch.arange(10) // 2)
        >>> train, test = population.split([0.6, 0.4], seed=0)
        >>> len(train), len(test), tuple(train.features()["0.weight"].shape)
        (6, 4, (6, 3, 2, 1))
    """

    symmetry: Symmetry
    params: Mapping[str, Tensor]
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    runs: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check shapes, and number the runs if they are not given."""
        self.symmetry.check(self.params, batch_dims=1)
        count = len(next(iter(self.params.values()))) if self.params else 0
        if not self.runs.numel():
            object.__setattr__(self, "runs", torch.arange(count))
        sizes = {name: len(x) for name, x in itertools.chain(self.params.items(), self.columns.items())}
        sizes["runs"] = len(self.runs)
        if wrong := {name: size for name, size in sizes.items() if size != count}:
            raise ValueError(f"expected {count} networks in every tensor and column, found {wrong}")

    @classmethod
    def of(
        cls,
        models: Sequence[nn.Module | Mapping[str, Tensor]] | Mapping[str, Tensor],
        symmetry: Symmetry,
        columns: Mapping[str, Tensor] | None = None,
        runs: Tensor | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Population:
        """A population of modules or state dicts, or of one stacked dict as `torch.func.stack_module_state` gives it.

        Raises:
            ValueError: Networks differ in shape, or do not fit the symmetry.
        """
        params = {name: x.detach().squeeze(-1) for name, x in weight_features(models, symmetry).items()}
        given = torch.zeros(0, dtype=torch.int64) if runs is None else runs
        return cls(symmetry, params, columns or {}, given, about or {})

    def __len__(self) -> int:
        """Number of networks."""
        return len(self.runs)

    def features(self) -> dict[str, Tensor]:
        """The weights as features with one channel, name -> `(N, *shape, 1)`."""
        return {name: x.unsqueeze(-1) for name, x in self.params.items()}

    def select(self, index: Tensor) -> Population:
        """Some of the networks; `index` is boolean `(N,)`, or integers."""
        return replace(
            self,
            params={name: x[index] for name, x in self.params.items()},
            columns={name: x[index] for name, x in self.columns.items()},
            runs=self.runs[index],
        )

    def split(self, fractions: Sequence[float], seed: int = 0) -> list[Population]:
        """Disjoint parts, whole runs each.

        Args:
            fractions: Of the runs, for every part; together at most 1.
            seed: Of the random order of runs.

        Raises:
            ValueError: The fractions exceed 1, or a part would be empty.
        """
        if sum(fractions) > 1 + 1e-9:
            raise ValueError(f"expected fractions with a sum of at most 1, found {list(fractions)}")
        names = torch.unique(self.runs)
        order = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
        ends = [round(x * len(names)) for x in itertools.accumulate(fractions)]
        parts = [self.select(torch.isin(self.runs, order[start:end])) for start, end in itertools.pairwise([0, *ends])]
        if empty := [n for n, part in enumerate(parts) if not len(part)]:
            raise ValueError(f"expected runs in every part, found none in {empty}: {len(names)} runs, {fractions}")
        return parts

    def with_features(self, features: Mapping[str, Tensor]) -> Population:
        """The same networks with other weights, name -> `(N, *shape, 1)`: canonical ones, or edited ones."""
        return replace(self, params={name: features[name].detach().squeeze(-1) for name in self.params})

    def with_columns(self, **columns: Tensor) -> Population:
        """The same networks, with more known about each; `(N, ...)`."""
        return replace(self, columns={**self.columns, **columns})

    def permuted(self, generator: torch.Generator | None = None) -> Population:
        """The same functions with hidden neurons in random order, another one for every network."""
        return self.with_features(random_orbit(self.features(), self.symmetry, generator))

    def batches(
        self, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Features of `size` networks at a time and their indices, each network once, in random order."""
        features = self.features()
        for index in torch.split(torch.randperm(len(self), generator=generator), size):
            yield {name: x[index] for name, x in features.items()}, index

    @staticmethod
    def concatenate(parts: Sequence[Population]) -> Population:
        """One population of several; the first one's `about` is kept.

        Raises:
            ValueError: There is none, or they differ in architecture or columns.
        """
        if not parts:
            raise ValueError("expected at least one population, found none")
        first = parts[0]
        for n, part in enumerate(parts):
            if part.symmetry != first.symmetry or set(part.columns) != set(first.columns):
                raise ValueError(
                    f"expected one architecture with the columns {sorted(first.columns)}, population {n} has "
                    f"{sorted(part.columns)} and\n{part.symmetry}"
                )
        return replace(
            first,
            params={name: torch.cat([part.params[name] for part in parts]) for name in first.params},
            columns={name: torch.cat([part.columns[name] for part in parts]) for name in first.columns},
            runs=torch.cat([part.runs for part in parts]),
        )


def check_disjoint(*parts: Population) -> None:
    """Raise if a run is in more than one part.

    Raises:
        ValueError: It is; the error names the runs.
    """
    for (m, first), (n, second) in itertools.combinations(enumerate(parts), 2):
        shared = torch.unique(first.runs[torch.isin(first.runs, second.runs)]).tolist()
        if shared:
            raise ValueError(
                f"expected every run in one part only, parts {m} and {n} share {len(shared)} runs, {shared[:5]}, ...; "
                f"split by run: population.split(fractions)"
            )
