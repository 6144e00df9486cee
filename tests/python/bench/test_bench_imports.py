"""Packages of the benchmarks stand above one another, and their harness, which is in the wheel, knows none of them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
#: From the ground up; what stands in one line does not import one another.
ORDER = (("gpu", "cases", "studies", "reporting"), ("training", "tuning", "distributed"), ("run_gpu", "__main__"))
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "bench").rglob("*.py")), ids=lambda path: path.stem)
def test_benches_import_what_lies_below(path):
    parts = path.relative_to(ROOT / "bench").with_suffix("").parts
    if parts == ("__init__",):
        return
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "bench" and rest:
            other = rest.partition(".")[0]
            assert other == parts[0] or LEVEL[other] < LEVEL[parts[0]], f"{path} imports {name}, which stands above it"


def test_the_wheel_does_not_know_the_repository():
    for path in (ROOT / "python").rglob("*.py"):
        assert not any(name.partition(".")[0] == "bench" for name in imports(path)), path


def test_what_runs_without_the_package_imports_nothing_of_it():
    """run_gpu.py puts the package together: it is not there before."""
    for path in (ROOT / "bench" / "run_gpu.py", ROOT / "bench" / "__main__.py", *(ROOT / "bench" / "gpu").glob("*.py")):
        assert not any(name.partition(".")[0] in ("sparse24", "torch") for name in imports(path)), path
