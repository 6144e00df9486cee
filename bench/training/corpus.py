"""Real text without a download: the Python sources of the running environment, as tokens.

The `.py` files of the standard library and of site-packages, without exact duplicates, in an order that depends on
their relative paths only. One file in 32 is held out, chosen by a hash of its path: no file is in both parts.

    python -m bench corpus --out corpus.pt.xz --tokens 50003968 --folder SITE_PACKAGES ...

keeps the tokens in a file, for a machine that has less text or that many runs share.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import lzma
import sysconfig
from collections.abc import Iterator, Sequence
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


def read(
    tokens: int,
    held_out_tokens: int,
    vocabulary: int,
    *,
    stdlib_only: bool = False,
    folders: Sequence[Path] = (),
) -> Corpus:
    """About `tokens` tokens to train on (fewer where the machine has less text) and `held_out_tokens` to judge by.

    `folders` are read after the machine's own; of files with one relative path the first is taken.

    `vocabulary` 256 takes bytes as they are; a larger one is a byte-pair encoding, learned from the training part by
    the package `tokenizers`.
    """
    # Python source has about four bytes to a token of a vocabulary of this kind; bytes_per_token says what it was.
    wanted = [count * (1 if vocabulary == BYTES else 5) for count in (tokens, held_out_tokens)]
    parts: list[list[bytes]] = [[], []]
    sizes = [0, 0]
    for path, text in _files(stdlib_only, folders):
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


def write(corpus: Corpus, path: Path) -> None:
    """Keep the tokens in a file, compressed where its name ends so."""
    fields = dataclasses.asdict(corpus)
    fields |= {name: fields[name].to(torch.uint16) for name in ("train", "held_out")}
    with lzma.open(path, "wb") if path.suffix == ".xz" else path.open("wb") as file:
        torch.save(fields, file)


def load(path: Path) -> Corpus:
    """Read what `write` has written."""
    with lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb") as file:
        fields = torch.load(file, weights_only=True)
    fields |= {name: fields[name].to(torch.int32) for name in ("train", "held_out")}
    return Corpus(**fields)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--held-out", type=int, default=256 * 1025)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--folder", type=Path, action="append", default=[], help="with text beside the machine's own")
    args = parser.parse_args(argv)
    corpus = read(args.tokens, args.held_out, args.vocabulary, folders=args.folder)
    write(corpus, args.out)
    print(
        f"{args.out}: {corpus.train.numel():,} tokens of {corpus.files:,} files, {corpus.bytes_per_token} bytes each; "
        f"digest {corpus.digest}"
    )
    return 0


def _files(stdlib_only: bool, folders: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Relative path and content of each file, shuffled by a hash of the path."""
    own = sysconfig.get_paths()
    roots = [own["stdlib"]] if stdlib_only else [own["stdlib"], own["purelib"], own["platlib"], *folders]
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
        tokens = []
        for i in range(0, len(parts), 256):  # what is encoded takes a hundred bytes a token
            encoded = tokenizer.encode_batch_fast([part.decode(errors="replace") for part in parts[i : i + 256]])
            tokens += [torch.tensor([*one.ids, END], dtype=torch.int32) for one in encoded]
        return torch.cat(tokens)

    return encode
