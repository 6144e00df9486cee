"""Real text without a download: the Python sources of the running environment, as tokens.

The `.py` files of the standard library and of site-packages, without exact duplicates, in an order that depends on
their relative paths only. One file in 32 is held out, chosen by a hash of its path: no file is in both parts.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

BYTES = 256
#: Ends a file: byte 0 does not occur in source text; in a trained vocabulary it is the first entry.
END = 0
HELD_OUT_ONE_IN = 32
#: How much text teaches the vocabulary: more changes it little and costs seconds.
VOCABULARY_BYTES = 12_000_000
# Generated tables, and files too long to be written by a person.
MAX_FILE_BYTES = 400_000


@dataclass(frozen=True)
class Corpus:
    """int32 tokens of both parts, and what identifies them: equal digests are equal tokens."""

    train: torch.Tensor
    held_out: torch.Tensor
    vocabulary: int
    files: int
    bytes_per_token: float
    digest: str


def read(tokens: int, held_out_tokens: int, vocabulary: int, *, stdlib_only: bool = False) -> Corpus:
    """About `tokens` tokens to train on (fewer where the machine has less text) and `held_out_tokens` to judge by.

    `vocabulary` 256 takes bytes as they are; a larger one is a byte-pair encoding, learned from the training part by
    the package `tokenizers`.
    """
    # Python source has about four bytes to a token of a vocabulary of this kind; bytes_per_token says what it was.
    wanted = [count * (1 if vocabulary == BYTES else 5) for count in (tokens, held_out_tokens)]
    parts: list[list[bytes]] = [[], []]
    sizes = [0, 0]
    for path, text in _files(stdlib_only):
        part = int(_digest(path.encode(), b"split")[:8], 16) % HELD_OUT_ONE_IN == 0
        if sizes[part] < wanted[part]:
            parts[part].append(text)
            sizes[part] += len(text)
        elif sizes[not part] >= wanted[not part]:
            break
    encode = _bytes if vocabulary == BYTES else _byte_pairs(parts[0], vocabulary)
    train, held_out = (encode(part) for part in parts)
    ratio = sum(sizes) / (train.numel() + held_out.numel())
    train, held_out = train[:tokens], held_out[:held_out_tokens]
    digest = _digest(train.numpy().tobytes(), held_out.numpy().tobytes())[:16]
    return Corpus(train, held_out, vocabulary, sum(map(len, parts)), round(ratio, 3), digest)


def _files(stdlib_only: bool) -> Iterator[tuple[str, bytes]]:
    """Relative path and content of each file, shuffled by a hash of the path."""
    folders = sysconfig.get_paths()
    roots = [folders["stdlib"]] if stdlib_only else [folders["stdlib"], folders["purelib"], folders["platlib"]]
    found: dict[str, Path] = {}
    for root in map(Path, dict.fromkeys(roots)):
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            # site-packages may lie inside the standard library's folder: found there, its names would differ.
            if "site-packages" not in relative.parts and "dist-packages" not in relative.parts:
                found.setdefault(relative.as_posix(), path)
    seen = set()
    for name in sorted(found, key=lambda name: _digest(name.encode())):
        try:
            text = found[name].read_bytes()
        except OSError:
            continue
        content = _digest(text)
        if 0 < len(text) <= MAX_FILE_BYTES and b"\0" not in text and content not in seen:
            seen.add(content)
            yield name, text


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _bytes(texts: list[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"\0".join(texts) + b"\0"), dtype=torch.uint8).to(torch.int32)


def _byte_pairs(texts: list[bytes], vocabulary: int):
    """A function that encodes files with a vocabulary learned from the first of `texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    sample, size = [], 0
    for text in texts:
        if size >= VOCABULARY_BYTES:
            break
        sample.append(text.decode(errors="replace"))
        size += len(text)
    tokenizer.train_from_iterator(sample, trainer)

    def encode(parts: list[bytes]) -> torch.Tensor:
        encoded = tokenizer.encode_batch_fast([part.decode(errors="replace") for part in parts])
        return torch.cat([torch.tensor([*one.ids, END], dtype=torch.int32) for one in encoded])

    return encode
