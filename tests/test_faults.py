"""What may go wrong around an optimizer: what happens then, and what is kept. docs/contract.md has the table.

Faults of saved states are in test_saved_state.py, of rule files in test_pretrained.py, and sequences of faults in
test_fault_sequences.py.
"""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from trained_net import RULE, X, backward, grad_of, net, same, snapshot, symmetry_of_net, through_file, train

import nfn_optim
from nfn_optim import pretrained
from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.rule import UpdateRule

ROOT = Path(__file__).parent.parent


class Fault(NamedTuple):
    """One row of the table.

    Attributes:
        happens: What happens.
        kept: What is kept.
        run: Makes it go wrong, and looks.
    """

    happens: str
    kept: str
    run: Callable[[Path], None]


FAULTS: dict[str, Fault] = {}


def fault(what: str, happens: str, kept: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Enter a function into the table."""

    def enter(run: Callable[[Path], None]) -> Callable[[Path], None]:
        FAULTS[what] = Fault(happens, kept, run)
        return run

    return enter


def made() -> tuple[nn.Sequential, NFNOptimizer]:
    """A network and its optimizer."""
    model = net()
    return model, NFNOptimizer(model, rule=RULE, weight_decay=0.1)


def assert_trains(model: nn.Module, optimizer: NFNOptimizer) -> None:
    """It goes on: all parameters move, and stay finite."""
    skipped, before = optimizer.skipped_steps, [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 2)
    assert optimizer.skipped_steps == skipped
    for p, q in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, q)
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


# --------------------------------------------------------------------------------------------------------- gradients

SKIPPED = "the step is skipped and counted in `skipped_steps`"
SKIPPED_KEPT = "every bit of parameters and state"
Poison = Callable[[list[Tensor]], object]
POISON: dict[str, Poison] = {
    "a gradient with one NaN": lambda grads: grads[-1].view(-1)[0].fill_(torch.nan),
    "a gradient with one Inf": lambda grads: grads[0].view(-1)[-1].fill_(torch.inf),
    "a gradient with one -Inf": lambda grads: grads[1].view(-1)[0].fill_(-torch.inf),
    "all gradients NaN": lambda grads: [g.fill_(torch.nan) for g in grads],
    "a gradient of 1e30": lambda grads: grads[2].view(-1)[0].fill_(1e30),
}


def gradient_fault(poison: Poison) -> Callable[[Path], None]:
    """Two bad steps among good ones, from the first step and later."""

    def run(_: Path) -> None:
        for earlier in (0, 2):
            model, optimizer = made()
            train(model, optimizer, earlier)
            before = snapshot(optimizer)
            for count in (1, 2):
                backward(model, optimizer)
                poison([grad_of(p) for p in model.parameters()])
                optimizer.step()
                assert optimizer.skipped_steps == count
            assert same(snapshot(optimizer), before)
            assert_trains(model, optimizer)
            assert optimizer.state_dict()["param_groups"][0]["skipped_steps"] == 2

    return run


for name, poison in POISON.items():
    fault(name, SKIPPED, SKIPPED_KEPT)(gradient_fault(poison))


@fault("NaN at every step", SKIPPED, SKIPPED_KEPT + "; nothing is ever taken")
def nan_for_ever(_: Path) -> None:
    model, optimizer = made()
    before = snapshot(optimizer)
    for _step in range(20):
        backward(model, optimizer)
        grad_of(model[0].weight).fill_(torch.nan)
        optimizer.step()
    assert optimizer.skipped_steps == 20
    assert same(snapshot(optimizer), before)


@fault("float16 gradients that overflow", SKIPPED, SKIPPED_KEPT)
def overflow(_: Path) -> None:
    model = net(torch.float16)
    optimizer = NFNOptimizer(model, rule=RULE)
    train(model, optimizer)
    before = snapshot(optimizer)
    optimizer.zero_grad()
    torch.autograd.backward((model(X.half()) * 6e4).square().sum())
    assert not grad_of(model[2].weight).isfinite().all()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same(snapshot(optimizer), before)
    assert_trains(model, optimizer)


@fault("float16 gradients of 6e4", "a step like any other: the state is float32", "")
def almost_overflow(_: Path) -> None:
    model = net(torch.float16)
    optimizer = NFNOptimizer(model, rule=RULE, symmetry=symmetry_of_net())
    for p in model.parameters():
        p.grad = torch.full_like(p, 6e4)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(optimizer.state[p]["exp_avg_sq"].min() > 3e6 for p in model.parameters())


@fault("gradients of 1e18", "a step like any other: their squares are finite", "")
def large(_: Path) -> None:
    model, optimizer = made()
    for _step in range(3):
        backward(model, optimizer)
        for p in model.parameters():
            grad_of(p).mul_(1e18)
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert_trains(model, optimizer)


@fault("gradients of 1e-30", "a step like any other, far below Adam's epsilon: it hardly moves", "")
def tiny(_: Path) -> None:
    model, optimizer = net(), None
    optimizer = NFNOptimizer(model, rule=RULE)
    for _step in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, optimizer)
        for p in model.parameters():
            grad_of(p).mul_(1e-30)
        optimizer.step()
    assert all((p - q).abs().max() <= 1e-9 for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.skipped_steps == 0
    assert_trains(model, optimizer)


@fault("gradients of exactly zero, for ever", "nothing moves but by weight decay", "parameters, without decay")
def zero(_: Path) -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=RULE)
    before = [p.detach().clone() for p in model.parameters()]
    for _step in range(20):
        backward(model, optimizer)
        for p in model.parameters():
            grad_of(p).zero_()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert_trains(model, optimizer)


@fault("sparse gradients", "RuntimeError: build the embedding with sparse=False", SKIPPED_KEPT)
def sparse(_: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = NFNOptimizer(model, rule=RULE)
    torch.autograd.backward(model(torch.tensor([1, 2])).sum())
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"sparse.*SparseAdam"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


# -------------------------------------------------------------------------------------------------------- parameters


@fault("a parameter is overwritten behind its back", "the next step starts from what is there", "its state")
def overwritten(_: Path) -> None:
    model, optimizer = made()
    train(model, optimizer)
    moments = optimizer.state[model[0].weight]["exp_avg"].clone()
    model.load_state_dict(net(seed=5).state_dict())
    model[2].weight.data = torch.ones(3, 6)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moments)
    assert_trains(model, optimizer)
    assert optimizer.state[model[0].weight]["step"] == 5


@fault(
    "a parameter becomes NaN behind its back",
    "gradients are NaN: steps are skipped until it is repaired",
    "all other parameters, all state",
)
def nan_parameter(_: Path) -> None:
    model, optimizer = made()
    train(model, optimizer)
    _, state = snapshot(optimizer)
    with torch.no_grad():
        good = model[0].weight[0, 0].clone()
        model[0].weight[0, 0] = torch.nan
    train(model, optimizer)
    assert optimizer.skipped_steps == 3
    with torch.no_grad():
        model[0].weight[0, 0] = good
    assert same(([], snapshot(optimizer)[1]), ([], state))
    assert_trains(model, optimizer)


@fault(
    "a parameter is NaN, its gradients are not",
    "its own update falls back to the nominal one",
    "all other parameters are trained as ever",
)
def nan_parameter_alone(_: Path) -> None:
    model, optimizer = made()
    train(model, optimizer)
    backward(model, optimizer)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.fallbacks == 1
    assert [int((~p.isfinite()).sum()) for p in model.parameters()] == [1, 0, 0, 0]


@fault("the model's precision is changed", "the state stays in the precision that it has", "the state")
def cast(_: Path) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model, optimizer = made()
        train(model, optimizer)
        model.to(dtype)
        assert_trains(model, optimizer)
        assert optimizer.state[model[0].weight]["step"] == 5
        assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32


@fault(
    "a parameter changes its shape",
    "one warning; its state starts afresh, and the network is traced again",
    "the state of all others",
)
def reshaped(_: Path) -> None:
    for given in (None, symmetry_of_net()):
        model = net()
        optimizer = NFNOptimizer(model, rule=RULE, symmetry=given)
        train(model, optimizer)
        wider = net(seed=1)
        wider[0], wider[2] = nn.Linear(4, 8), nn.Linear(8, 3)
        for k in (0, 2):
            for old, new in zip(model[k].parameters(), wider[k].parameters(), strict=True):
                old.data = new.data
        model[0].out_features = model[2].in_features = 8
        backward(model, optimizer)
        with pytest.warns(UserWarning, match=r"\['0.weight', '0.bias', '2.weight'\] changed their shape") as caught:
            optimizer.step()
        assert caught[0].filename == __file__
        assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [1, 1, 1, 4]
        assert_trains(model, optimizer)
        assert optimizer.symmetry is not None
        sizes = [optimizer.symmetry.sizes[axis] for axis in optimizer.symmetry.free]
        assert sizes == ([8] if given is None else [])


@fault("the model is replaced after construction", "nothing: as with AdamW, its gradients are nobody's", "everything")
def replaced(_: Path) -> None:
    _model, optimizer = made()
    other = net(seed=1)
    before, theirs = snapshot(optimizer), [p.detach().clone() for p in other.parameters()]
    for _step in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(other(X).square().mean())
        optimizer.step()
    assert same(snapshot(optimizer), before)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), theirs, strict=True))
    optimizer.add_param_group({"params": other.parameters()})
    train(other, optimizer)
    assert not torch.equal(next(other.parameters()), theirs[0])


@fault("the state is cleared", "every parameter starts afresh", "parameters, symmetry")
def cleared(_: Path) -> None:
    model, optimizer = made()
    train(model, optimizer)
    symmetry = optimizer.symmetry
    optimizer.state.clear()
    assert_trains(model, optimizer)
    assert optimizer.symmetry == symmetry
    assert optimizer.state[model[0].weight]["step"] == 2


# ----------------------------------------------------------------------------------------------------- forward passes


def first_forward(call: Callable[[nn.Module], object]) -> Callable[[Path], None]:
    """The first forward pass is an odd one; the symmetry is found all the same."""

    def run(_: Path) -> None:
        model = net()
        optimizer = NFNOptimizer(model.parameters(), rule=RULE)
        call(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.symmetry is not None
        assert optimizer.symmetry.canonical() == symmetry_of_net().canonical()
        assert_trains(model, optimizer)

    return run


@torch.no_grad()
def without_grad(model: nn.Module) -> Tensor:
    output: Tensor = model(X)
    return output


@torch.inference_mode()
def inference(model: nn.Module) -> Tensor:
    output: Tensor = model(X)
    return output


FOUND = "the symmetry is found"
for name, call in {
    "the first forward pass is under no_grad": without_grad,
    "the first forward pass is in inference mode": inference,
    "the first forward pass has other shapes": lambda model: model(torch.ones(2, 7, 4)),
    "the first forward pass has an empty batch": lambda model: (model(torch.ones(0, 4)), model(X)),
    "the first forward pass is on another thread": lambda model: _threads([lambda: model(X)]),
}.items():
    fault(name, FOUND, "")(first_forward(call))


@fault("a forward pass that raises", "it is not heard; the next one is", "")
def raising(_: Path) -> None:
    model, optimizer = made()
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(2, 5))
    assert_trains(model, optimizer)
    assert optimizer.symmetry is not None
    assert optimizer.symmetry.free


@fault(
    "a step before any forward pass",
    "one warning; every tensor by itself, until a forward pass is seen",
    "the state, when the symmetry comes",
)
def early(_: Path) -> None:
    model, optimizer = made()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="no forward pass") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    optimizer.step()
    assert_trains(model, optimizer)
    assert optimizer.symmetry is not None
    assert optimizer.symmetry.canonical() == symmetry_of_net().canonical()
    assert optimizer.state[model[0].weight]["step"] == 4


@fault(
    "a step inside a compiled function",
    "the graph breaks there, and the step is taken as ever",
    "equality, bit for bit",
)
def compiled(_: Path) -> None:
    plain, inside = made(), made()

    def iteration() -> None:
        backward(*inside)
        inside[1].step()

    train(*plain, steps=1)
    iteration()  # the forward pass is heard outside of a graph only
    graphs = 0

    def count(graph: Callable[..., object], _: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph

    run = torch.compile(iteration, backend=count)
    for _step in range(3):
        train(*plain, steps=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, on .grad of tensors that it made up
            run()
    assert graphs
    assert same(snapshot(plain[1]), snapshot(inside[1]))
    step = torch.compile(inside[1].step, backend=count)
    backward(*inside)
    step()
    train(*plain, steps=1)
    assert same(snapshot(plain[1]), snapshot(inside[1]))


# ------------------------------------------------------------------------------------------- several at the same time


def _threads(runs: list[Callable[[], object]]) -> None:
    """Run all at the same time."""
    errors: list[BaseException] = []

    def guarded(run: Callable[[], object]) -> None:
        try:
            run()
        except BaseException as error:  # it is raised again
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


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
    together: dict[int, list[Tensor]] = {}
    _threads([lambda width=width: together.update({width: run(width)}) for width in range(5, 11)])  # type: ignore[misc]
    for width, expected in enumerate(alone, 5):
        assert all(torch.equal(p, q) for p, q in zip(together[width], expected, strict=True))


@fault("threads that take turns on one network", "each iteration is one step", "the count of steps")
def shared(_: Path) -> None:
    model, optimizer = made()
    turn = threading.Lock()

    def run() -> None:
        for _step in range(5):
            with turn:
                train(model, optimizer, 1)

    _threads([run] * 4)
    assert optimizer.state[model[0].weight]["step"] == 20
    assert_trains(model, optimizer)


# -------------------------------------------------------------------------------------------------- files and machines


@fault("the disk is full while a rule is saved", "OSError", "the file that was there; no litter")
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
    """Run a script in another process, that finds the package where it is said to be."""
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


@pytest.mark.parametrize("what", FAULTS)
def test_fault(what: str, tmp_path: Path) -> None:
    FAULTS[what].run(tmp_path)


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    for what, row in FAULTS.items():
        assert f"| {what} | {row.happens} | {row.kept} |" in page
