"""Puts the records of several calls of one bench into one file.

    python -m bench merge --out bench/results/<gpu>/ffn_forward.json first.json second.json

A problem that several files have comes from the last of them, as a whole: only times of one call are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from sparse24.bench import results


def merge(calls: Iterable[list[results.Record]]) -> list[results.Record]:
    """The records of all calls, each problem from the last call that has it, where the first one had it."""
    problems: dict[tuple, list[results.Record]] = {}
    for records in calls:
        own: dict[tuple, list[results.Record]] = {}
        for record in records:
            # By its label: a problem that could not be built has no sizes in its records.
            own.setdefault((record["bench"], record["problem"]), []).append(record)
        problems |= own
    return [record for records in problems.values() for record in records]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    calls = [results.read_json([path]) for path in args.json]
    merged = merge(calls)
    results.write_json(args.out, merged)
    print(f"{args.out}: {len(merged)} of {sum(map(len, calls))} records")
    return 0
