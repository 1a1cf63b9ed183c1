"""What rules are meta-trained on."""

from meta_train.tasks.images import ImageSet, digits
from meta_train.tasks.mlp import MLPDistribution, MLPTask
from meta_train.tasks.task import Params, Task, TaskDistribution, Tensors

__all__ = [
    "ImageSet",
    "MLPDistribution",
    "MLPTask",
    "Params",
    "Task",
    "TaskDistribution",
    "Tensors",
    "digits",
]
