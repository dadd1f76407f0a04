"""The rules of the house, read from the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pipermoe

ROOT = Path(pipermoe.__file__).parent
FLOORS = [
    {"__main__"},
    {"cli"},
    {"report"},
    {"validate"},
    {"planner", "export", "dryrun", "training"},
    {"runtime"},
    {"resources", "data"},
    {"measure"},
    {"modules"},
    {"schedule", "exchange", "layout", "processes"},
    {"specs", "catalogue"},
]
HEIGHT = {name: len(FLOORS) - floor for floor, names in enumerate(FLOORS) for name in names}
MAY_IMPORT_TORCH = ("modules/", "runtime/", "training/", "dryrun/", "measure/", "exchange/executor/")


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down_the_house(file):
    here = file.removesuffix(".py").split("/")[0]
    for name in imports_of(ROOT / file):
        parts = name.split(".")
        if parts[0] == "pipermoe" and len(parts) > 1 and here in HEIGHT:
            there = parts[1]
            assert there == here or HEIGHT[there] < HEIGHT[here], f"{file} imports {name}"


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith(MAY_IMPORT_TORCH)])
def test_torch_stays_in_the_runtime_and_the_measurements(file):
    assert not {name for name in imports_of(ROOT / file) if name.split(".")[0] == "torch"}


def test_every_package_has_a_floor():
    packages = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert packages <= set(HEIGHT)


@pytest.mark.parametrize("module", ["pipermoe", "pipermoe.cli", "pipermoe.planner", "pipermoe.report.plan"])
def test_importing_it_does_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
