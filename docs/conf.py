"""How `make docs` builds the documentation: Markdown pages, and the API reference from docstrings."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import nfn_optim  # noqa: E402 - from this checkout

project = "nfn-optim"
author = "the nfn-optim authors"
copyright = author
version = release = nfn_optim.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
highlight_language = "text"
default_role = "literal"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "nfn-optim"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {"navigation_with_keys": True}

ELSEWHERE = {  # pages of the repository that are included here under another name
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changelog.md",
    "../nfn_optim/pretrained/base.md": "card.md",
    "../nfn_optim/pretrained/base_1.md": "card_base_1.md",
    "../nfn_optim/pretrained/default_1.md": "card_default_1.md",
}
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+\.md)\)")
SECTION = re.compile(r"[A-Z]\w+( \w+)?:$")
CODE = re.compile(r"(`[^`\n]+`)")
MARKUP = re.compile(r"(?<!\\)([*|]|(?<=\w)_(?!\w))")


def as_rst(lines: list[str]) -> list[str]:
    """A docstring of this project as reStructuredText: `code` and indented formulas are literal, the rest is plain.

    Args:
        lines: Of the docstring, not indented.
    """
    found: list[str] = []
    literal: int | None = None  # indentation of the line before a literal block, while there is one
    in_section = False
    for number, line in enumerate(lines):
        depth = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and depth <= literal:
            literal = None
        if literal is not None or not line.strip():
            found.append(line)
            continue
        if depth == 0:
            in_section = bool(SECTION.match(line))
        begins = number == 0 or not lines[number - 1].strip()
        if begins and depth and not in_section and not line.lstrip().startswith(">>>"):
            literal = depth - 1
            found += ["::", "", line]
            continue
        if line.lstrip().startswith((">>>", "... ")) or (found and _is_output(lines, number)):
            found.append(line)
            continue
        parts = CODE.split(line)
        if not in_section or not re.match(r"\s+\*+\w+:", line):  # napoleon knows *args
            parts[::2] = [MARKUP.sub(r"\\\1", part) for part in parts[::2]]
        parts[1::2] = [f"`{part}`" for part in parts[1::2]]
        found.append("".join(parts))
    return found


def _is_output(lines: list[str], number: int) -> bool:
    """Whether a line is what a doctest before it prints."""
    before = lines[:number]
    while before and before[-1].strip():
        if before.pop().lstrip().startswith((">>>", "... ")):
            return True
    return False


def plain(_app: Any, _what: str, _name: str, _found: Any, _options: Any, lines: list[str]) -> None:
    """Called by autodoc for every docstring, before napoleon."""
    lines[:] = as_rst(lines)


def linked(_app: Any, docname: str, text: list[str]) -> None:
    """Called by Sphinx for every page: links out of `docs/` lead to the included page, or to the file as a download."""
    for path, page in ELSEWHERE.items():
        text[0] = text[0].replace(f"]({path}", f"]({page}")
    if "/" not in docname:
        text[0] = OUTSIDE.sub(r"{download}`\1 <\2>`", text[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", plain, priority=100)
    app.connect("source-read", linked)
