"""`watch`: TensorBoard charts of the updates of every layer."""

from nfn_optim.monitor.observer import Observer, watch

__all__ = ["Observer", "watch"]
