"""Small configurations of widely used models, built by their own packages (timm, transformers, torch)."""

from timm_models import TIMM
from torch_models import TORCH
from transformers_models import TRANSFORMERS, UNTRACED

__all__ = ["REAL_MODELS", "UNTRACED"]

REAL_MODELS = (*TIMM, *TRANSFORMERS, *TORCH)
