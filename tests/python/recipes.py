"""The code of docs/recipes.md, by section."""

import re
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "docs" / "recipes.md"


def sections() -> dict[str, list[tuple[int, str]]]:
    """Headings, and the Python blocks below each: the line that a block starts at, and its code."""
    text = RECIPES.read_text()
    found: dict[str, list[tuple[int, str]]] = {}
    for match in re.finditer(
        r"^## (?P<heading>[^\n]+)$|^```python\n(?P<code>.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        if match["heading"]:
            blocks = found.setdefault(match["heading"], [])
        else:
            blocks.append((text.count("\n", 0, match.start("code")) + 1, match["code"]))
    return found


def execute(blocks, namespace: dict) -> dict:
    """Run blocks one after the other; tracebacks show the lines of the document."""
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, RECIPES, "exec"), namespace)
    return namespace
