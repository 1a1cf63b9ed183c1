"""Populations: many networks of one architecture as one value, and how to make, run, store and split them.

Population, check_disjoint          stacked weights with labels, hyperparameters and runs; splits by run
save, load, generate                files that are there whole or not at all; groups that resume
outputs                             run every network on the same inputs
train_together, stacked             train many networks at once, each with its own hyperparameters
fit, apply                          train a network over weights, and use it
ClassifierZoo, classifiers          populations of small classifiers
SirenZoo, sirens, render            populations of images as networks
read_small_cnn_zoo, read_*_sirens   populations that others publish
Images, load_images                 small images, from packages or a folder
kendall_tau, interval               scores, and bootstrap intervals over networks
"""

from nfn_optim.populations.classifiers import ClassifierZoo, classifiers
from nfn_optim.populations.fitting import Fit, FitSettings, apply, fit
from nfn_optim.populations.images import Images, load_images
from nfn_optim.populations.intervals import bootstrap_weights, interval, kendall_tau, weighted_mean
from nfn_optim.populations.outputs import outputs
from nfn_optim.populations.population import Population, check_disjoint
from nfn_optim.populations.published import read_dws_sirens, read_nfn_sirens, read_small_cnn_zoo
from nfn_optim.populations.report import Report
from nfn_optim.populations.sirens import Siren, SirenZoo, fit_images, positions, render, sirens
from nfn_optim.populations.storage import generate, load, save
from nfn_optim.populations.training import StepSettings, stacked, train_together

__all__ = [
    "ClassifierZoo",
    "Fit",
    "FitSettings",
    "Images",
    "Population",
    "Report",
    "Siren",
    "SirenZoo",
    "StepSettings",
    "apply",
    "bootstrap_weights",
    "check_disjoint",
    "classifiers",
    "fit",
    "fit_images",
    "generate",
    "interval",
    "kendall_tau",
    "load",
    "load_images",
    "outputs",
    "positions",
    "read_dws_sirens",
    "read_nfn_sirens",
    "read_small_cnn_zoo",
    "render",
    "save",
    "sirens",
    "stacked",
    "train_together",
    "weighted_mean",
]
