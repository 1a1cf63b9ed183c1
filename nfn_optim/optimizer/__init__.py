"""The contract of `torch.optim.Optimizer`, kept by an update rule."""

from nfn_optim.optimizer.optimizer import NFNOptimizer

__all__ = ["NFNOptimizer"]
