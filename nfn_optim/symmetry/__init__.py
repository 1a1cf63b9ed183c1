"""The permutation symmetry of a network's neurons: which dimensions of which parameters are permuted together."""

from nfn_optim.symmetry.certificate import Certificate, certify
from nfn_optim.symmetry.symmetry import Symmetry
from nfn_optim.symmetry.trace import symmetry_of

__all__ = ["Certificate", "Symmetry", "certify", "symmetry_of"]
