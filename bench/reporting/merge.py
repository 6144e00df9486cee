"""Puts the records of several calls of one bench into one file.

    python -m bench merge --out bench/results/<gpu>/ffn_forward.json first.json second.json

A problem that several files have comes from the last of them, as a whole: only times of one call are compared. What is
written is compact (compact.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from bench.reporting.compact import compact
from sparse24.bench import results


def merge(calls: Iterable[list[results.Record]]) -> list[results.Record]:
    """The records of all calls, each problem from the last call that has it, where the first one had it."""
    problems: dict[tuple, list[results.Record]] = {}
    for records in calls:
        own: dict[tuple, list[results.Record]] = {}
        for record in records:
            own.setdefault(_problem(record), []).append(record)
        problems |= own
    # One that could not be built has no sizes, only a label, and is forgotten once it was built.
    built = {r.get("problem") for records in problems.values() for r in records if r["tokens"]}
    return [r for records in problems.values() for r in records if r["tokens"] or r.get("problem") not in built]


def _problem(record: results.Record) -> tuple:
    """What identifies a problem without its label: sizes and data. Zeros are rounded: generators of GPUs differ."""
    names = ("bench", "tokens", "d_model", "d_ff", "pattern", "model" if "model" in record else "bench")
    # There each race is a problem.
    benches = ("models", "generate", "distributed", "ffn_training", "experts")
    race = record["race"] if record["bench"] in benches else None
    # Steps of nanochat are compared in one precision.
    apart = (race, record["dtype"] if record["bench"] == "nanochat_step" else None, record.get("routing"))
    layers = record["layers"] if record["bench"] == "generate" else None
    label = None if record["tokens"] else record.get("problem")
    return (*(record[name] for name in names), round(20 * record["zeros"]), apart, layers, label)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    calls = [results.read_json([path]) for path in args.json]
    merged = merge(calls)
    results.write_json(args.out, compact(merged))
    print(f"{args.out}: {len(merged)} of {sum(map(len, calls))} records")
    return 0
