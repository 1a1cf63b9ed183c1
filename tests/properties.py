"""What must hold of the symmetry of every network, as named functions to be applied to a table of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from zoo import Network

from nfn_optim.symmetry import Symmetry, certify, symmetry_of

ROUNDING = 1e-10


def traced(network: Network, training: bool = False) -> Symmetry:
    """What the tracer says."""
    return symmetry_of(network.module().train(training), *network.inputs())


def _sharp(network: Network) -> tuple[dict[str, Tensor], Callable[[Mapping[str, Tensor]], Tensor]]:
    """Tensors in float64, away from zeros and ones, and the network (eval mode) as a function of them."""
    module = network.module().double().eval()
    inputs = [x.double() if x.is_floating_point() else x for x in network.inputs()]
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    floats = {name: t.detach() for name, t in own.items() if t.is_floating_point()}
    tensors = {**own, **{name: t * (1 + torch.rand_like(t)) + 0.1 * torch.rand_like(t) for name, t in floats.items()}}

    def function(values: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(module, dict(values), tuple(inputs), tie_weights=True)
        return output.detach()

    return tensors, function


def _described(symmetry: Symmetry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in symmetry.dims}


def is_as_written(network: Network) -> None:
    """The tracer finds exactly the symmetry written by hand, in either mode."""
    expected = network.expected()
    expected = expected.restrict(name for name in expected.dims if expected.dims[name] or name in _params(network))
    for training in (True, False):
        found = traced(network, training).canonical()
        assert list(found.dims) == list(expected.dims)
        assert found == expected.canonical(), f"found\n{found}\nexpected\n{expected.canonical()}"


def _params(network: Network) -> set[str]:
    return {name for name, _ in network.module().named_parameters()}


def keeps_function(network: Network) -> None:
    """Permuting all free axes at once changes no output."""
    symmetry = traced(network)
    tensors, function = _sharp(network)
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(2))
    permuted = symmetry.permute(_described(symmetry, tensors), permutations)
    torch.testing.assert_close(function({**tensors, **permuted}), function(tensors), rtol=ROUNDING, atol=ROUNDING)


def is_certified(network: Network) -> None:
    """The certificate agrees, axis by axis."""
    certificate = certify(network.module(), traced(network), *network.inputs())
    assert certificate.ok, str(certificate)
    assert set(certificate.errors) == set(traced(network).free)


def not_over_symmetric(network: Network) -> None:
    """Permuting a free axis in only one of the tensors that carry it changes the function."""
    symmetry = traced(network)
    tensors, function = _sharp(network)
    expected = function(tensors)
    for axis in symmetry.free:
        outer = [symmetry.sizes[parent] for parent in symmetry.nested.get(axis, ())]
        shift = {axis: torch.arange(symmetry.sizes[axis]).roll(1).expand(*outer, -1)}
        permuted = symmetry.permute(_described(symmetry, tensors), shift)
        carriers = [name for name in symmetry.dims if axis in symmetry.axes_of(name)]
        for name in carriers:
            change = (function({**tensors, name: permuted[name]}) - expected).abs().max()
            assert change > 1e-6, f"{axis} of {name} may be permuted alone"


def fixed_axes_matter(network: Network) -> None:
    """Nothing else could be permuted: no fixed axis, no two of them together, no axis differently in each part."""
    symmetry = traced(network)
    certificate = certify(network.module(), symmetry, *network.inputs(), search=True)
    unread = {f"{dim} could be free" for dim in symmetry.dims.get("unused", ())}
    assert set(certificate.missed) == unread, certificate.missed


def leaves_module_untouched(network: Network) -> None:
    """Tracing changes no tensor, no attribute, no mode and no random number."""
    for training in (True, False):
        module = network.module().train(training)
        before = {name: t.clone() for name, t in module.state_dict().items()}
        objects = {id(t) for t in [*module.parameters(), *module.buffers()]}
        attributes = [(sub, {k: v for k, v in vars(sub).items() if not k.startswith("_")}) for sub in module.modules()]
        state = torch.get_rng_state()
        symmetry_of(module, *network.inputs())
        assert torch.equal(state, torch.get_rng_state())
        assert objects == {id(t) for t in [*module.parameters(), *module.buffers()]}
        assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
        assert all(vars(sub) == {**vars(sub), **kept} for sub, kept in attributes)


def survives_text(network: Network) -> None:
    """Printing and parsing, and plain lists, give the same value back; and its hash."""
    symmetry = traced(network)
    assert Symmetry.parse(str(symmetry)) == symmetry
    assert Symmetry.from_dict(symmetry.to_dict()) == symmetry
    assert hash(copy.deepcopy(symmetry)) == hash(symmetry)


def fits(network: Network) -> None:
    """It describes all tensors of at least one dimension, with their shapes."""
    module: nn.Module = network.module()
    buffers = {name: b for name, b in module.named_buffers() if b.dim()}
    traced(network).check({**dict(module.named_parameters()), **buffers})


def permutations_compose(network: Network) -> None:
    """Permuting twice is permuting by the composition, and the inverse undoes it."""
    symmetry, params = traced(network), _described(traced(network), _sharp(network)[0])
    generator = torch.Generator().manual_seed(3)
    p, q = symmetry.random_permutations(generator), symmetry.random_permutations(generator)
    both = symmetry.permute(symmetry.permute(params, p), q)
    once = symmetry.permute(params, symmetry.compose(p, q))
    back = symmetry.permute(symmetry.permute(params, p), symmetry.invert(p))
    assert all(torch.equal(both[name], once[name]) and torch.equal(back[name], params[name]) for name in params)


TRACED = (
    is_as_written,
    keeps_function,
    is_certified,
    not_over_symmetric,
    fixed_axes_matter,
    leaves_module_untouched,
    fits,
)
VALUE = (survives_text, permutations_compose)
