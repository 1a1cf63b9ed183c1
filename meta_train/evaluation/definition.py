"""The text of a function and of all that it uses from its own package: a name for what it does.

Cached results are kept under this text. A function, class or constant that is changed anywhere below a task changes the
task's definition and nothing else's; comments, docstrings and line breaks change nothing.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any


def definition_of(thing: Callable[..., Any]) -> str:
    """The definition of a function or class.

    Args:
        thing: One that was defined at the top of a module.

    Returns:
        The normalised source of everything that it refers to, by module and name.

    Example:
        >>> print(definition_of(_is_of))
        meta_train.evaluation.definition._is_of = def _is_of(package: str, thing: Any) -> bool:
            return (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__.split('.')[0] == package
    """
    found: dict[str, str] = {}
    _collect(thing, thing.__module__.split(".")[0], found)
    return "\n".join(f"{name} = {found[name]}" for name in sorted(found))


def _collect(thing: Any, package: str, found: dict[str, str]) -> None:
    """Add the definition of `thing` and what it uses."""
    thing = inspect.unwrap(thing)
    name = f"{thing.__module__}.{thing.__qualname__}"
    if name in found:
        return
    tree = _without_docstrings(ast.parse(textwrap.dedent(inspect.getsource(thing))))
    found[name] = ast.unparse(tree)
    scope: Any = sys.modules[thing.__module__]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            owner, label = scope, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):  # module.function
            owner, label = getattr(scope, node.value.id, None), node.attr
        else:
            continue
        value = getattr(owner, label, None) if isinstance(owner, ModuleType) else None
        if isinstance(value, bool | int | float | str | tuple):
            found[f"{owner.__name__}.{label}"] = repr(value)
        elif callable(value) and _is_of(package, inspect.unwrap(value)):
            _collect(value, package, found)


def _is_of(package: str, thing: Any) -> bool:
    """Whether something is a function or class that a package defines."""
    return (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__.split(".")[0] == package


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
