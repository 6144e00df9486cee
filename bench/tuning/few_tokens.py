"""Makes the table of few tokens from records: up to how many relu2_mlp_few is not slower than what runs otherwise.

    python -m bench fit_few_tokens bench/results/<gpu>/ffn_few_tokens.json [--write]

Records are those of ffn_few_tokens at 90 % independent zeros, whose variants `sparse24_few` and `sparse24_dense` are
the two that relu2_mlp with w2_rows chooses from. Of each precision and size the number is the largest measured one up
to which the first is nowhere slower. `--write` writes the rows to cpp/heuristics/few_tokens.inc: those of sizes that
were not measured stay.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.tuning.fit import ROOT
from sparse24 import _C
from sparse24.bench import results
from sparse24.ops.few_tokens import MAX_TOKENS

Row = dict[str, Any]

TABLE = ROOT / "cpp" / "heuristics" / "few_tokens.inc"
BITS = {"bf16": 16, "fp8": 8}
FEW, OTHERWISE = "sparse24_few", "sparse24_dense"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path, help="records of ffn_few_tokens")
    parser.add_argument("--write", action="store_true", help=f"write the rows to {TABLE.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    source = " ".join(path.as_posix() for path in args.json)
    before = _C.few_tokens_rows()
    found = rows_of(results.read_json(args.json), source)
    known = {key_of(row): row["tokens"] for row in before}
    for row in found:
        was = known.get(key_of(row), "no row")
        print(f"{row['bits']} bits, {row['d_model']} x {row['d_ff']}: {was} -> {row['tokens']}")
    if args.write:
        write(TABLE, merged(before, found))
    return 0 if found else 1


def rows_of(records: Iterable[results.Record], source: str) -> list[Row]:
    """One of each precision and size that was measured with both variants, from one token on."""
    times: dict[tuple[int, int, int], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        if r["bench"] == "ffn_few_tokens" and results.usual(r) and r["verified"] and r["median_us"]:
            times[BITS[r["dtype"]], r["d_model"], r["d_ff"]][r["tokens"]][r["variant"]] = r["median_us"]
    rows = []
    for (bits, d_model, d_ff), by_tokens in times.items():
        both = {t: us for t, us in by_tokens.items() if FEW in us and OTHERWISE in us}
        most = most_tokens(both)
        if both and (most < max(both) or most == MAX_TOKENS):  # else nobody knows where it ends
            sizes = {"bits": bits, "d_model": d_model, "d_ff": d_ff}
            rows.append({**sizes, "tokens": most, "record": source})
    return rows


def most_tokens(times: dict[int, dict[str, float]]) -> int:
    """The largest number up to which the op is nowhere slower; 0 if there is none."""
    most = 0
    for tokens, us in sorted(times.items()):
        if us[FEW] > us[OTHERWISE]:
            break
        most = tokens
    return most


def key_of(row: Row) -> tuple[int, int, int]:
    return row["bits"], row["d_model"], row["d_ff"]


def merged(before: Sequence[Row], found: Sequence[Row]) -> list[Row]:
    """Those of before in their order, replaced where there are new ones; then the others."""
    new = {key_of(row): row for row in found}
    kept = [new.pop(key_of(row), row) for row in before]
    return kept + list(new.values())


def write(path: Path, rows: Iterable[Row]) -> None:
    """The rows as C++ initialisers, below the comment that the file begins with."""
    comment = [line for line in path.read_text().splitlines() if line.startswith("//")]
    lines = [f'{{{r["bits"]}, {r["d_model"]}, {r["d_ff"]}, {r["tokens"]}, "{r["record"]}"}},' for r in rows]
    path.write_text("\n".join(comment + lines) + "\n")
