"""What the kernels of a network wait for: samples of warps at each instruction, by Nsight Compute.

    python -m bench stalls --kernel OverlappedGemm --sparse-weights both

prints, for each kernel of a call whose name matches, its time, cycles and clock, what its warps waited for, and the
instructions at which they were found most often: the one behind the wait, as a rule. Cycles are the same on every
card; times are not, because the clock is that of a kernel's power. `--source FILE` reads what
`ncu --page source --csv` printed before, where there is no GPU.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.profiling import network
from sparse24.terminal import table

SAMPLES, EXECUTED = "# Samples", "Instructions Executed"
#: Reasons that a warp waits for have a column each; others count those samples again in which nobody issued.
STALL = re.compile(r"stall_(\w+)$")
FACTS = {"gpu__time_duration.sum": "time", "sm__cycles_elapsed.max": "cycles"}
MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3}


@dataclass(frozen=True)
class Instruction:
    """Where warps were found `samples` times, by reason, and how many warps executed it."""

    text: str
    executed: int
    samples: int
    stalls: Counter


@dataclass(frozen=True)
class Kernel:
    """One launch of a kernel."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(i.samples for i in self.instructions)

    def stalls(self) -> Counter:
        """Count samples by reason."""
        return sum((i.stalls for i in self.instructions), Counter())


def short(name: str) -> str:
    """The name of a kernel without the types that it is made of, but for its epilogue."""
    if gemm := re.search(r"\b(\w+Gemm)<", name):
        epilogues = re.findall(r"\b(\w*(?:Epilogue|Steps))<", name)
        return " ".join([gemm[1], *dict.fromkeys(epilogues)])
    return re.sub(r"^void |\(anonymous namespace\)::|sparse24::|cuda::", "", name).split("<")[0].split("(")[0]


def kernels_of(lines: Iterable[str]) -> Iterator[Kernel]:
    """Read what `ncu --page source --csv` prints: a name, a header, and a row for each instruction."""
    kernel, header, before = None, [], None
    for row in [*csv.reader(lines), ["Kernel Name", ""]]:
        if row and row[0] == "Kernel Name":
            # Some launches are printed twice.
            if kernel is not None and kernel != before:
                yield kernel
            before, kernel = kernel, Kernel(row[1])
        elif row and row[0] == "Address":
            header = row
        elif kernel is not None and row and row[0].startswith("0x"):
            kernel.instructions.append(_instruction(dict(zip(header, row, strict=False))))


def _instruction(row: dict[str, str]) -> Instruction:
    stalls = Counter({m[1]: int(count) for name, count in row.items() if (m := STALL.match(name)) and int(count)})
    return Instruction(row["Source"].strip(), int(row[EXECUTED]), int(row[SAMPLES]), stalls)


def facts_of(lines: Iterable[str]) -> list[dict[str, float]]:
    """Read time (us) and cycles of each launch from what `ncu --page raw --csv` prints."""
    header, units, *rows = csv.reader(lines)
    at = {fact: header.index(metric) for metric, fact in FACTS.items() if metric in header}
    out = []
    for row in rows:
        facts = {fact: float(row[i].replace(",", "")) for fact, i in at.items()}
        if "time" in facts:
            facts["time"] *= MICROSECONDS[units[at["time"]]]
        out.append(facts)
    return out


def describe(kernel: Kernel, facts: dict[str, float], rows: int) -> str:
    """What is printed of a kernel."""
    total = max(kernel.samples, 1)
    head = [short(kernel.name)]
    if facts:
        clock = facts["cycles"] / facts["time"] / 1e3
        head.append(f"{facts['time']:,.0f} us, {facts['cycles']:,.0f} cycles at {clock:.2f} GHz")
    reasons = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in kernel.stalls().most_common(8))
    often = sorted(range(len(kernel.instructions)), key=lambda i: -kernel.instructions[i].samples)[:rows]
    lines = []
    for i in sorted(often):
        instruction = kernel.instructions[i]
        reason, count = (instruction.stalls.most_common(1) or [("", 0)])[0]
        if 2 * count < instruction.samples:  # ncu has no column for what wgmma waits for
            reason, count = "others", instruction.samples - sum(instruction.stalls.values())
        lines.append(
            [
                instruction.text[:64],
                f"{i}",
                f"{instruction.executed:,}",
                f"{100 * instruction.samples / total:.1f}",
                f"{reason} {100 * count / max(instruction.samples, 1):.0f} %",
            ]
        )
    listed = table(["instruction", "at", "warps", "samples, %", "mostly"], lines)
    return "\n".join([": ".join(head), f"  waits: {reasons}", listed, ""])


def profile(kernel: str, network_options: list[str], folder: Path) -> Iterator[list[str]]:
    """Run the network under ncu; give its pages of sources and of metrics, by lines."""
    report = str(folder / "report")
    where = ["--section", "SourceCounters", "--section", "WarpStateStats", "--metrics", ",".join(FACTS)]
    what = ["--profile-from-start", "off", "--clock-control", "none", "-k", f"regex:{kernel}"]
    subprocess.run(
        ["ncu", *what, *where, "-o", report, "-f", sys.executable, "-m", "bench.profiling.network", *network_options],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for page in ("source", "raw"):
        command = ["ncu", "-i", f"{report}.ncu-rep", "--page", page, "--csv"]
        yield subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def main() -> int:
    parser = network.parser(__doc__)
    parser.add_argument("--kernel", default=".", metavar="REGEX", help="kernels whose name matches (default: all)")
    parser.add_argument("--rows", type=int, default=16, help="instructions of each (default: %(default)s)")
    parser.add_argument("--source", type=Path, metavar="CSV", help="read samples that were taken before")
    options = parser.parse_args()
    facts: list[dict[str, float]] = []
    if options.source:
        source = options.source.read_text().splitlines()
    else:
        if not shutil.which("ncu"):
            parser.error("expected Nsight Compute's ncu on PATH, or --source")
        rest = ["--size", *map(str, options.size), "--precision", options.precision]
        rest += ["--sparse-weights", options.sparse_weights, *(["--forward"] if options.forward else [])]
        with tempfile.TemporaryDirectory() as folder:
            source, raw = profile(options.kernel, rest, Path(folder))
        facts = facts_of(raw)
    kernels = [k for k in kernels_of(source) if re.search(options.kernel, k.name)]
    if not kernels:
        parser.error(f"expected kernels whose names match {options.kernel}, got none")
    for i, kernel in enumerate(kernels):
        print(describe(kernel, facts[i] if len(facts) == len(kernels) else {}, options.rows))
    return 0
