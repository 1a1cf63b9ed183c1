"""The house stays in order: imports point down the floors, files are nouns and short, importing has no side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Bottom to top; a module may import those of lower lines only. Subpackages are entered through their own name.
FLOORS = """
nfn_optim.dimension
nfn_optim.symmetry
nfn_optim.axes
nfn_optim.op_call
nfn_optim.layer_rules
nfn_optim.shape_rules
nfn_optim.op_rules
nfn_optim.layers.incidence
nfn_optim.layers.tied
nfn_optim.layers.block
nfn_optim.layers.view
nfn_optim.layers.mixing
nfn_optim.layers.pooled
nfn_optim.layers.heard
nfn_optim.layers.linear
nfn_optim.layers.ends
nfn_optim.layers.deepsets
nfn_optim.layers.invariant
nfn_optim.layers.norm
nfn_optim.layers.entrywise
nfn_optim.layers.encoding
nfn_optim.layers.statistics
nfn_optim.layers.attention
nfn_optim.layers.latent
nfn_optim.layers.weights
nfn_optim.layers
nfn_optim.features
nfn_optim.rounding
nfn_optim.passes
nfn_optim.compilation
nfn_optim.kernel
nfn_optim.arrays
nfn_optim.shards
nfn_optim.orthogonal
nfn_optim.sweep
nfn_optim.aiming
nfn_optim.network
nfn_optim.naming
nfn_optim.certificate
nfn_optim.trace
nfn_optim.hyper
nfn_optim.gains
nfn_optim.said
nfn_optim.growth
nfn_optim.rule_config
nfn_optim.rule
nfn_optim.pretrained
nfn_optim.discovery
nfn_optim.group
nfn_optim.real_view
nfn_optim.param_state
nfn_optim.state_dict
nfn_optim.layout
nfn_optim.step_graph
nfn_optim.usable
nfn_optim.optimizer
nfn_optim.differentiable
nfn_optim.monitor.journal
nfn_optim.monitor.sample
nfn_optim.monitor.ear
nfn_optim.monitor.reading
nfn_optim.monitor.lines
nfn_optim.monitor.page
nfn_optim.monitor.observer
nfn_optim.monitor
nfn_optim
nfn_optim.__main__
meta_train.tasks.activation
meta_train.tasks.folder
meta_train.tasks.initialisation
meta_train.tasks.losses
meta_train.tasks.perceptron
meta_train.tasks.task
meta_train.tasks.augment
meta_train.tasks.data
meta_train.tasks.family
meta_train.tasks.images
meta_train.tasks.mixture
meta_train.tasks.supervised
meta_train.tasks.mlp
meta_train.tasks.module
meta_train.tasks.autoencoder
meta_train.tasks.cnn
meta_train.tasks.inr
meta_train.tasks.quadratic
meta_train.tasks.tables
meta_train.tasks.text
meta_train.tasks.gru
meta_train.tasks.ngram
meta_train.tasks.transformer
meta_train.tasks.vector
meta_train.tasks.vit
meta_train.tasks
meta_train.theta
meta_train.objective
meta_train.imitation
meta_train.replay
meta_train.unroll
meta_train.meta_gradient
meta_train.checkpoint
meta_train.distributed
meta_train.validation
meta_train.config
meta_train.summary
meta_train.trainer
meta_train.recipes
meta_train.evaluation.task
meta_train.evaluation.datasets
meta_train.evaluation.networks
meta_train.evaluation.losses
meta_train.evaluation.development
meta_train.evaluation.unseen
meta_train.evaluation.published
meta_train.evaluation.tiny
meta_train.evaluation.curve
meta_train.evaluation.interquartile
meta_train.evaluation.definition
meta_train.evaluation.cache
meta_train.evaluation.optimizers
meta_train.evaluation.loop
meta_train.evaluation.study
meta_train.evaluation.step_time
meta_train.evaluation.splits
meta_train.evaluation.figures
meta_train.evaluation.earlier
meta_train.evaluation.report
meta_train.evaluation.plots
meta_train.evaluation
meta_train.evaluate
meta_train
meta_train.__main__
""".split()  # noqa: SIM905 - one a line
NO_NOUNS = {"utils", "util", "common", "helpers", "helper", "misc", "base"}
LONGEST = 480  # lines; a file that comes near has two nouns


def modules() -> dict[str, Path]:
    """Every module of both packages, by its dotted name."""
    found = {}
    for package in ("nfn_optim", "meta_train"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(source: str, known: set[str]) -> set[str]:
    """The modules of the two packages that a source text imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
    return {name for name in found if name.split(".")[0] in ("nfn_optim", "meta_train")}


def violations(sources: dict[str, str]) -> list[str]:
    """Every import that does not point down."""
    floor = {name: number for number, name in enumerate(FLOORS)}
    return [
        f"{name} imports {other}"
        for name, source in sources.items()
        for other in sorted(imports_of(source, set(sources)))
        if floor[other] >= floor[name]
    ]


def test_every_module_has_a_floor() -> None:
    assert sorted(modules()) == sorted(FLOORS)


def test_imports_point_down() -> None:
    assert violations({name: path.read_text() for name, path in modules().items()}) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nfn_optim.symmetry", "from nfn_optim.rule import UpdateRule"),
        ("nfn_optim.rule", "import nfn_optim.optimizer"),
        ("nfn_optim.optimizer", "from meta_train import trainer"),
        ("nfn_optim.rule", "def late():\n    from nfn_optim import pretrained"),
    ],
)
def test_a_planted_violation_is_found(name: str, line: str) -> None:
    sources = dict.fromkeys(FLOORS, "") | {name: line}
    assert len(violations(sources)) == 1


@pytest.mark.parametrize("name", sorted(modules()))
def test_files_are_nouns_and_short(name: str) -> None:
    path = modules()[name]
    assert path.stem not in NO_NOUNS
    assert len(path.read_text().splitlines()) <= LONGEST


def test_importing_loads_no_extra_and_opens_no_connection() -> None:
    script = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("a connection was opened")
socket.socket.connect = refuse
import nfn_optim
heavy = {"tensorboard", "sklearn", "higher", "mlxtend", "matplotlib", "tyro", "meta_train"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
