"""Watch an optimizer in TensorBoard: what the rule does to every layer. Nothing below knows that it is watched."""

from nfn_optim.monitor.observer import Observer, watch

__all__ = ["Observer", "watch"]
