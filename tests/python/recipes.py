"""The code of the guide (docs/guide) and of the README, by section."""

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import torch
from convert_models import CountOps

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


def run(section: str) -> tuple[dict, CountOps]:
    """The variables that a recipe leaves, and how many sparse products it took."""
    with CountOps() as ops:
        return execute(sections()[section], {"__name__": "__main__"}), ops


def hide_gpu(request, monkeypatch) -> None:
    """Have recipes run on the CPU where there is a GPU too: sizes are small. Not in tests of NCCL."""
    if "nccl" not in getattr(request.node, "callspec", types.SimpleNamespace(params={})).params.values():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


#: Threads of gloo let go of a tensor some time after its collective was waited for, and need the interpreter for it.
#: Where that is ending they cannot, and abort the process ("terminate called without an active exception"). Groups that
#: FSDP2 or functional collectives have used outlive `destroy_process_group`, which otherwise waits for these threads.
LEAVE = """
import os, sys
if not on_gpu:
    sys.stdout.flush()
    os._exit(0)
"""


def torchrun(section, tmp_path, processes):
    """What a recipe prints."""
    script = tmp_path / "recipe.py"
    script.write_text("\n".join([block.code for block in sections()[section]] + [LEAVE]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
