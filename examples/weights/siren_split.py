"""SIRENs for training, choosing epochs and testing."""

from __future__ import annotations

import torch

from nfn_optim.layers import canonical_signs, function_change
from nfn_optim.populations import Population, Siren, positions


class SirenSplit:
    """SIRENs with the signs that they were fitted with and with canonical ones, split by image.

    Args:
        population: The SIRENs, with columns "test" and "image".
        module: Their architecture.
        side: Of the image on which it is measured that canonical signs change no pixel.

    Attributes:
        raw: The SIRENs.
        canonical: The same with canonical signs.
        certificate: Largest change of a pixel, relative to the largest pixel.
        in_train: `(N,)`, nine tenths of the images that are not for testing; the rest is `in_validation`.
        in_test: `(N,)`.
    """

    def __init__(self, population: Population, module: Siren, side: int) -> None:
        self.raw, features = population, population.features()
        signed = canonical_signs(features, population.symmetry, half_period=module.half_period)
        self.certificate = float(function_change(module, features, signed, positions(side)).max())
        self.canonical = population.with_features(signed)
        self.in_test = population.columns["test"]
        inner = population.select(~self.in_test).split([0.9, 0.1], seed=0)
        self.in_train, self.in_validation = (torch.isin(population.runs, part.runs) for part in inner)

    @property
    def note(self) -> str:
        """A line for reports."""
        return f"canonical signs change no pixel by more than {self.certificate:.0e} of the largest"
