"""The tasks that rules are meta-trained on."""

from meta_train.tasks.augment import Augment
from meta_train.tasks.autoencoder import AutoencoderDistribution
from meta_train.tasks.cnn import CNNDistribution
from meta_train.tasks.data import Data, Examples
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.folder import has_file, use_folder
from meta_train.tasks.gru import GRUDistribution
from meta_train.tasks.images import digits, images, torchvision_images
from meta_train.tasks.inr import INRDistribution
from meta_train.tasks.mixture import Mixture, Single
from meta_train.tasks.mlp import MLPDistribution, MLPShape, MLPTask
from meta_train.tasks.module import ModuleTask
from meta_train.tasks.ngram import NgramDistribution
from meta_train.tasks.quadratic import QuadraticDistribution
from meta_train.tasks.supervised import SupervisedTask
from meta_train.tasks.task import Params, Task, TaskDistribution, Tensors
from meta_train.tasks.text import Text
from meta_train.tasks.transformer import TransformerDistribution
from meta_train.tasks.vector import VectorDistribution
from meta_train.tasks.vit import ViTDistribution

__all__ = [
    "Augment",
    "AutoencoderDistribution",
    "CNNDistribution",
    "Data",
    "Draws",
    "Examples",
    "Family",
    "GRUDistribution",
    "INRDistribution",
    "MLPDistribution",
    "MLPShape",
    "MLPTask",
    "Mixture",
    "ModuleTask",
    "NgramDistribution",
    "Params",
    "QuadraticDistribution",
    "Single",
    "SupervisedTask",
    "Task",
    "TaskDistribution",
    "Tensors",
    "Text",
    "TransformerDistribution",
    "VectorDistribution",
    "ViTDistribution",
    "digits",
    "has_file",
    "images",
    "torchvision_images",
    "use_folder",
]
