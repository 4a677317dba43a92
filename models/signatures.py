"""What networks may be told, read from their source: importing it takes torch, and a typing error should not."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models import bounds


def keyword_options(module: str, *path: str) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function of models/<module>.py, by the names that lead to it. Their annotations
    are of models.bounds, typing or built in."""
    found: Any = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    for name in path:
        found = next(node for node in found.body if getattr(node, "name", None) == name)
    pairs = zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True)
    return {argument.arg: _parameter(argument, default) for argument, default in pairs}


def _parameter(argument: ast.arg, default: ast.expr | None) -> inspect.Parameter:
    assert argument.annotation is not None and default is not None, f"{argument.arg} lacks its type or its default"
    annotation = eval(ast.unparse(argument.annotation), vars(typing) | vars(bounds))  # our own source
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(argument.arg, kind, annotation=annotation, default=ast.literal_eval(default))


def torchvision_weights(network: str) -> list[str]:
    """The names of the weights that the installed torchvision has for a classifier. Raises KeyError where it has none
    of this name."""
    return _torchvision()[network]


@cache
def _torchvision() -> dict[str, list[str]]:
    """Its classifiers, each with the names of its weights."""
    spec = find_spec("torchvision")
    assert spec is not None and spec.submodule_search_locations is not None
    networks: dict[str, list[str]] = {}
    for path in Path(spec.submodule_search_locations[0], "models").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        enums = {node.name: _members(node) for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and "@register_model()" in map(_decorator, node.decorator_list):
                enum = re.search(r"weights: .*?(\w+_Weights)", ast.unparse(node.args))
                assert enum is not None
                networks[node.name] = enums[enum.group(1)]
    return networks


def _decorator(node: ast.expr) -> str:
    return f"@{ast.unparse(node)}"


def _members(enum: ast.ClassDef) -> list[str]:
    """Of an enumeration; DEFAULT is another name of one of them."""
    assigned = [ast.unparse(node.targets[0]) for node in enum.body if isinstance(node, ast.Assign)]
    return [name for name in assigned if name != "DEFAULT"]
