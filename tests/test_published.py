"""Readers of published populations, on tiny files made as their authors make them."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nfn_optim.populations import (
    Siren,
    check_disjoint,
    outputs,
    positions,
    read_dws_sirens,
    read_nfn_sirens,
    read_small_cnn_zoo,
    render,
)

CHANNELS = 3
KERAS = {
    "conv2d/bias:0": (CHANNELS,),
    "conv2d/kernel:0": (3, 3, 1, CHANNELS),
    "conv2d_1/bias:0": (CHANNELS,),
    "conv2d_1/kernel:0": (3, 3, CHANNELS, CHANNELS),
    "conv2d_2/bias:0": (CHANNELS,),
    "conv2d_2/kernel:0": (3, 3, CHANNELS, CHANNELS),
    "dense/bias:0": (10,),
    "dense/kernel:0": (CHANNELS, 10),
}


def write_zoo(folder: Path, runs: int = 4) -> dict[str, np.ndarray]:
    """Snapshots at epochs 0 and 86; returns the tensors in keras's order."""
    generator = np.random.default_rng(0)
    tensors = {name: generator.normal(size=(2 * runs, *shape)).astype(np.float32) for name, shape in KERAS.items()}
    tensors["conv2d/bias:0"][-1] = np.nan  # a run that diverged
    np.save(folder / "weights.npy", np.concatenate([x.reshape(2 * runs, -1) for x in tensors.values()], 1))
    with (folder / "layout.csv").open("w", newline="") as file:
        table, start = csv.writer(file), 0
        table.writerow(["varname", "shape", "start_idx", "end_idx"])
        for name, shape in KERAS.items():
            stop = start + int(np.prod(shape))
            table.writerow([f"sequential/{name}", shape, start, stop])
            start = stop
    with gzip.open(folder / "metrics.csv.gz", "wt", newline="") as file:
        table = csv.writer(file)
        names = ["test_accuracy", "test_loss", "train_accuracy", "train_loss"]
        table.writerow(["", "config.activation", "config.l2reg", "modeldir", "step", *names])
        for n in range(2 * runs):
            step, run = (0, 86)[n % 2], f"/zoo/{n // 2}/permanent_ckpt-{n % 2}"
            table.writerow([n, ("relu", "tanh")[n // 2 % 2], 1e-4, run, step, n / 10, 1.0, n / 9, 0.5])
    return tensors


def test_the_small_cnn_zoo_is_read(tmp_path: Path) -> None:
    keras = write_zoo(tmp_path)
    last = read_small_cnn_zoo(tmp_path)
    assert len(last) == 3  # one of four is not finite
    assert last.columns["accuracy"].tolist() == pytest.approx([0.1, 0.3, 0.5])
    assert last.columns["tanh"].tolist() == [0, 1, 0]
    assert last.columns["l2"][0] == pytest.approx(1e-4)
    kernel = torch.as_tensor(keras["conv2d_1/kernel:0"][1])  # (rows, columns, in, out)
    torch.testing.assert_close(last.params["convs.1.weight"][0], kernel.permute(3, 2, 0, 1))
    torch.testing.assert_close(last.params["head.weight"][0], torch.as_tensor(keras["dense/kernel:0"][1]).T)
    whole = read_small_cnn_zoo(tmp_path, steps=None)
    assert len(whole) == 7
    assert whole.runs.tolist() == [0, 0, 1, 1, 2, 2, 3]
    check_disjoint(*whole.split([0.5, 0.5]))
    assert len(read_small_cnn_zoo(tmp_path, steps=[0])) == 4


def test_the_small_cnn_zoo_is_whole_or_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected weights\.npy of the Small CNN Zoo"):
        read_small_cnn_zoo(tmp_path)
    write_zoo(tmp_path)
    with pytest.raises(ValueError, match=r"found only steps \[0, 86\]"):
        read_small_cnn_zoo(tmp_path, steps=[40])
    for name, message in (("weights.npy", "not a whole numpy file"), ("metrics.csv.gz", "not a whole table")):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=message):
            read_small_cnn_zoo(tmp_path)
        (tmp_path / name).write_bytes(data)
    weights = np.load(tmp_path / "weights.npy")
    np.save(tmp_path / "weights.npy", weights[:5])
    with pytest.raises(ValueError, match="expected as many networks"):
        read_small_cnn_zoo(tmp_path)
    np.save(tmp_path / "weights.npy", weights[:, :-4])
    with pytest.raises(ValueError, match="do not belong together"):
        read_small_cnn_zoo(tmp_path)
    np.save(tmp_path / "weights.npy", weights)
    lines = (tmp_path / "layout.csv").read_text().splitlines()
    (tmp_path / "layout.csv").write_text("\n".join(lines[:-2]))
    with pytest.raises(ValueError, match="expected three convolutions and a linear layer"):
        read_small_cnn_zoo(tmp_path)
    (tmp_path / "layout.csv").write_text("\n".join([lines[0].replace("shape", "size"), *lines[1:]]))
    with pytest.raises(ValueError, match=r"expected the columns \['shape'\]"):
        read_small_cnn_zoo(tmp_path)


def siren(seed: int, names: str, sizes: tuple[int, ...] = (2, 4, 4, 1)) -> dict[str, torch.Tensor]:
    """A state dict under other names; `names` has the number of the layer."""
    torch.manual_seed(seed)
    state = Siren(sizes).state_dict()
    return {f"{names.format(n // 2)}.{('weight', 'bias')[n % 2]}": x for n, x in enumerate(state.values())}


def test_sirens_of_nfn_are_read(tmp_path: Path) -> None:
    for image, label in ((0, 7), (1, 2), (12, 2)):
        folder = tmp_path / f"randinit_test_{label}s"
        folder.mkdir(exist_ok=True)
        torch.save(siren(image, "net.{}.linear"), folder / f"net{image}.pth")
    found = read_nfn_sirens(tmp_path, test_from=10)
    order = found.columns["image"].argsort()
    assert found.columns["class"][order].tolist() == [7, 2, 2]
    assert found.columns["test"][order].tolist() == [False, False, True]
    torch.manual_seed(12)
    expected = (Siren((2, 4, 4, 1))(positions(5))[:, 0] + 1) / 2
    torch.testing.assert_close(render(Siren(), found.select(order[2:]).params, 5)[0].flatten(), expected)
    with pytest.raises(FileNotFoundError, match="expected files like shared_3s"):
        read_nfn_sirens(tmp_path, prefix="shared")
    torch.save(siren(3, "net.{}"), tmp_path / "randinit_test_2s" / "last.pth")
    with pytest.raises(ValueError, match="expected names like randinit_test_3s"):
        read_nfn_sirens(tmp_path)


def test_sirens_of_dwsnets_are_read(tmp_path: Path) -> None:
    for part, label, image in (("training", 5, 0), ("training", 3, 4), ("testing", 3, 0)):
        folder = tmp_path / "inrs" / f"mnist_png_{part}_{label}_{image}" / "checkpoints"
        folder.mkdir(parents=True)
        torch.save(siren(image, "seq.{}"), folder / "model_final.pth")
    found = read_dws_sirens(tmp_path)
    assert sorted(zip(*(found.columns[n].tolist() for n in ("image", "class", "test")), strict=True)) == [
        (0, 5, False),
        (4, 3, False),
        (5, 3, True),
    ]
    assert outputs(Siren((2, 4, 4, 1)), found.params, positions(3)).shape == (3, 9, 1)


@pytest.mark.parametrize("damage", ["cut off", "width", "foreign", "pickle"])
def test_damaged_sirens_are_refused(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "randinit_test_1s"
    folder.mkdir()
    for image in range(2):
        torch.save(siren(image, "net.{}"), folder / f"net{image}.pth")
    last = folder / "net1.pth"
    messages = {
        "cut off": r"net1\.pth is not a whole file of tensors",
        "width": r"expected SIRENs of one architecture.*net1\.pth has",
        "foreign": r"expected matrices and biases of a perceptron in .*net1\.pth",
        "pickle": r"net1\.pth is not a whole file of tensors",
    }
    if damage == "cut off":
        last.write_bytes(last.read_bytes()[:-200])
    elif damage == "width":
        torch.save(siren(1, "net.{}", (2, 5, 5, 1)), last)
    elif damage == "foreign":
        torch.save(nn.Conv2d(1, 2, 3).state_dict(), last)
    else:
        torch.save({"module": nn.Linear(2, 2)}, last)  # code, which is never run
    with pytest.raises(ValueError, match=messages[damage]):
        read_nfn_sirens(tmp_path)
