"""Models that people train, from the packages that they come from.

The code is the packages' own; only widths, depths and images are small.
"""

from timm_models import TIMM
from torch_models import TORCH
from transformers_models import TRANSFORMERS, UNTRACED

__all__ = ["REAL_MODELS", "UNTRACED"]

REAL_MODELS = (*TIMM, *TRANSFORMERS, *TORCH)
