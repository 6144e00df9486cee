"""The code of docs/recipes.md and of the README, by section."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES, README = ROOT / "docs" / "recipes.md", ROOT / "README.md"


def sections(document: Path = RECIPES) -> dict[str, list[tuple[int, str]]]:
    """Headings, and the Python blocks below each: the line that a block starts at, and its code."""
    text = document.read_text()
    found: dict[str, list[tuple[int, str]]] = {}
    for match in re.finditer(
        r"^## (?P<heading>[^\n]+)$|^```python\n(?P<code>.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        if match["heading"]:
            blocks = found.setdefault(match["heading"], [])
        else:
            blocks.append((text.count("\n", 0, match.start("code")) + 1, match["code"]))
    return found


def execute(blocks, namespace: dict, document: Path = RECIPES) -> dict:
    """Run blocks one after the other; tracebacks show the lines of the document."""
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, document, "exec"), namespace)
    return namespace
