"""The walls of the tree: which package may import which, and what a command may import before it runs."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

FORBIDDEN = {
    "models": {"pipeline", "serving", "onnx", "onnxruntime", "mlflow"},
    "serving": {"pipeline", "models", "torch", "torchvision"},
    "pipeline": set(),
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): found for path in files if (found := imported(path) & FORBIDDEN[package])}
    assert wrong == {}


@pytest.mark.parametrize("module", ["pipeline.train", "pipeline.export", "serving.classify", "serving.inspect"])
def test_only_what_needs_mlflow_imports_it(module: str) -> None:
    code = f"import sys, {module}; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_one_module_of_serving_knows_mlflow() -> None:
    found = [path.name for path in (ROOT / "serving").rglob("*.py") if "mlflow" in imported(path)]
    assert found == ["registry.py"]


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
    names = {requirement.split(">")[0].split("[")[0] for requirement in wanted} - {"convline", "onnxruntime"}
    assert {name.replace("_", "-") for name in names} <= {name.replace("_", "-") for name in pinned}
