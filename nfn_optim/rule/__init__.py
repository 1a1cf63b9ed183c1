"""The update rule: what costs O(neurons) between the passes over the weights."""

from nfn_optim.rule.config import RuleConfig
from nfn_optim.rule.update_rule import UpdateRule

__all__ = ["RuleConfig", "UpdateRule"]
