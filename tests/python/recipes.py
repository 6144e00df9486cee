"""The code of the guide (docs/guide) and of the README, by section."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GUIDE, README = ROOT / "docs" / "guide", ROOT / "README.md"


class Block(NamedTuple):
    document: Path
    line: int  # that its code starts at
    code: str


def sections(*documents: Path) -> dict[str, list[Block]]:
    """Headings, and the Python blocks below each. Without an argument: of all pages of the guide."""
    found: dict[str, list[Block]] = {}
    for document in documents or sorted(GUIDE.glob("*.md")):
        text, blocks = document.read_text(), None
        for match in re.finditer(
            r"^##? (?P<heading>[^\n]+)$|^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", text, re.MULTILINE | re.DOTALL
        ):
            if match["heading"]:
                assert match["heading"] not in found, f"{document}: two sections {match['heading']}"
                blocks = found.setdefault(match["heading"], [])
            elif match["language"] == "python":
                line = text.count("\n", 0, match.start("code")) + 1
                blocks.append(Block(document, line, match["code"]))
    return {heading: blocks for heading, blocks in found.items() if blocks}


def execute(blocks: list[Block], namespace: dict) -> dict:
    """Run blocks one after the other; tracebacks show the lines of their document."""
    for document, line, code in blocks:
        exec(compile("\n" * (line - 1) + code, document, "exec"), namespace)
    return namespace
