"""The commit of this tree, for records."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def of_tree() -> str:
    """HEAD, with a "+" when the tree differs from it; "unknown" without git."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "") if head else "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
