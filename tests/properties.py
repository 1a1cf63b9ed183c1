"""Properties of the symmetry of a network, as named functions that tests apply to every network of the zoo."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from zoo import Network

from nfn_optim.symmetry import Symmetry, certify, symmetry_of

ROUNDING = 1e-10


def traced(network: Network, training: bool = False) -> Symmetry:
    """The symmetry that the tracer finds."""
    return symmetry_of(network.module().train(training), *network.inputs())


def _generic(network: Network) -> tuple[dict[str, Tensor], Callable[[Mapping[str, Tensor]], Tensor]]:
    """Tensors in float64 that are not invariant by chance, and the network (in eval mode) as a function of them."""
    module = network.module().double().eval()
    inputs = [x.double() if x.is_floating_point() else x for x in network.inputs()]
    original = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    floats = {name: t.detach() for name, t in original.items() if t.is_floating_point()}
    perturbed = {name: t * (1 + torch.rand_like(t)) + 0.1 * torch.rand_like(t) for name, t in floats.items()}

    def function(values: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(module, dict(values), tuple(inputs), tie_weights=True)
        return output.detach()

    return {**original, **perturbed}, function


def _described(symmetry: Symmetry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in symmetry.dims}


def equals_handwritten(network: Network) -> None:
    """The tracer finds exactly the symmetry written by hand, in training and in eval mode."""
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
    tensors, function = _generic(network)
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(2))
    permuted = symmetry.permute(_described(symmetry, tensors), permutations)
    torch.testing.assert_close(function({**tensors, **permuted}), function(tensors), rtol=ROUNDING, atol=ROUNDING)


def is_certified(network: Network) -> None:
    """`certify` confirms every free axis."""
    certificate = certify(network.module(), traced(network), *network.inputs())
    assert certificate.ok, str(certificate)
    assert set(certificate.errors) == set(traced(network).free)


def not_over_symmetric(network: Network) -> None:
    """Permuting a free axis in one of the tensors that carry it, and not in the others, changes the function."""
    symmetry = traced(network)
    tensors, function = _generic(network)
    expected = function(tensors)
    for axis in symmetry.free:
        outer = [symmetry.sizes[parent] for parent in symmetry.nested.get(axis, ())]
        shift = {axis: torch.arange(symmetry.sizes[axis]).roll(1).expand(*outer, -1)}
        permuted = symmetry.permute(_described(symmetry, tensors), shift)
        carriers = [name for name in symmetry.dims if axis in symmetry.axes_of(name)]
        for name in carriers:
            change = (function({**tensors, name: permuted[name]}) - expected).abs().max()
            assert change > 1e-6, f"{axis} of {name} can be permuted alone"


def search_finds_nothing(network: Network) -> None:
    """`certify` finds no further symmetry: no fixed axis, no pair of them, no undeclared nesting."""
    symmetry = traced(network)
    certificate = certify(network.module(), symmetry, *network.inputs(), search=True)
    unused = {f"{dim} could be free" for dim in symmetry.dims.get("unused", ())}
    assert set(certificate.missed) == unused, certificate.missed


def leaves_module_untouched(network: Network) -> None:
    """Tracing changes no tensor, no attribute, no mode and no state of a random number generator."""
    for training in (True, False):
        module = network.module().train(training)
        values = {name: t.clone() for name, t in module.state_dict().items()}
        objects = {id(t) for t in [*module.parameters(), *module.buffers()]}
        attributes = [(sub, {k: v for k, v in vars(sub).items() if not k.startswith("_")}) for sub in module.modules()]
        state = torch.get_rng_state()
        symmetry_of(module, *network.inputs())
        assert torch.equal(state, torch.get_rng_state())
        assert objects == {id(t) for t in [*module.parameters(), *module.buffers()]}
        assert all(torch.equal(values[name], t) for name, t in module.state_dict().items())
        assert all(vars(sub) == {**vars(sub), **before} for sub, before in attributes)


def round_trips(network: Network) -> None:
    """Printing and parsing, and `to_dict` and `from_dict`, return an equal value; copies have equal hashes."""
    symmetry = traced(network)
    assert Symmetry.parse(str(symmetry)) == symmetry
    assert Symmetry.from_dict(symmetry.to_dict()) == symmetry
    assert hash(copy.deepcopy(symmetry)) == hash(symmetry)


def describes_all_tensors(network: Network) -> None:
    """The symmetry describes all parameters, and all buffers of at least one dimension, with their shapes."""
    module: nn.Module = network.module()
    buffers = {name: b for name, b in module.named_buffers() if b.dim()}
    traced(network).check({**dict(module.named_parameters()), **buffers})


def permutations_compose(network: Network) -> None:
    """Permuting twice equals permuting by the composition; the inverse restores the tensors."""
    symmetry, params = traced(network), _described(traced(network), _generic(network)[0])
    generator = torch.Generator().manual_seed(3)
    p, q = symmetry.random_permutations(generator), symmetry.random_permutations(generator)
    in_turn = symmetry.permute(symmetry.permute(params, p), q)
    composed = symmetry.permute(params, symmetry.compose(p, q))
    restored = symmetry.permute(symmetry.permute(params, p), symmetry.invert(p))
    assert all(
        torch.equal(in_turn[name], composed[name]) and torch.equal(restored[name], params[name]) for name in params
    )


TRACED = (
    equals_handwritten,
    keeps_function,
    is_certified,
    not_over_symmetric,
    search_finds_nothing,
    leaves_module_untouched,
    describes_all_tensors,
)
VALUE = (round_trips, permutations_compose)
