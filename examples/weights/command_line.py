"""What the commands of the experiments have in common: options, defaults by `--quick`, and the files they write."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from nfn_optim.populations import Report

SEEDS = 3
"""Of every method."""

mpl.use("Agg")


def parser_of(doc: str | None, quick: str, images: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with the options that all experiments have.

    Args:
        doc: Docstring of the experiment.
        quick: Help of `--quick`.
        images: Default of `--images`; None if it depends on `--quick`.
        out: Name of the output folder in `runs`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--images", default=images, help="digits, mnist5k, or a file NAME.npz in --data")
    parser.add_argument("--data", type=Path, default=None, help="folder of NAME.npz")
    parser.add_argument("--populations", type=Path, default=Path("runs/populations"), help="where networks are kept")
    parser.add_argument("--out", type=Path, default=Path("runs") / out, help="output folder")
    return parser


def add_numbers(parser: argparse.ArgumentParser, **helps: str) -> None:
    """Options for whole numbers whose defaults depend on `--quick`, by name."""
    for name, text in helps.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help=text)


def parsed(parser: argparse.ArgumentParser, *, quick: Mapping[str, Any], full: Mapping[str, Any]) -> argparse.Namespace:
    """Arguments of the command, with the defaults of `--quick` or of the whole experiment where none is given."""
    given = parser.parse_args()
    for name, value in (quick if given.quick else full).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def write(report: Report, name: str, given: argparse.Namespace, figures: Mapping[str, Figure]) -> None:
    """Write the report and its figures, and print the table.

    Args:
        report: The report.
        name: Start of the names of files.
        given: Arguments of the command.
        figures: By the end of the name.
    """
    given.out.mkdir(parents=True, exist_ok=True)
    for end, figure in figures.items():
        figure.savefig(given.out / f"{name}{end}.png", dpi=110)
        plt.close(figure)
    report.write(given.out, name, vars(given))
    print(report)
    print(f"wrote {given.out}/{name}{', '.join(['.json', '.md', *(f'{end}.png' for end in figures)])}")
