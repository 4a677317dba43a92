"""Reads the options of each network from its source code, without importing it: importing torch takes seconds, and a
typing error in a recipe should be found at once."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models import option_types


def keyword_options(module: str, *path: str) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function in models/<module>.py; `path` is its name, after its class's if it
    is a method. Their annotations may use models.option_types, typing and built-in types."""
    node: Any = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    for name in path:
        node = next(child for child in node.body if getattr(child, "name", None) == name)
    pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return {argument.arg: _parameter(argument, default) for argument, default in pairs}


def _parameter(argument: ast.arg, default: ast.expr | None) -> inspect.Parameter:
    assert argument.annotation is not None and default is not None, f"{argument.arg} lacks its type or its default"
    # eval is safe here: it is our own source
    annotation = eval(ast.unparse(argument.annotation), vars(typing) | vars(option_types))
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(argument.arg, kind, annotation=annotation, default=ast.literal_eval(default))


def torchvision_weights(network: str) -> list[str]:
    """The names of the pretrained weights that the installed torchvision offers for a classifier.

    Raises KeyError where torchvision has no classifier of this name.
    """
    return _torchvision_classifiers()[network]


@cache
def _torchvision_classifiers() -> dict[str, list[str]]:
    """The names of torchvision's classifiers, each with the names of its weights."""
    spec = find_spec("torchvision")
    assert spec is not None and spec.submodule_search_locations is not None
    classifiers: dict[str, list[str]] = {}
    for path in Path(spec.submodule_search_locations[0], "models").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        enums = {node.name: _members(node) for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and "register_model()" in map(ast.unparse, node.decorator_list):
                enum = re.search(r"weights: .*?(\w+_Weights)", ast.unparse(node.args))
                assert enum is not None
                classifiers[node.name] = enums[enum.group(1)]
    return classifiers


@cache
def timm_names() -> frozenset[str]:
    """The names of the networks that the installed timm registers."""
    # 0.1 s for 5 MB of source, which take seconds to parse
    return frozenset(name for text in _timm_sources() for name in re.findall(r"@register_model\s+def (\w+)\(", text))


def timm_weights(network: str) -> list[str]:
    """The names ("tags") of the pretrained weights that the installed timm lists for a network in its source; for a few
    families it computes them, so that none are found."""
    entry = re.compile(rf"""^\s*['"]{network}\.([\w.-]+)\*?['"]:\s""", re.MULTILINE)
    return sorted({tag for text in _timm_sources() for tag in entry.findall(text)} - {"untrained"})


def _timm_sources() -> Iterator[str]:
    spec = find_spec("timm")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0], "models")
    return (path.read_text(encoding="utf-8") for path in folder.glob("*.py"))


def _members(enum: ast.ClassDef) -> list[str]:
    """The members of an enumeration, without DEFAULT, which is an alias of one of them."""
    assigned = [ast.unparse(node.targets[0]) for node in enum.body if isinstance(node, ast.Assign)]
    return [name for name in assigned if name != "DEFAULT"]
