"""The walls of the tree: which package may import which, and what a command may import before it runs."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

OURS = {"convline", "models", "pipeline", "serving"}
FORBIDDEN = {
    "convline": (OURS - {"convline"}) | {"torch", "torchvision", "onnx", "onnxruntime"},
    "models": (OURS - {"models"}) | {"onnx", "onnxruntime", "mlflow"},
    "serving": {"pipeline", "models", "torch", "torchvision"},
    "pipeline": set(),
}
# the modules of a command's name, and what only they may import
STAGES = {
    *(
        "cli",
        "download",
        "preprocess",
        "check",
        "samples",
        "train",
        "evaluate",
        "watch",
        "export",
        "parity",
        "register",
    ),
    *("report", "compare", "sync"),
}


def imports_of(path: Path) -> list[ast.stmt]:
    """All import statements, those within functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def imported_modules(statements: Sequence[ast.stmt]) -> set[str]:
    """Dotted names: of `from a import b` a.b where that is a module of ours, else a."""
    names = set()
    for node in statements:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in below if (ROOT / f"{name.replace('.', '/')}.py").exists()}
            names |= modules if modules == below else {*modules, node.module}
    return names


def imported(path: Path) -> set[str]:
    """The packages that a file imports."""
    return {name.split(".")[0] for name in imported_modules(imports_of(path))}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    files = [path for path in sorted((ROOT / package).rglob("*.py")) if path != ROOT / "convline/__init__.py"]
    assert files
    wrong = {str(path.relative_to(ROOT)): found for path in files if (found := imported(path) & FORBIDDEN[package])}
    assert wrong == {}


def test_the_public_names_are_imported_when_first_used() -> None:
    code = (
        "import sys, convline; print(*sorted(set(sys.modules) & {'torch', 'numpy', 'onnxruntime', 'pipeline.train'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == ""


def test_the_folders_of_the_pipeline_import_no_stage() -> None:
    stages = {f"pipeline.{name}" for name in STAGES}
    assert all((ROOT / f"{name.replace('.', '/')}.py").exists() for name in stages)
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in sorted((ROOT / "pipeline").rglob("*.py"))
        if path.parent != ROOT / "pipeline" and (found := imported_modules(imports_of(path)) & stages)
    }
    assert wrong == {}


def test_no_imports_go_round_in_circles() -> None:
    """Imports within functions are left out: they run when all modules are there."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in FORBIDDEN
        for path in (ROOT / package).rglob("*.py")
    }
    graph = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        graph[module] = (imported_modules(at_top) & set(paths)) - {module}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", ["pipeline.train", "pipeline.export", "serving.classify", "serving.inspect"])
def test_only_what_needs_mlflow_imports_it(module: str) -> None:
    code = f"import sys, {module}; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_one_module_below_the_pipeline_knows_mlflow() -> None:
    packages = ("convline", "serving", "models")
    found = [path.name for name in packages for path in (ROOT / name).rglob("*.py") if "mlflow" in imported(path)]
    assert found == ["mlflow_client.py"]


@pytest.mark.parametrize("package", ["pipeline", "serving"])
def test_help_imports_nothing_heavy(package: str) -> None:
    """Instead of a timed test: what makes --help slow is known by name."""
    heavy = {"torch", "numpy", "mlflow", "onnx", "onnxruntime", "pydantic", "PIL", "sklearn"}
    code = f"""
import sys
from {package}.cli import app
try:
    app(["--help"])
except SystemExit:
    pass
print(",".join(sorted({heavy!r} & set(sys.modules))))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == ""


def test_every_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in FORBIDDEN
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == packages


def test_every_dependency_is_pinned_by_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *extras["mlflow"], *extras["dev"]]
    # onnxruntime without -gpu is for other platforms
    names = {re.split("[>=[]", requirement)[0] for requirement in wanted} - {"convline", "onnxruntime"}
    assert {name.replace("_", "-") for name in names} <= {name.replace("_", "-") for name in pinned}
