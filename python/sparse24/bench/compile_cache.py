"""What torch.compile has made, as one file: a later call, even on another machine of that kind, loads it."""

from __future__ import annotations

from pathlib import Path

import torch


def load(path: Path | None) -> None:
    """Fill torch's caches from the file, if there is one."""
    if path and path.exists():
        torch.compiler.load_cache_artifacts(path.read_bytes())


def save(path: Path | None) -> None:
    """Write what this process compiled or took from its caches, if it did."""
    artifacts = torch.compiler.save_cache_artifacts() if path else None
    if path and artifacts:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(artifacts[0])
