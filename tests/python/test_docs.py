"""The documentation: it builds without a warning, and names what exists."""

import ast
import re
from pathlib import Path

import pytest

import sparse24

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"


@pytest.mark.filterwarnings("ignore")  # of Sphinx and its extensions
def test_documentation_builds(tmp_path):
    """Every public name has an entry in the reference."""
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    from sphinx.cmd.build import main

    assert (
        main(["-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path)]) == 0
    )
    pages = "".join(path.read_text() for path in (tmp_path / "api").glob("*.html"))
    documented = set(re.findall(r'id="(sparse24\.[\w.]+)"', pages))
    public = {f"sparse24.{name}" for name in sparse24.__all__} - {"sparse24.nn", "sparse24.__version__"}
    assert not public - documented
    assert "sparse24.nn.ReLU2MLP.quantize_" in documented


def test_tests_that_are_named_exist():
    text = (DOCS / "compatibility.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    trees = [ast.parse(path.read_text()) for path in HERE.glob("test_*.py")]
    defined = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert len(named) > 25 and not named - defined
    rows = [line for line in text.splitlines() if "✓" in line]
    assert all(re.search(r"`test_\w+` \|$", row) for row in rows)
