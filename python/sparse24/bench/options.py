"""The command line of a bench file, and how one goes on from the records of an earlier call."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse24.bench import results, timing

Arguments = Callable[[argparse.ArgumentParser], None]
# What records of one file have in common: times of another machine or program are not compared with these.
SAME = ("gpu", "torch", "commit")


@dataclass
class Options:
    """The command line, as the bench files see it."""

    device: torch.device
    smoke: bool
    quick: bool
    patterns: Path | None
    seed: int
    extra: argparse.Namespace  # with what the bench file's own `arguments` added


def parse(
    description: str | None, argv: list[str] | None, arguments: Arguments | None = None
) -> tuple[Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: checks the code path, times mean nothing")
    parser.add_argument("--quick", action="store_true", help="few sizes, fewest rounds")
    parser.add_argument("--out", type=Path, help="JSON file for the records (rewritten after every problem)")
    parser.add_argument("--resume", type=Path, help="go on from these records, which stand in --out too; may be --out")
    parser.add_argument("--compile-cache", type=Path, help="file of compiled graphs: loaded if it exists, then written")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that compile before the timing, where a bench compiles much"
    )
    parser.add_argument("--rounds", type=int, default=25, help="samples per variant (at least 15 on a GPU)")
    parser.add_argument("--seconds", type=float, default=2.0, help="timing of one problem before rounds are cut to 15")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds after which no new problem is started")
    parser.add_argument("--patterns", type=Path, help="folder with recorded zero patterns, pattern_layer*.npy")
    parser.add_argument("--seed", type=int, default=0)
    if arguments:
        arguments(parser)
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.smoke:
        parser.error("times on a CPU mean nothing: add --smoke to check the code path")
    if args.resume and not args.resume.exists() and args.resume != args.out:
        parser.error(f"expected --resume to be a file or the same as --out, got {args.resume}")
    if args.quick:
        args.rounds = timing.MIN_ROUNDS
    if args.smoke:
        args.rounds = 3
    return Options(torch.device(args.device), args.smoke, args.quick, args.patterns, args.seed, args), args


def resumed(path: Path | None, header: dict[str, Any]) -> list[results.Record]:
    """The records of an earlier call, less the problems whose sparse24 cases were not all verified: they run again."""
    if path is None or not path.exists():
        return []
    records = results.read_json([path])
    for field in SAME:
        if others := {r[field] for r in records} - {header[field]}:
            raise SystemExit(f"expected records of {field} {header[field]} in {path}, got {', '.join(sorted(others))}")
    again = {r["problem"] for r in records if r["role"] == "sparse24" and not r["verified"]}
    return [r for r in records if r["problem"] not in again]
