"""Readers of published populations, from the folders that their authors offer for download.

    small CNN zoo      weights.npy, metrics.csv.gz, layout.csv            classifiers with accuracies
    nfn                PREFIX_CLASSs/netIMAGE.pth                         SIRENs of images
    DWSNets            NAME_training_CLASS_IMAGE/checkpoints/*.pth        SIRENs of images, also NAME_testing_...

Weights stay as they are in the files, with dimensions in torch's order and the names of `SmallCNN` and `Siren`.

References:
    Predicting Neural Network Accuracy from Weights (Unterthiner et al., 2020), arXiv:2002.11448
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), App. D.3, arXiv:2302.14040
    Equivariant Architectures for Learning in Deep Weight Spaces (Navon et al., 2023), App. K, arXiv:2301.12780
"""

from __future__ import annotations

import ast
import csv
import gzip
import itertools
import pickle
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nfn_optim.populations.classifiers import SmallCNN
from nfn_optim.populations.population import Population
from nfn_optim.populations.sirens import SirenZoo
from nfn_optim.symmetry import symmetry_of

LABELS = {
    "test_accuracy": "accuracy",
    "test_loss": "loss",
    "train_accuracy": "train_accuracy",
    "train_loss": "train_loss",
}
"""Columns of the small CNN zoo, and ours."""

SETTINGS = {"config.learning_rate": "learning_rate", "config.l2reg": "l2", "config.dropout": "dropout"}
SETTINGS |= {"config.train_fraction": "fraction", "config.init_std": "init_std"}

NFN_CLASS = re.compile(r"_(\d+)s$")
NFN_IMAGE = re.compile(r"net(\d+)$")
DWS_FOLDER = re.compile(r"_(train|test)\w*?_(\d+)_(\d+)$")


def read_small_cnn_zoo(folder: str | Path, steps: Sequence[int] | None = (86,)) -> Population:
    """Read one data set of the Small CNN Zoo; only the rows of the chosen steps are read from the disk.

    Args:
        folder: With `weights.npy`, `metrics.csv.gz` and `layout.csv`.
        steps: Snapshots to read, in epochs; None for all.

    Returns:
        Columns `accuracy` and `loss` (held out), `train_accuracy`, `train_loss`, `step`, `tanh` and the settings that
        the file has; snapshots of one run have equal `runs`. Networks that are not finite are left out.

    Raises:
        FileNotFoundError: One of the files is missing.
        ValueError: A file is cut off, the files do not belong together, or the architecture is another one.
    """
    weights_file, metrics_file, layout_file = (
        _existing(Path(folder) / name) for name in ("weights.npy", "metrics.csv.gz", "layout.csv")
    )
    rows = _table(metrics_file, [*LABELS, "step", "modeldir", "config.activation"])
    try:
        flat = np.load(weights_file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{weights_file} is not a whole numpy file ({error}); download it again") from error
    if flat.ndim != 2 or len(flat) != len(rows):  # noqa: PLR2004 - networks and weights
        raise ValueError(
            f"expected as many networks in {weights_file} as rows in {metrics_file}, found {flat.shape} and {len(rows)}"
        )
    kept = [n for n, row in enumerate(rows) if steps is None or int(float(row["step"])) in steps]
    if not kept:
        found = sorted({int(float(row["step"])) for row in rows})
        raise ValueError(f"expected networks of the steps {steps}, found only steps {found}")
    chosen = torch.as_tensor(np.array(flat[kept], dtype=np.float32))
    params = _arranged(chosen, _table(layout_file, ["varname", "shape", "start_idx", "end_idx"]), layout_file)
    channels, classes = len(params["convs.0.bias"][0]), len(params["head.bias"][0])
    symmetry = symmetry_of(SmallCNN(channels, classes), torch.zeros(2, 1, 16, 16))
    number: dict[str, int] = {}
    columns = {
        ours: torch.tensor([float(rows[n][theirs] or "nan") for n in kept])
        for theirs, ours in {**LABELS, **SETTINGS, "step": "step"}.items()
        if theirs in rows[0]
    }
    columns["tanh"] = torch.tensor([float(rows[n]["config.activation"] == "tanh") for n in kept])
    runs = torch.tensor([number.setdefault(_run_of(rows[n]["modeldir"]), len(number)) for n in kept])
    population = Population(symmetry, params, columns, runs, {"name": f"small CNN zoo {Path(folder).name}"})
    return population.select(chosen.isfinite().all(1) & columns["accuracy"].isfinite())


def read_nfn_sirens(folder: str | Path, prefix: str = "randinit_test", test_from: int = 50_000) -> Population:
    """Read SIRENs as nfn publishes them.

    Args:
        folder: With folders `PREFIX_CLASSs`.
        prefix: Of these folders; several fits of one image are views of it.
        test_from: Images from this number on are for testing.

    Returns:
        Columns `image`, `class`, `view`, `test`; the run of a network is its image.

    Raises:
        FileNotFoundError: There are no such files.
        ValueError: A file is cut off or has another architecture, or a name lacks the class or the number.
    """
    found = []
    for path in sorted(Path(folder).glob(f"{prefix}_*/*.pth")):
        label, image = NFN_CLASS.search(path.parent.name), NFN_IMAGE.search(path.stem)
        if label is None or image is None:
            raise ValueError(f"expected names like {prefix}_3s/net12.pth, found {path}")
        number = int(image.group(1))
        found.append((path, int(label.group(1)), number, number >= test_from))
    return _sirens(found, folder, f"{prefix}_3s/net12.pth")


def read_dws_sirens(folder: str | Path) -> Population:
    """Read SIRENs as DWSNets publishes them; their output is a pixel from 0 to 1, less one half.

    Args:
        folder: With folders such as `mnist_png_training_CLASS_IMAGE`, at any depth.

    Returns:
        As `read_nfn_sirens`; images for testing are numbered after those for training.

    Raises:
        FileNotFoundError: There are no such files.
        ValueError: A file is cut off or has another architecture, or a name lacks the class or the number.
    """
    found = []
    for path in sorted(Path(folder).rglob("checkpoints/*.pth")):
        name = DWS_FOLDER.search(path.parent.parent.name)
        if name is None:
            raise ValueError(f"expected names like mnist_png_training_3_12/checkpoints/last.pth, found {path}")
        found.append((path, int(name.group(2)), int(name.group(3)), name.group(1) == "test"))
    after = 1 + max((image for _, _, image, test in found if not test), default=-1)
    numbered = [(path, label, image + after * test, test) for path, label, image, test in found]
    return _sirens(numbered, folder, "mnist_png_training_3_12/checkpoints/last.pth")


def _sirens(found: Sequence[tuple[Path, int, int, bool]], folder: str | Path, example: str) -> Population:
    """From files with class, image and whether for testing."""
    if not found:
        raise FileNotFoundError(f"expected files like {example} in {folder}, found none")
    states = [_state(path) for path, *_ in found]
    names = list(states[0])
    wrong = [n for n, x in enumerate(states) if [v.shape for v in x.values()] != [v.shape for v in states[0].values()]]
    if wrong:
        shapes = [{name: tuple(x.shape) for name, x in states[n].items()} for n in (0, wrong[0])]
        raise ValueError(f"expected SIRENs of one architecture, {shapes[0]}, {found[wrong[0]][0]} has {shapes[1]}")
    sizes = tuple(states[0][name].shape[1] for name in names[::2]) + tuple(states[0][names[-1]].shape)
    views: dict[int, itertools.count[int]] = {}
    columns = {
        "image": torch.tensor([image for _, _, image, _ in found]),
        "class": torch.tensor([label for _, label, _, _ in found]),
        "view": torch.tensor([next(views.setdefault(image, itertools.count())) for _, _, image, _ in found]),
        "test": torch.tensor([test for *_, test in found]),
    }
    params = {name: torch.stack([state[name] for state in states]) for name in names}
    about = {"name": f"SIRENs {Path(folder).name}"}
    return Population(SirenZoo(sizes).symmetry(), params, columns, columns["image"].clone(), about)


def _state(path: Path) -> dict[str, Tensor]:
    """The matrices and biases of a file in order, as `layers.N.weight`, `layers.N.bias`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole file of tensors ({error}); download it again") from error
    tensors = list(state.values()) if isinstance(state, Mapping) else []
    is_chain = (
        len(tensors) % 2 == 0
        and all(
            isinstance(w, Tensor) and isinstance(b, Tensor) and w.dim() == 2 and b.shape == w.shape[:1]  # noqa: PLR2004
            for w, b in zip(tensors[::2], tensors[1::2], strict=False)
        )
    )
    joined = is_chain and all(a.shape[0] == b.shape[1] for a, b in itertools.pairwise(tensors[::2]))
    if not tensors or not joined:
        names = list(state)[:6] if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"expected matrices and biases of a perceptron in {path}, found {names}")
    return {f"layers.{n // 2}.{('weight', 'bias')[n % 2]}": x.float() for n, x in enumerate(tensors)}


def _arranged(flat: Tensor, layout: Iterable[Mapping[str, str]], file: Path) -> dict[str, Tensor]:
    """Columns of `(N, weights)` as tensors of a `SmallCNN`, from keras's order of dimensions to torch's."""
    layers: dict[str, dict[str, Tensor]] = {}
    end = 0
    for row in layout:
        name, _, kind = row["varname"].rpartition("/")
        shape, start, stop = ast.literal_eval(row["shape"]), int(row["start_idx"]), int(row["end_idx"])
        shape = shape if isinstance(shape, tuple) else (shape,)
        if kind not in ("kernel:0", "bias:0") or stop - start != int(np.prod(shape)) or stop > flat.shape[1]:
            raise ValueError(
                f"expected kernels and biases within {flat.shape[1]} weights in {file}, found {dict(row)}: the files "
                f"do not belong together"
            )
        x = flat[:, start:stop].reshape(-1, *shape)
        turned = x.permute(0, x.dim() - 1, x.dim() - 2, *range(1, x.dim() - 2)) if len(shape) > 1 else x
        layers.setdefault(name, {})[kind] = turned.contiguous()
        end = max(end, stop)
    shapes = [tuple(layer["kernel:0"].shape[1:]) for layer in layers.values() if len(layer) == 2]  # noqa: PLR2004
    convolutions = [shape for shape in shapes if len(shape) == 4]  # noqa: PLR2004 - out, in, rows, columns
    if len(shapes) != len(layers) or len(shapes) != 4 or len(convolutions) != 3 or end != flat.shape[1]:  # noqa: PLR2004
        raise ValueError(f"expected three convolutions and a linear layer in {file}, found kernels of shapes {shapes}")
    names = ["convs.0", "convs.1", "convs.2", "head"]
    both = dict(zip(names, layers.values(), strict=True))
    return {f"{n}.{k}": x[f"{t}:0"] for n, x in both.items() for k, t in (("weight", "kernel"), ("bias", "bias"))}


def _run_of(checkpoint: str) -> str:
    """The folder of a run, where a checkpoint is named by its step within it."""
    return re.sub(r"/(permanent_)?ckpt[^/]*$", "", checkpoint.rstrip("/"))


def _table(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a csv file, which may be compressed.

    Raises:
        ValueError: It is cut off, or a column is missing.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            rows = list(csv.DictReader(file))
    except (EOFError, OSError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise ValueError(f"{path} is not a whole table ({error}); download it again") from error
    if missing := [name for name in needed if not rows or rows[0].get(name) is None]:
        raise ValueError(f"expected the columns {missing} in {path}, found {list(rows[0]) if rows else 'no rows'}")
    if any(None in row.values() for row in rows):
        raise ValueError(f"{path} is cut off: its last row has fewer columns than its head; download it again")
    return rows


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"expected {path.name} of the Small CNN Zoo in {path.parent}, found no such file")
    return path
