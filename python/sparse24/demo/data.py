"""Text that is already on the machine, as bytes."""

import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: Bytes that are read at most: enough for a minute of training, little enough to be read in an instant.
MAX_BYTES = 4_000_000
_HELD_OUT_SHARE = 0.1
_SUFFIXES = {".py", ".txt", ".md", ".rst"}
# Test suites are a third of the library and are mostly tables; installed packages are not part of it.
_SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}


@dataclass(frozen=True)
class Corpus:
    """uint8 tensors: what to train on, and the end of the text to judge on."""

    train: Tensor
    held_out: Tensor
    files: int
    source: str


def read_corpus(paths: Sequence[Path], seed: int, window: int) -> Corpus:
    """Read files in an order that depends on the seed only, up to `MAX_BYTES`.

    Parameters
    ----------
    paths : sequence of Path
        Files, or folders to search for text files. Empty: sources and documents of the Python standard library.
    seed : int
        Of the order of the files.
    window : int
        Bytes that both parts must have at least.
    """
    roots = list(paths) or [Path(sysconfig.get_paths()["stdlib"])]
    files = sorted({file for root in roots for file in _text_files(root)})
    random.Random(seed).shuffle(files)

    text = bytearray()
    used = 0
    for file in files:
        if len(text) >= MAX_BYTES:
            break
        with file.open("rb") as stream:
            text += stream.read(MAX_BYTES - len(text))
        used += 1

    split = len(text) - int(len(text) * _HELD_OUT_SHARE)
    source = ", ".join(str(root) for root in paths) or "the Python standard library"
    if min(split, len(text) - split) < window:
        needed = int(window / _HELD_OUT_SHARE) + 1
        raise RuntimeError(
            f"sparse24.demo: expected --text to have at least {needed} bytes, got {len(text)} in {source}"
        )
    data = torch.frombuffer(text, dtype=torch.uint8)
    return Corpus(data[:split], data[split:], used, source)


def random_windows(data: Tensor, count: int, window: int, generator: torch.Generator) -> Tensor:
    """`count` stretches of `window` bytes at random places: int64 [count, window]."""
    starts = torch.randint(data.numel() - window + 1, (count,), generator=generator)
    return _windows(data, starts, window)


def even_windows(data: Tensor, count: int, window: int) -> Tensor:
    """As many as fit, at most `count`, spread evenly and apart: int64 [count, window]."""
    count = min(count, data.numel() // window)
    starts = torch.arange(count) * (data.numel() // count)
    return _windows(data, starts, window)


def _windows(data: Tensor, starts: Tensor, window: int) -> Tensor:
    return data[starts[:, None] + torch.arange(window)].long()


def _text_files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    if not root.is_dir():
        raise RuntimeError(f"sparse24.demo: expected text to be a file or a folder, got {root}")
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if Path(name).suffix in _SUFFIXES)
