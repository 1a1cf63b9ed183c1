"""What rules are meta-trained on."""

from meta_train.tasks.images import ImageSet, digits
from meta_train.tasks.mlp import Augment, MLPDistribution, MLPShape, MLPTask
from meta_train.tasks.task import Params, Task, TaskDistribution, Tensors

__all__ = [
    "Augment",
    "ImageSet",
    "MLPDistribution",
    "MLPShape",
    "MLPTask",
    "Params",
    "Task",
    "TaskDistribution",
    "Tensors",
    "digits",
]
