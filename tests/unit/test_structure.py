"""Imports point one way, and the planner needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANNER_NEEDS = {"numpy", "scipy", "networkx", "safetensors", "tqdm"}
HEAVY = ["torch", "transformers", "deepspeed", "exflow"]


def modules_of(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path):
    """Names of all modules that a file imports, inside functions too, and whether at its top level."""
    tree = ast.parse(path.read_text())
    top_level = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top_level
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield str(node.module), id(node) in top_level


def is_within(name, package):
    return name == package or name.startswith(f"{package}.")


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("placement", ["exflow", "torch", "transformers"]),
        ("exflow/models", ["exflow.runtime", "exflow.offload", "exflow.commands", "exflow.cli"]),
        ("exflow/runtime", ["exflow.offload", "exflow.commands", "exflow.cli"]),
        ("exflow/offload", ["exflow.commands", "exflow.cli"]),
        ("exflow/commands", ["exflow.cli"]),
    ],
)
def test_imports_point_one_way(package, forbidden):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules_of(package)
        for name, _ in imports_of(path)
        if any(is_within(name, other) for other in forbidden)
    ]
    assert not wrong


def test_the_planner_imports_only_what_it_says_it_needs():
    allowed = PLANNER_NEEDS | {"numba", "placement"} | sys.stdlib_module_names
    wrong = []
    for path in modules_of("placement"):
        extra = {"typer"} if path.name == "cli.py" or path.parent.name == "commands" else set()
        for name, at_top in imports_of(path):
            if at_top and name.split(".")[0] not in allowed | extra:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_importing_the_whole_planner_loads_no_torch():
    names = [dotted(path) for path in modules_of("placement") if path.name != "__main__.py"]
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"sys.exit(' '.join(name for name in {HEAVY} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_ranks_asks_torch_distributed_who_we_are():
    asking = {"get_rank", "get_world_size", "is_initialized"}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} asks {node.attr}"
        for path in modules_of("exflow")
        if path != ROOT / "exflow/runtime/ranks.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in asking
    ]
    assert not wrong
