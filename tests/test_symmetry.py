"""The Symmetry value: properties, text form, action on tensors, errors."""

from __future__ import annotations

import json
from collections.abc import Callable

import properties
import pytest
import torch
import zoo

from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.expression import format_dim, parse_dim

DIMS = {"0.weight": "h in", "0.bias": "h", "2.weight": "out (h y x)", "gain": ""}
TENSORS = {
    "0.weight": torch.arange(6.0).reshape(3, 2),
    "0.bias": torch.arange(3.0),
    "2.weight": torch.arange(24.0).reshape(2, 12),
    "gain": torch.tensor(1.0),
}
FIXED = ("in", "out", "y", "x")


def _symmetry() -> Symmetry:
    return Symmetry.spec(DIMS, TENSORS, FIXED, {"y": 2})


@pytest.mark.parametrize("network", zoo.ZOO, ids=lambda network: network.name)
@pytest.mark.parametrize("check", properties.VALUE, ids=lambda check: check.__name__)
def test_property(check: Callable[[zoo.Network], None], network: zoo.Network) -> None:
    check(network)


def test_properties_of_a_symmetry() -> None:
    symmetry = _symmetry()
    assert symmetry.axes == ("h", "in", "out", "y", "x")
    assert symmetry.free == ("h",)
    assert dict(symmetry.sizes) == {"h": 3, "in": 2, "out": 2, "y": 2, "x": 2}
    assert symmetry.shape_of("2.weight") == (2, 12)
    assert symmetry.shape_of("gain") == ()
    assert symmetry.size_of("(h y x)") == 12
    symmetry.check(TENSORS)


def test_prints_as_a_table() -> None:
    assert str(_symmetry()).splitlines() == [
        "0.weight  h in",
        "0.bias    h",
        "2.weight  out (h y x)",
        "gain",
        "",
        "free      h=3",
        "fixed     in=2 out=2 y=2 x=2",
    ]


def test_parse_takes_comments_and_any_spacing() -> None:
    text = "# by hand\n w   h   in  # rows are neurons\nb h\nfree h=3\nfixed in=2"
    expected = Symmetry({"w": ("h", "in"), "b": ("h",)}, {"h": 3, "in": 2}, frozenset({"in"}))
    assert Symmetry.parse(text) == expected


@pytest.mark.parametrize("name", ["free", "fixed"])
def test_parameters_may_be_named_like_the_sections(name: str) -> None:
    symmetry = Symmetry({name: ("h",)}, {"h": 3})
    assert Symmetry.parse(str(symmetry)) == symmetry


def test_survives_json() -> None:
    assert Symmetry.from_dict(json.loads(json.dumps(_symmetry().to_dict()))) == _symmetry()


@pytest.mark.parametrize(
    "text", ["h", "(c y x)", "(h > d)", "((h > d) + (h > d) + e)", "(h > (d + e))", "(x (a + b) y)"]
)
def test_dimensions_are_parsed_and_formatted(text: str) -> None:
    expression, nested = parse_dim(text)
    assert format_dim(expression, nested) == text
    assert parse_dim(f" {text.replace(' ', '  ')} ")[0] == expression


def test_redundant_brackets_are_removed() -> None:
    assert parse_dim("(c)")[0] == "c"
    assert parse_dim("(a (b c))")[0] == parse_dim("(a b c)")[0]
    assert parse_dim("(a + (b + c))")[0] == parse_dim("(a + b + c)")[0]


def test_canonical_depends_on_everything_but_axis_names() -> None:
    renamed = {name: dims.replace("h", "neurons").replace("out", "o") for name, dims in DIMS.items()}
    other = Symmetry.spec(renamed, TENSORS, ("in", "o", "y", "x"), {"y": 2})
    assert other != _symmetry()
    assert other.canonical() == _symmetry().canonical()
    assert other.canonical() != Symmetry.spec(DIMS, TENSORS, (), {"y": 2}).canonical()


def test_separate_has_no_free_axis() -> None:
    symmetry = Symmetry.separate({name: tuple(t.shape) for name, t in TENSORS.items()})
    assert not symmetry.free
    assert len(symmetry.axes) == 5
    symmetry.check(TENSORS)


def test_restrict_and_rename() -> None:
    part = _symmetry().restrict(["0.bias"])
    assert (part.axes, part.fixed) == (("h",), frozenset())
    assert list(_symmetry().rename({"gain": "g"}).dims) == ["0.weight", "0.bias", "2.weight", "g"]


def test_permutes_every_dimension_that_carries_the_axis() -> None:
    order = torch.tensor([2, 0, 1])
    permuted = _symmetry().permute(TENSORS, {"h": order})
    assert torch.equal(permuted["0.weight"], TENSORS["0.weight"][order])
    assert torch.equal(permuted["0.bias"], TENSORS["0.bias"][order])
    blocks = TENSORS["2.weight"].reshape(2, 3, 2, 2)[:, order]  # (out, h, y, x)
    assert torch.equal(permuted["2.weight"], blocks.reshape(2, 12))
    assert permuted["gain"] is TENSORS["gain"]


def test_permutes_both_sides_of_a_square() -> None:
    symmetry, order, value = Symmetry({"w": ("h", "h")}, {"h": 3}), torch.tensor([2, 0, 1]), torch.randn(3, 3)
    assert torch.equal(symmetry.permute({"w": value}, {"h": order})["w"], value[order][:, order])


def test_permutes_after_batch_dimensions() -> None:
    order = torch.tensor([2, 0, 1])
    batch = {name: torch.stack([t, -t]) for name, t in TENSORS.items()}
    permuted = _symmetry().permute(batch, {"h": order}, batch_dims=1)
    single = _symmetry().permute(TENSORS, {"h": order})
    assert all(torch.equal(permuted[name], torch.stack([t, -t])) for name, t in single.items())


HEADS = {"qkv": "((h > d) + (h > d) + (h > e)) in", "out": "in (h > e)", "slope": "h"}


def _heads() -> Symmetry:
    tensors = {"qkv": torch.randn(14, 3), "out": torch.randn(3, 6), "slope": torch.randn(2)}
    return Symmetry.spec(HEADS, tensors, ["in"], {"d": 2})


def test_nested_axes_are_listed_with_their_parents() -> None:
    assert str(_heads()).splitlines()[-2:] == ["free   h=2 d[h]=2 e[h]=3", "fixed  in=3"]
    assert dict(_heads().nested) == {"d": ("h",), "e": ("h",)}
    assert Symmetry.parse(str(_heads())) == _heads()
    assert _heads().restrict(["slope"]).nested == {}
    assert _heads().canonical().dims["out"] == ("a3", "(a0 > a2)")


def test_each_head_has_its_own_permutation() -> None:
    symmetry, params = _heads(), {"out": torch.arange(18.0).reshape(3, 6), "slope": torch.arange(2.0)}
    per_head = torch.tensor([[1, 0, 2], [2, 1, 0]])  # (head, e)
    permuted = symmetry.permute(params, {"h": torch.tensor([1, 0]), "e": per_head})
    blocks = params["out"].reshape(3, 2, 3)
    expected = torch.stack([blocks[:, 1][:, per_head[0]], blocks[:, 0][:, per_head[1]]], 1)
    assert torch.equal(permuted["out"].reshape(3, 2, 3), expected)
    assert permuted["slope"].tolist() == [1, 0]


def test_an_axis_may_be_nested_in_one_of_another_dimension() -> None:
    """The kernel of a grouped convolution: each group has its own input channels."""
    symmetry = Symmetry({"w": ("(g > o)", "i"), "b": ("(g > o)",), "v": ("(g > i)",)}, {"g": 2, "o": 1, "i": 3})
    assert symmetry.nested_across_dims == {"w"}
    params = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.arange(2.0), "v": torch.arange(6.0)}
    permuted = symmetry.permute(params, {"i": torch.tensor([[0, 1, 2], [2, 0, 1]]), "g": torch.tensor([1, 0])})
    assert permuted["w"].tolist() == [[3, 4, 5], [2, 0, 1]]
    assert permuted["v"].tolist() == [3, 4, 5, 2, 0, 1]
    batch = {name: torch.stack([t, -t]) for name, t in params.items()}
    again = symmetry.permute(batch, {"i": torch.tensor([[0, 1, 2], [2, 0, 1]]), "g": torch.tensor([1, 0])}, 1)
    assert torch.equal(again["w"][0], permuted["w"])
    last = symmetry.permute({name: torch.stack([t, -t], -1) for name, t in params.items()}, {"g": torch.tensor([1, 0])})
    assert last["w"][..., 1].tolist() == [[-3, -4, -5], [0, -1, -2]]


def test_index_of_a_product_varies_its_last_factor_fastest() -> None:
    symmetry = Symmetry({"w": ("(a b)",)}, {"a": 2, "b": 3})
    index = symmetry.index_of("(a b)", {"a": torch.tensor([1, 0]), "b": torch.tensor([2, 0, 1])})
    assert index.tolist() == [5, 3, 4, 2, 0, 1]


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "no_size": (lambda: Symmetry({"w": ("h",)}, {}), "expected a size for every axis"),
    "negative": (lambda: Symmetry({"w": ("h",)}, {"h": -1}), "expected sizes of at least 0"),
    "unused_fixed": (lambda: Symmetry({"w": ("h",)}, {"h": 1}, frozenset({"i"})), "do not; known"),
    "bad_name": (lambda: parse_dim("a b"), "expected one dimension"),
    "empty_product": (lambda: parse_dim("()"), "expected dimensions, an axis name"),
    "mixed_operators": (lambda: parse_dim("(a b + c)"), "expected dimensions"),
    "cycle": (lambda: Symmetry({"w": ("(a > b)",)}, {"a": 1, "b": 1}, nested={"a": ("b",)}), "nested in itself"),
    "unknown_nested": (lambda: Symmetry({"w": ("a",)}, {"a": 1}, nested={"a": ("b",)}), "do not; known"),
    "one_copy": (lambda: _heads().permute({}, {"d": torch.arange(2)}), r"of shape \(2, 2\)"),
    "no_parent": (lambda: _heads().index_of("d", {"d": torch.zeros(2, 2).long()}), "in which 'd' is nested"),
    "bad_brackets": (lambda: Symmetry.spec({"w": "(h"}, {"w": torch.ones(2)}), "expected dimensions, an axis name"),
    "rank": (lambda: Symmetry.spec({"w": "h i"}, {"w": torch.ones(2)}), "expected 2 dimensions"),
    "disagree": (
        lambda: Symmetry.spec({"w": "h h"}, {"w": torch.ones(2, 3)}),
        "expected 2 entries in h of 'w', as elsewhere, found 3",
    ),
    "unknown_sizes": (lambda: Symmetry.spec({"w": "(a b)"}, {"w": torch.ones(6)}), "cannot infer the sizes"),
    "not_divisible": (
        lambda: Symmetry.spec({"w": "a (a b)"}, {"w": torch.ones(2, 5)}),
        r"expected 4 entries in \(a b\) of",
    ),
    "bad_size": (lambda: Symmetry.parse("w h\nfree h=many"), "expected 'free axis=size"),
    "missing": (lambda: _symmetry().check({}), "missing"),
    "shape": (lambda: _symmetry().check({**TENSORS, "0.bias": torch.ones(4)}), "expected '0.bias' of shape"),
    "fixed_axis": (lambda: _symmetry().permute(TENSORS, {"in": torch.arange(2)}), "expected a free axis"),
    "not_a_permutation": (lambda: _symmetry().permute(TENSORS, {"h": torch.zeros(3).long()}), "expected a permutation"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_raises(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
