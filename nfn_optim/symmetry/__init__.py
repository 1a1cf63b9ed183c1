"""Which dimensions of which parameters move together when hidden neurons are renamed: found once for each network."""

from nfn_optim.symmetry.certificate import Certificate, certify
from nfn_optim.symmetry.symmetry import Symmetry
from nfn_optim.symmetry.trace import symmetry_of

__all__ = ["Certificate", "Symmetry", "certify", "symmetry_of"]
