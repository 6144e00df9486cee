"""The rooms of the house: which folder may include which, and that nothing runs in a circle."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

#: The folders with kernels or host code. A folder may include itself and those of the lines above its own; folders of
#: one line do not see each other.
ORDER = {
    "cuda": [
        ["common"],
        ["sparsity"],
        ["elementwise", "few_tokens", "gemm/sm90/schedulers", "gemm/sm90/epilogues"],
        ["gemm", "gemm/sm90/mainloops"],
        ["gemm/sm90/kernels"],
        ["gemm/sm90/ops"],
    ],
    "cpp": [
        ["include/sparse24"],
        ["core"],
        ["heuristics"],
        ["reference"],
        ["torch", "pybind"],
    ],
}
#: Where the headers of other projects may be included, by how their names begin.
FOREIGN = {"cutlass/": "cuda/", "cute/": "cuda/", "torch/": "cpp/torch/", "pybind11/": "cpp/pybind/"}
#: How long a file of the product or of the tests may be.
MOST_LINES = 400
SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".def", ".inc", ".in"}

FILES = sorted(path for top in ORDER for path in (ROOT / top).rglob("*") if path.suffix in SUFFIXES)


def includes(path: Path) -> list[Path]:
    """The files of this repository that a file includes."""
    found = []
    for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
        places = [path.parent / name, ROOT / "cuda" / name, ROOT / "cpp" / name, ROOT / "cpp/include" / name]
        assert any(map(Path.is_file, places)), f"{path.relative_to(ROOT)} includes {name}, which is no file"
        found.append(next(filter(Path.is_file, places)))
    return found


def tier(path: Path) -> tuple[str, str, int]:
    """The top folder of a file, its folder below that, and the line of ORDER where that stands."""
    top, *below, _ = path.relative_to(ROOT).parts
    folder = "/".join(below)
    lines = [line for line, folders in enumerate(ORDER[top]) if folder in folders]
    assert lines, f"{top}/{folder} has no place in ORDER"
    return top, folder, lines[0]


@pytest.mark.parametrize("top", ORDER)
def test_includes_run_one_way(top):
    upward = []
    for path in FILES:
        own, folder, line = tier(path)
        if own != top:
            continue
        for other in includes(path):
            top_of_other, other_folder, other_line = tier(other)
            if top_of_other != top:
                allowed = (top, other_folder) == ("cuda", "include/sparse24")  # the waist
            else:
                allowed = other_folder == folder or other_line < line
            if not allowed:
                upward.append(f"{path.relative_to(ROOT)} includes {other.relative_to(ROOT)}")
    assert not upward, "\n".join(upward)


def test_no_file_includes_itself():
    """Neither directly nor by way of others."""
    graph = {path: includes(path) for path in FILES}
    done: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, " -> ".join(str(p.relative_to(ROOT)) for p in (*above, path))
        if path not in done:
            for other in graph[path]:
                visit(other, (*above, path))
            done.add(path)

    for path in FILES:
        visit(path, ())


@pytest.mark.parametrize("prefix", FOREIGN)
def test_seams(prefix):
    """CUTLASS does not reach above the waist, nor torch below it."""
    users = {str(p.relative_to(ROOT)) for p in FILES if re.search(rf"^#include <{prefix}", p.read_text(), re.MULTILINE)}
    assert users, "the prefix names nothing"
    assert {user for user in users if not user.startswith(FOREIGN[prefix])} == set()


def test_files_are_short():
    sources = SUFFIXES | {".py", ".pyi"}
    tops = ("cuda", "cpp", "python", "tests", "bench")
    files = [path for top in tops for path in (ROOT / top).rglob("*") if path.suffix in sources]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}
