"""Two operators without which torchvision's build for GPUs cannot be imported beside a torch without them.

timm needs torchvision, and so does much of transformers where it is installed. Nobody calls them.
"""

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def declare() -> None:
    """Declare them, unless they are known; to be called before anything imports torchvision."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
