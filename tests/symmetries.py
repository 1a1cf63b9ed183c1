"""Small symmetries that have all that a symmetry can say."""

from nfn_optim.symmetry import Symmetry

SYMMETRIES = {
    "mlp": Symmetry(
        {"w0": ("h", "in"), "b0": ("h",), "w1": ("out", "h"), "b1": ("out",)},
        {"h": 4, "in": 3, "out": 2},
        frozenset({"in", "out"}),
    ),
    "conv, flatten, scalar": Symmetry(
        {"k": ("c", "in", "ky", "kx"), "w": ("h", "(c y x)"), "v": ("out", "h"), "scalar": ()},
        {"c": 3, "in": 2, "ky": 2, "kx": 2, "h": 4, "y": 2, "x": 1, "out": 2},
        frozenset({"in", "ky", "kx", "y", "x", "out"}),
    ),
    "reused, squared": Symmetry(
        {"w": ("h", "h"), "b": ("h",), "u": ("(h h)", "in"), "v": ("out", "h")},
        {"h": 3, "in": 2, "out": 2},
        frozenset({"in", "out"}),
    ),
    "heads, groups, sums": Symmetry(
        {
            "qkv": ("((h > d) + (h > d) + (h > e))", "(a + b)"),
            "out": ("(a + b)", "(h > e)"),
            "kernel": ("(h > o)", "d"),
            "v": ("(3 (a + b))",),
        },
        {"h": 2, "d": 3, "e": 2, "a": 2, "b": 1, "o": 2, "3": 3},
        frozenset({"3"}),
        {"d": ("h",)},
    ),
}
