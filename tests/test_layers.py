"""The packages are built in layers: what a file imports, at its top or inside a function, lies below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_ORDER = {
    "dpo_kernels": """
        pairs losses head adapters chunks linear_logps.tile_filter linear_logps.stats kernels native native_passes
        native_products dispatch linear_logps linear_dpo preference kto description hf_config __init__ hf integrations
        tuning
    """,
    "engine": """
        __init__ errors endings distributed mesh stop plain_json durable shared_folders paths hub run_folder seeds
        arrow digits config data packing model
        inputs memory_errors reference train forecast report check precompute evaluate sweep merge push api doctor demo
        commands cli
        __main__
    """,
}
LAYERS = {package: names.split() for package, names in _ORDER.items()}
"""Files and folders of each package, every one above those that it may import."""
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_KERNEL = 410, 65, 70
"""Lines; of functions without their docstrings. A kernel is one function."""


def sources() -> Iterator[tuple[str, Path]]:
    """Every module's dotted name and its file."""
    for package in LAYERS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


FILES = dict(sources())
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported(name: str) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it that is written."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{origin}.{alias.name}" for alias in node.names]
            yield from (module if module in FILES else origin for module in found)


GRAPH = {name: {module for module in imported(name) if module in FILES} - {name} for name in FILES}


def layer(name: str) -> tuple[int, int]:
    """Where a module stands: first the layers of the ops, then those of the engine; -1 where it is not listed."""
    package, _, rest = name.partition(".")
    names = LAYERS[package]
    inside = [place for place, listed in enumerate(names) if f"{rest or '__init__'}.".startswith(f"{listed}.")]
    return list(LAYERS).index(package), min(inside, default=-1)


def test_every_module_has_a_layer_and_every_layer_a_module():
    assert [name for name in FILES if layer(name)[1] < 0] == []
    assert {layer(name) for name in FILES} == {(i, k) for i, ns in enumerate(LAYERS.values()) for k in range(len(ns))}


@pytest.mark.parametrize("package", LAYERS)
def test_nothing_is_imported_from_a_higher_layer(package):
    upward = [f"{a} -> {b}" for a in GRAPH if a.split(".")[0] == package for b in GRAPH[a] if layer(b) > layer(a)]
    assert upward == []


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_the_ops_know_nothing_of_the_engine():
    for name in FILES:
        if name.split(".")[0] == "dpo_kernels":
            assert not {"engine", "dpo_engine"} & {module.split(".")[0] for module in imported(name)}, name


def test_files_and_functions_can_be_read_at_once():
    long = [f"{path.relative_to(ROOT)}" for path in FILES.values() if len(path.read_text().splitlines()) > LONGEST_FILE]
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                first = body[0].lineno if body else node.lineno
                lines = node.end_lineno - first + 1
                kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                if lines > (LONGEST_KERNEL if kernel else LONGEST_FUNCTION):
                    long.append(f"{name}.{node.name}: {lines} lines")
    assert long == []
