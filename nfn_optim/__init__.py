"""A learned optimizer for PyTorch: a neural functional network in place of Adam."""

from nfn_optim.monitor import watch
from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.rule import RuleConfig, UpdateRule
from nfn_optim.symmetry import Symmetry, certify, symmetry_of

__version__ = "0.1.0"
__all__ = ["NFNOptimizer", "RuleConfig", "Symmetry", "UpdateRule", "certify", "symmetry_of", "watch"]
