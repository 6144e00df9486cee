"""Makes the table of few tokens from records: up to how many the ops for them are not slower than what runs otherwise.

    python -m bench fit_few_tokens bench/results/<gpu>/ffn_few_tokens.json [--write]

Records are those of ffn_few_tokens at 90 % independent zeros, whose variants `sparse24_few`, `sparse24_dense_few` and
`sparse24_dense` are those that relu2_mlp with w2_rows chooses from; with more than 64 tokens also the module itself
where it runs 2:4. Of each precision and size the second number is the largest measured one up to which relu2_mlp_dense
is nowhere slower than what runs without it. The first is the largest one up to which relu2_mlp_few is nowhere slower
than what then runs instead, but for noise. `--write` writes the rows to cpp/heuristics/few_tokens.inc: those of sizes
that were not measured stay.
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
from sparse24.ops.network import MAX_DENSE_TOKENS

Row = dict[str, Any]

TABLE = ROOT / "cpp" / "heuristics" / "few_tokens.inc"
BITS = {"bf16": 16, "fp8": 8}
FEW, DENSE_FEW, OTHERWISE, SPARSE = "sparse24_few", "sparse24_dense_few", "sparse24_dense", "2:4"
#: By so much the same call takes longer at times.
NOISE = 1.015


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path, help="records of ffn_few_tokens")
    parser.add_argument("--write", action="store_true", help=f"write the rows to {TABLE.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    source = " ".join(path.as_posix() for path in args.json)
    before = _C.few_tokens_rows()
    found = rows_of(results.read_json(args.json), source)
    known = {key_of(row): numbers_of(row) for row in before}
    for row in found:
        was = known.get(key_of(row), "no row")
        print(f"{row['bits']} bits, {row['d_model']} x {row['d_ff']}: {was} -> {numbers_of(row)}")
    if args.write:
        write(TABLE, merged(before, found))
    return 0 if found else 1


def rows_of(records: Iterable[results.Record], source: str) -> list[Row]:
    """One of each precision and size that was measured with all variants, as far as shows where each ends."""
    times: dict[tuple[int, int, int], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        if r["bench"] == "ffn_few_tokens" and results.usual(r) and r["verified"] and r["median_us"]:
            variant = SPARSE if r.get("runs") == SPARSE else r["variant"]
            times[BITS[r["dtype"]], r["d_model"], r["d_ff"]][r["tokens"]][variant] = r["median_us"]
    rows = []
    for (bits, d_model, d_ff), by_tokens in times.items():
        dense = most_tokens({t: dense_and_others(t, us) for t, us in by_tokens.items()}, MAX_DENSE_TOKENS)
        if dense is None:
            continue
        few = most_tokens({t: few_and_others(t, by_tokens, dense) for t in by_tokens}, MAX_TOKENS)
        if few is not None:
            numbers = {"tokens": few, "dense": dense if dense > few else 0}  # for the tokens that the first leaves
            rows.append({"bits": bits, "d_model": d_model, "d_ff": d_ff, **numbers, "record": source})
    return rows


#: What was measured of an op, and what of that which runs without it; None where that is not known.
Pair = tuple[float, float] | None


def dense_and_others(tokens: int, us: dict[str, float]) -> Pair:
    if DENSE_FEW not in us or OTHERWISE not in us:
        return None
    return us[DENSE_FEW], min(us[OTHERWISE], us.get(SPARSE, us[OTHERWISE]) if tokens > MAX_TOKENS else us[OTHERWISE])


def few_and_others(tokens: int, by_tokens: dict[int, dict[str, float]], dense: int) -> Pair:
    us = by_tokens[tokens]
    if FEW not in us or OTHERWISE not in us:
        return None
    if tokens > dense:
        return us[FEW], us[OTHERWISE] * NOISE
    # Where it was not measured it takes no longer than with more tokens.
    more = [by_tokens[t][DENSE_FEW] for t in sorted(by_tokens) if t >= tokens and DENSE_FEW in by_tokens[t]]
    return us[FEW], more[0] * NOISE


def most_tokens(times: dict[int, Pair], limit: int) -> int | None:
    """The largest number up to which an op is nowhere slower; 0 if there is none, and None if nobody knows its end."""
    most = 0
    for tokens, pair in sorted(times.items()):
        if tokens > limit:
            break
        if pair is None:
            continue
        if pair[0] > pair[1]:
            return most
        most = tokens
    return most if most == limit else None


def numbers_of(row: Row) -> str:
    return f"{row['tokens']}, {row['dense']}"


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
    lines = [f'{{{r["bits"]}, {r["d_model"]}, {r["d_ff"]}, {numbers_of(r)}, "{r["record"]}"}},' for r in rows]
    path.write_text("\n".join(comment + lines) + "\n")
