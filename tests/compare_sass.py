"""Compare the machine code of two builds, kernel by kernel: `compare_sass.py OLD NEW`.

A change that only moves or renames must leave every instruction as it was. Kernels are matched by their code, not by
their names, within the objects of one name first and among all others then. Needs cuobjdump and nvdisasm.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

_FUNCTION = re.compile(r"\s*Function : (\S+)")
#: An instruction, or the second half of its encoding, which holds stalls and barriers.
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+/\* (0x[0-9a-f]{16}) \*/")
_ENCODING = re.compile(r"\s*/\* (0x[0-9a-f]{16}) \*/")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One function of an object: its instructions as text and the digest of their encodings."""

    object: str
    name: str
    text: tuple[str, ...]
    digest: str

    def opcodes(self) -> collections.Counter:
        """Count the instructions by opcode, predicates left out."""
        return collections.Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in self.text)


def kernels_of(listing: str, name: str) -> list[Kernel]:
    """Read what `cuobjdump -sass` prints of the object `name`."""
    found = []
    for part in re.split(r"(?m)^(?=[ \t]*Function : )", listing)[1:]:
        lines = part.splitlines()
        symbol, text, encoding = _FUNCTION.match(lines[0])[1], [], hashlib.sha256()
        for line in lines[1:]:
            if match := _INSTRUCTION.match(line):
                text.append(match[1])
                encoding.update(match[2].encode())
            elif match := _ENCODING.match(line):
                encoding.update(match[1].encode())
        found.append(Kernel(name, symbol, tuple(text), encoding.hexdigest()))
    return found


def objects_of(path: pathlib.Path, pattern: str) -> dict[str, pathlib.Path]:
    """Find the CUDA objects below a folder by name, or the one file."""
    files = sorted(path.rglob("*.cu.o")) if path.is_dir() else [path]
    return {file.name: file for file in files if re.search(pattern, file.name)}


def disassemble(files: dict[str, pathlib.Path], cuobjdump: str) -> list[Kernel]:
    """Read the kernels of all objects; those without device code have none."""

    def one(item):
        name, file = item
        run = subprocess.run([cuobjdump, "-sass", str(file)], capture_output=True, text=True, errors="replace")
        return kernels_of(run.stdout, name)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for kernels in pool.map(one, files.items()) for kernel in kernels]


def match(old: list[Kernel], new: list[Kernel]) -> tuple[list[tuple[Kernel, Kernel]], list[Kernel], list[Kernel]]:
    """Pair the kernels with equal code; what is left of `old` and of `new` has changed, gone or come."""
    pairs, rest = [], new
    for key in (lambda k: (k.object, k.digest), lambda k: k.digest):
        by_key = collections.defaultdict(list)
        for kernel in old:
            by_key[key(kernel)].append(kernel)
        unmatched = []
        for kernel in rest:
            candidates = by_key[key(kernel)]
            pairs.append((candidates.pop(0), kernel)) if candidates else unmatched.append(kernel)
        matched = {id(before) for before, _ in pairs}
        old, rest = [kernel for kernel in old if id(kernel) not in matched], unmatched
    return pairs, old, rest


def differences(before: Kernel, after: Kernel, limit: int = 12) -> str:
    """Say in one line how two versions of a kernel differ."""
    change = after.opcodes()
    change.subtract(before.opcodes())
    parts = [f"{count:+d} {opcode}" for opcode, count in change.most_common() if count]
    counts = f"{len(before.text)} -> {len(after.text)} instructions"
    if not parts:
        places = sum(a != b for a, b in zip(before.text, after.text, strict=True))
        return f"{counts}, the same opcodes; {places} lines differ in order or operands"
    shown = parts if len(parts) <= limit else [*parts[: limit // 2], "...", *parts[-limit // 2 :]]
    return f"{counts}: {', '.join(shown)}"


def report(old: list[Kernel], new: list[Kernel]) -> bool:
    """Print what is the same and what is not; true if all is."""
    pairs, gone, come = match(old, new)
    moved = sum(before.object != after.object for before, after in pairs)
    print(f"{len(old)} kernels before, {len(new)} after: {len(pairs)} the same, {moved} of them in another object")
    by_object = collections.defaultdict(lambda: ([], []))
    for side, kernels in enumerate((gone, come)):
        for kernel in kernels:
            by_object[kernel.object][side].append(kernel)
    for name, (before, after) in sorted(by_object.items()):
        for a, b in zip(before, after, strict=False):
            print(f"differs  {name}  {differences(a, b)}")
        for kernel in before[len(after) :]:
            print(f"gone     {name}  {kernel.name[:100]}")
        for kernel in after[len(before) :]:
            print(f"new      {name}  {kernel.name[:100]}")
    return not by_object


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=pathlib.Path, help="a build folder, an object or a library")
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--only", default="", help="a regular expression for the names of objects")
    parser.add_argument("--common", action="store_true", help="leave out objects that only one side has")
    parser.add_argument("--cuobjdump", default=shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump")
    args = parser.parse_args()
    old, new = objects_of(args.old, args.only), objects_of(args.new, args.only)
    if args.common and args.old.is_dir() and args.new.is_dir():
        shared = old.keys() & new.keys()
        old, new = ({name: files[name] for name in sorted(shared)} for files in (old, new))
    before, after = disassemble(old, args.cuobjdump), disassemble(new, args.cuobjdump)
    if not before or not after:
        print(f"expected kernels on both sides, got {len(before)} and {len(after)}")
        return 2
    return 0 if report(before, after) else 1


if __name__ == "__main__":
    sys.exit(main())
