"""The normalised source of a function and of everything that it uses from its own package.

Cached runs are keyed by this text. A change to a function, class or constant below a task changes the task's key and no
other; changes to comments, docstrings and line breaks do not.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any


def source_text(function: Callable[..., Any]) -> str:
    """The source of a function or class with its dependencies.

    Args:
        function: A function or class defined at the top level of a module.

    Returns:
        The normalised source of everything that it refers to, by module and name.

    Example:
        >>> print(source_text(_is_in))
        meta_train.evaluation.source_text._is_in = def _is_in(package: str, value: Any) -> bool:
            return (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__.split('.')[0] == package
    """
    sources: dict[str, str] = {}
    _collect(function, function.__module__.split(".")[0], sources)
    return "\n".join(f"{name} = {sources[name]}" for name in sorted(sources))


def _collect(function: Any, package: str, sources: dict[str, str]) -> None:
    """Add the source of a function and of its dependencies."""
    function = inspect.unwrap(function)
    name = f"{function.__module__}.{function.__qualname__}"
    if name in sources:
        return
    tree = _without_docstrings(ast.parse(textwrap.dedent(inspect.getsource(function))))
    sources[name] = ast.unparse(tree)
    scope: Any = sys.modules[function.__module__]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            owner, label = scope, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):  # module.function
            owner, label = getattr(scope, node.value.id, None), node.attr
        else:
            continue
        value = getattr(owner, label, None) if isinstance(owner, ModuleType) else None
        if isinstance(value, bool | int | float | str | tuple):
            sources[f"{owner.__name__}.{label}"] = repr(value)
        elif callable(value) and _is_in(package, inspect.unwrap(value)):
            _collect(value, package, sources)


def _is_in(package: str, value: Any) -> bool:
    """Whether a value is a function or class defined in a package."""
    return (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__.split(".")[0] == package


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
