"""What may go wrong around an optimizer: others on the same network, threads, files, machines."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_table import FaultTable, assert_trains, made, together
from torch import Tensor, nn
from trained_net import RULE, X, backward, net, same, snapshot, through_file, train

import nfn_optim
from nfn_optim import pretrained
from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.rule import UpdateRule

ROOT = Path(__file__).parent.parent
FAULTS = FaultTable()
fault = FAULTS.enter


# ------------------------------------------------------------------------------------------- several at the same time


@fault("two optimizers on the two halves of one model", "each finds its part of the symmetry", "")
def halves(_: Path) -> None:
    model = net()
    optimizers = [NFNOptimizer(model[k].parameters(), rule=RULE) for k in (0, 2)]
    before = [p.detach().clone() for p in model.parameters()]
    for _step in range(3):
        model.zero_grad()
        torch.autograd.backward(model(X).square().mean())
        for optimizer in optimizers:
            optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert [o.symmetry.sizes[axis] for o in optimizers if o.symmetry for axis in o.symmetry.free] == [6, 6]


@fault("two optimizers on the same parameters", "each takes its steps with a state of its own", "")
def doubled(_: Path) -> None:
    model = net()
    optimizers = [NFNOptimizer(model, rule=RULE) for _ in range(2)]
    for _step in range(3):
        for optimizer in optimizers:
            backward(model, optimizer)
            optimizer.step()
    assert [o.state[model[0].weight]["step"].item() for o in optimizers] == [3, 3]
    assert not same(([], snapshot(optimizers[0])[1]), ([], snapshot(optimizers[1])[1]))
    assert all(p.isfinite().all() for p in model.parameters())


@fault("threads, each with its network", "each trains as if it were alone", "equality, bit for bit")
def threads(_: Path) -> None:
    def run(width: int) -> list[Tensor]:
        torch_net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 3))
        with torch.no_grad():
            for k, p in enumerate(torch_net.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape) + 0.1 * k)
        train(torch_net, NFNOptimizer(torch_net.parameters(), rule=RULE), 6)
        return [p.detach() for p in torch_net.parameters()]

    alone = [run(width) for width in range(5, 11)]
    found: dict[int, list[Tensor]] = {}
    together([lambda width=width: found.update({width: run(width)}) for width in range(5, 11)])  # type: ignore[misc]
    for width, expected in enumerate(alone, 5):
        assert all(torch.equal(p, q) for p, q in zip(found[width], expected, strict=True))


@fault("threads that take turns on one network", "each iteration is one step", "the count of steps")
def shared(_: Path) -> None:
    model, optimizer = made()
    turn = threading.Lock()

    def run() -> None:
        for _step in range(5):
            with turn:
                train(model, optimizer, 1)

    together([run] * 4)
    assert optimizer.state[model[0].weight]["step"] == 20
    assert_trains(model, optimizer)


# -------------------------------------------------------------------------------------------------- files and machines


@fault("the disk is full while a rule is saved", "OSError", "the previous file; no partial file is left")
def full_disk(path: Path) -> None:
    """A limit on the size of files does to a write what a full disk does."""
    target = path / "rule.safetensors"
    pretrained.save(RULE, target)
    before = target.read_bytes()
    script = f"""
import resource
from nfn_optim import UpdateRule, pretrained
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    pretrained.save(UpdateRule(), {str(target)!r})
except OSError as error:
    assert "could not be written" in str(error), error
else:
    raise AssertionError("it was written")
"""
    _run(script)
    assert target.read_bytes() == before
    assert list(path.iterdir()) == [target]


@fault("the disk is full while the state is saved", "torch.save raises", "the optimizer, which goes on")
def full_disk_for_a_state(path: Path) -> None:
    script = f"""
import resource, torch
from nfn_optim import NFNOptimizer
model = torch.nn.Linear(60, 60)
optimizer = NFNOptimizer(model, rule="adamw")
def step():
    optimizer.zero_grad()
    model(torch.ones(2, 60)).square().sum().backward()
    optimizer.step()
step()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    torch.save(optimizer.state_dict(), {str(path / "state.pt")!r})
except (OSError, RuntimeError):
    pass
else:
    raise AssertionError("it was written")
step()
assert optimizer.state[model.weight]["step"] == 2
"""
    _run(script)


@fault("the package directory is read-only", "nothing: nothing is ever written there", "")
def read_only(path: Path) -> None:
    shutil.copytree(Path(nfn_optim.__file__).parent, path / "nfn_optim", ignore=shutil.ignore_patterns("__pycache__"))
    for found in [path, *path.rglob("*")]:
        found.chmod(0o555 if found.is_dir() else 0o444)
    _run(USE, path, f"{str(path)!r}")
    for found in [path, *path.rglob("*")]:
        found.chmod(0o755 if found.is_dir() else 0o644)
    assert not list(path.rglob("__pycache__"))


@fault("there is no network", "nothing: rules are inside the package", "")
def no_network(_: Path) -> None:
    _run(USE)


USE = """
import sys
folder = {folder}
def watch(event, args):
    if event.startswith(("socket.", "urllib.", "http.")) and event != "socket.gethostname":
        raise AssertionError(f"{{event}} {{args}}")
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") and folder and str(args[0]).startswith(folder):
        raise AssertionError(f"{{event}} {{args}}")
    if event == "open" and folder and str(args[0]).startswith(folder) and args[1] not in (None, "r", "rb"):
        raise AssertionError(f"{{event}} {{args}}")
sys.addaudithook(watch)
import torch, nfn_optim
assert not folder or nfn_optim.__file__.startswith(folder)
model = torch.nn.Linear(4, 3)
optimizer = nfn_optim.NFNOptimizer(model)
model(torch.ones(2, 4)).square().sum().backward()
optimizer.step()
assert optimizer.symmetry is not None
"""


def _run(script: str, package: Path = ROOT, folder: str = "None") -> None:
    """Run a script in another process, that imports the package from a given folder."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", script.format(folder=folder) if script is USE else script],
        capture_output=True,
        text=True,
        check=False,
        cwd=package,
        env={"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.proof,)


@fault("a rule file is a hostile pickle", "ValueError: rules are read without pickle", "nothing is run")
def hostile(path: Path) -> None:
    proof = path / "proof"
    for write in (lambda p: p.write_bytes(pickle.dumps(Payload(proof))), lambda p: torch.save(Payload(proof), p)):
        write(path / "rule.safetensors")
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            NFNOptimizer(net(), rule=path / "rule.safetensors")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()  # else this would prove nothing


@fault(
    "a rule of which every number is NaN",
    "every tensor falls back to the nominal update, counted in `fallbacks`",
    "AdamW",
)
def broken_rule(_: Path) -> None:
    rule = copy.deepcopy(RULE)
    with torch.no_grad():
        for value in rule.parameters():
            value.fill_(torch.nan)
    ours, theirs = net(), net()
    optimizer = NFNOptimizer(ours, rule=rule)
    train(ours, optimizer)
    train(theirs, NFNOptimizer(theirs, rule="adamw"))
    assert optimizer.fallbacks == 3 * 4
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@fault("theta changes while training", "the next step uses it", "")
def other_theta(_: Path) -> None:
    rule = copy.deepcopy(RULE)
    for dtype in (torch.float32, torch.float64):
        ours, theirs = net(dtype), net(dtype)
        one, other = NFNOptimizer(ours, rule=rule), NFNOptimizer(theirs, rule="adamw")
        other.load_state_dict(through_file(other.state_dict()))
        train(ours, one, 1)
        kept = copy.deepcopy(rule.state_dict())
        rule.zero_()
        theirs.load_state_dict(ours.state_dict())
        other.state.clear()
        fresh = NFNOptimizer(theirs, rule=UpdateRule().zero_())
        fresh.load_state_dict(one.state_dict())
        train(ours, one)
        train(theirs, fresh)
        assert same(snapshot(one), snapshot(fresh))
        rule.load_state_dict(kept)


PROCESSES = (full_disk, full_disk_for_a_state, read_only, no_network)
"""They start another process."""


EACH = [pytest.param(what, marks=[pytest.mark.slow] if row.run in PROCESSES else []) for what, row in FAULTS.items()]


@pytest.mark.parametrize("what", EACH)
def test_fault(what: str, tmp_path: Path) -> None:
    FAULTS[what].run(tmp_path)


def test_the_page_has_the_table() -> None:
    assert FAULTS.missing() == []
