"""NF-layers: networks over weight space that commute with the permutations of a `Symmetry`."""

from nfn_optim.layers.incidence import ROLES, Incidence
from nfn_optim.layers.tied import TiedStack

__all__ = ["ROLES", "Incidence", "TiedStack"]
