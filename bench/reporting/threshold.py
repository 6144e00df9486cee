"""From how many tokens on 2:4 beats the best dense, from the sweeps of ffn_forward.

What relu2_mlp chooses by itself, between sparse and its own dense path, is what `regret` tells.

    python -m bench threshold bench/results/<gpu>/ffn_forward.json
    python -m bench threshold bench/results/<gpu>/ffn_forward.json --tolerance 0.02

A sweep is an FFN that was measured with at least three numbers of tokens. The threshold of a precision is the smallest
number of tokens of the sweeps such that there, and wherever there were more, relu2_mlp was not slower than the fastest
verified dense variant. A size where relu2_mlp was not verified counts as slower.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sparse24.bench import results

# Numbers of tokens that make a sweep.
SWEEP = 3


@dataclass(frozen=True)
class Point:
    """relu2_mlp and the fastest dense variant of one size and precision, in us; None where none was verified."""

    tokens: int
    d_model: int
    d_ff: int
    dtype: str
    ours: results.Record | None
    dense: results.Record | None

    @property
    def speedup(self) -> float | None:
        return self.dense["median_us"] / self.ours["median_us"] if self.ours and self.dense else None


def points(records: Iterable[results.Record]) -> list[Point]:
    """One per size and precision, of independent zeros at about 90 %, in ascending order of tokens."""
    forward = [r for r in records if r["bench"] == "ffn_forward" and r["race"] == "forward" and results.usual(r)]
    found = []
    for both in results.group(forward, "dtype").values():
        first = both[0]
        size = (first["tokens"], first["d_model"], first["d_ff"], first["dtype"])
        found.append(Point(*size, results.fastest(both, "sparse24"), results.fastest(both, "dense")))
    return sorted(found, key=lambda p: (p.d_model, p.d_ff, p.dtype, p.tokens))


def sweeps(found: Iterable[Point]) -> dict[tuple[int, int], list[Point]]:
    """The points of every FFN that has enough of them, by (d_model, d_ff)."""
    by_ffn: dict[tuple[int, int], list[Point]] = defaultdict(list)
    for point in found:
        by_ffn[point.d_model, point.d_ff].append(point)
    return {ffn: some for ffn, some in by_ffn.items() if len({p.tokens for p in some}) >= SWEEP}


def threshold(found: Iterable[Point], tolerance: float = 0.0) -> int | None:
    """The smallest number of tokens from which on no point is slower than 1 - tolerance; None where the last one is."""
    found = list(found)
    last = max((p.tokens for p in found if p.speedup is None or p.speedup < 1 - tolerance), default=-1)
    return min((p.tokens for p in found if p.tokens > last), default=None)


def thresholds(found: Iterable[Point], tolerance: float = 0.0) -> dict[str, int | None]:
    """By precision, over all sweeps."""
    swept = [p for some in sweeps(found).values() for p in some]
    dtypes = sorted({p.dtype for p in swept})
    return {dtype: threshold([p for p in swept if p.dtype == dtype], tolerance) for dtype in dtypes}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.0, help="what counts as noise, such as 0.02 for 2 %%")
    args = parser.parse_args(argv)
    found = points(results.read_json(args.json))
    for (d_model, d_ff), some in sweeps(found).items():
        for dtype in sorted({p.dtype for p in some}):
            mine = [p for p in some if p.dtype == dtype]
            first = threshold(mine, args.tolerance)
            products = f", {first * d_model * d_ff:.1e} multiply-adds" if first else ""
            print(f"D {d_model}, F {d_ff}, {dtype}: from T = {first}{products}")
            for p in mine:
                told = f"{p.speedup:.3f} over {p.dense['variant']}" if p.speedup else "not verified"
                print(f"  T {p.tokens:>6}  {told}")
    overall = thresholds(found, args.tolerance)
    print("all: " + (", ".join(f"{dtype} from T = {t}" for dtype, t in overall.items()) or "no sweep"))
    return 0 if overall and None not in overall.values() else 1
