"""The table of train_gpt: each recipe against the dense run of the same seed.

python -m bench train_table bench/results/<gpu>/train_gpt
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

Record = dict[str, Any]
HEAD = (
    "FFN",
    "seeds",
    "held-out loss",
    "to dense of the same seed",
    "in %",
    "tokens/s",
    "over dense runs",
    "over its own dense steps",
    "peak GB",
    "zeros at the end, %",
)


def read(folder: Path) -> list[Record]:
    """All runs of a folder, dense ones first."""
    return in_order([json.loads(path.read_text()) for path in sorted(folder.glob("*_seed*.json"))])


def in_order(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (r["ffn"], r["recipe"] != "default", r["recipe"], r["seed"]))


def table(records: list[Record]) -> str:
    """Markdown. Losses are means over the complete runs of a variant; differences are paired by seed."""
    dense = {r["seed"]: r for r in records if r["ffn"] == "dense" and r["complete"]}
    rows = []
    for variant in dict.fromkeys(r["variant"] for r in records):
        runs = [r for r in records if r["variant"] == variant and r["complete"]]
        if runs:
            rows.append(_row(variant, runs, dense))
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def difference(runs: list[Record], dense: dict[int, Record]) -> tuple[float, float] | None:
    """Mean difference of the held-out loss to the dense run of the same seed, and relative to the latter in %."""
    pairs = [(r["held_out_loss"], dense[r["seed"]]["held_out_loss"]) for r in runs if r["seed"] in dense]
    if not pairs or any(loss is None for pair in pairs for loss in pair):
        return None
    mean = statistics.mean(ours - theirs for ours, theirs in pairs)
    return mean, 100 * mean / statistics.mean(theirs for _, theirs in pairs)


def own_gain(runs: list[Record]) -> float | None:
    """Tokens a second of the sparse steps over those of the dense steps of the same runs."""
    rates = [r["tokens_per_s"] for r in runs if {"sparse", "dense"} <= r["tokens_per_s"].keys()]
    return sum(r["sparse"] for r in rates) / sum(r["dense"] for r in rates) if rates else None


def _row(variant: str, runs: list[Record], dense: dict[int, Record]) -> list[str]:
    losses = [r["held_out_loss"] for r in runs if r["held_out_loss"] is not None]
    loss = f"{statistics.mean(losses):.4f}" if losses else "diverged"
    gap = difference(runs, dense) if runs[0]["ffn"] == "sparse" else None
    timed = runs[0]["ffn"] == "dense" or runs[0]["recipe"] == "default"
    rate = _mean(runs, "tokens_per_s") if timed else None
    dense_rate = _mean([dense[r["seed"]] for r in runs if r["seed"] in dense], "tokens_per_s")
    own = own_gain(runs) if timed else None
    peak = _mean(runs, "peak_bytes")
    zeros = [statistics.mean(r["activations"][-1]["zeros"]) for r in runs if r["activations"]]
    return [
        variant,
        ", ".join(str(r["seed"]) for r in runs),
        loss,
        f"{gap[0]:+.4f}" if gap else "",
        f"{gap[1]:+.2f}" if gap else "",
        f"{rate:,.0f}" if rate else "",
        f"{rate / dense_rate:.2f}" if rate and dense_rate else "",
        f"{own:.2f}" if own else "",
        f"{peak / 1e9:.1f}" if peak else "",
        f"{100 * statistics.mean(zeros):.1f}" if zeros else "",
    ]


def _mean(runs: list[Record], field: str) -> float | None:
    """Of the phase that names the run: a sparse run's sparse steps, a dense run's dense ones."""
    values = [r[field].get(r["ffn"]) for r in runs]
    values = [v for v in values if v]
    return statistics.mean(values) if values else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(table(read(parser.parse_args(argv).folder)))
    return 0
