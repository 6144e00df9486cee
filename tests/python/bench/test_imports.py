"""Packages of python/sparse24 stand above one another: what is imported lies below, and nothing goes in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3] / "python" / "sparse24"

#: From the ground up. What stands in one line does not import one another; a package imports its own modules.
ORDER = (
    ("_C",),
    ("errors",),
    ("_library", "_options", "_optimizer_steps", "_symbolic", "_autocast", "env", "terminal"),
    ("format",),
    ("recipe",),
    ("ops",),
    ("mlp",),
    ("experts",),
    ("nn",),
    ("convert", "schedule"),
    ("weight_pruning", "float8_gather"),
    ("distributed",),
    ("analyze",),
    ("linear", "training", "_convert_forward", "callbacks"),  # older names, collections, loops of others
    ("sparse24",),  # the front door, sparse24/__init__.py
    ("demo", "bench", "vllm", "layers"),  # layers: for the package kernels
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
#: An import inside a function that is followed by this comment is for what few need, and is heavy or optional.
LAZY = "# lazy"


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("sparse24", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found | {"sparse24._C": ROOT / "_C.pyi"}


MODULES = modules()


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Name the modules of the package that a module imports, wherever in its text, and the lines."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and LAZY in lines[node.end_lineno - 1]:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} is a relative import"
            if node.module.partition(".")[0] == "sparse24":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole in MODULES else node.module, node.lineno


GRAPH = {name: sorted(set(imports(name, path))) for name, path in MODULES.items()}


def part_of(module: str) -> str:
    """Name the package that a module belongs to."""
    return (module.split(".") + ["sparse24"])[1]


def test_every_package_has_its_place():
    missing = {part_of(name) for name in MODULES} - LEVEL.keys()
    assert not missing, f"{missing} have no place in ORDER"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    for imported, line in GRAPH[name]:
        own, other = part_of(name), part_of(imported)
        assert own == other or LEVEL[other] < LEVEL[own], f"{name}:{line} imports {imported}, which stands above it"


def test_no_module_is_in_a_circle():
    """Within a package too. A package's __init__ imports its modules, so these do not import from it."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for imported, _ in GRAPH[name]:
                visit(imported, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_no_module_is_long():
    """400 lines: a file has one idea."""
    for name, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 400, name


def test_the_graph_is_seen():
    """Of imports of every kind."""
    assert ("sparse24.errors", "sparse24.ops") not in GRAPH
    imported = {name for name, _ in GRAPH["sparse24.cli"]}
    commands = {f"sparse24.{package}.command" for package in ("analyze", "bench", "demo")}
    assert imported == {"sparse24.env", *commands}
    assert "sparse24.bench.drawing" in {name for name, _ in GRAPH["sparse24.bench.command"]}  # inside of a function
    assert "sparse24.mlp.checks" in {name for name, _ in GRAPH["sparse24.mlp"]}
    assert "sparse24._C" in {name for name, _ in GRAPH["sparse24._library"]}
