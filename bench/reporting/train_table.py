"""The table of train_gpt: each recipe against the dense run of the same seed.

python -m bench train_table bench/results/<gpu>/train_gpt
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
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
#: Where dense runs in float8 are among them.
FP8_HEAD = ("to dense fp8, in %", "over dense fp8 runs", "s of training", "s to dense fp8's loss")


def read(folder: Path) -> list[Record]:
    """All runs of a folder, dense ones first."""
    return in_order([json.loads(path.read_text()) for path in sorted(folder.glob("*_seed*.json"))])


def in_order(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (r["ffn"], r["recipe"] != "default", r["recipe"], precision(r), r["seed"]))


def precision(record: Record) -> str:
    """Records from before there was a choice have none."""
    return record.get("precision", "bf16")


def dense_runs(records: list[Record], kind: str = "bf16") -> dict[int, Record]:
    """The complete dense runs of a precision by seed."""
    return {r["seed"]: r for r in records if r["ffn"] == "dense" and precision(r) == kind and r["complete"]}


def table(records: list[Record]) -> str:
    """Markdown. Losses are means over the complete runs of a variant; differences are paired by seed."""
    dense, dense_fp8 = dense_runs(records), dense_runs(records, "fp8")
    head = [*HEAD, *(FP8_HEAD if dense_fp8 else ())]
    rows = []
    for variant in dict.fromkeys(r["variant"] for r in records):
        runs = [r for r in records if r["variant"] == variant and r["complete"]]
        if runs:
            rows.append(_row(variant, runs, dense) + (_against_fp8(runs, dense_fp8) if dense_fp8 else []))
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
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


def training_seconds(run: Record, steps: int) -> float:
    """Time of the first `steps` steps at the median rates of the phases: no compiling, no evaluation."""
    counts: dict[str, int] = defaultdict(int)
    switch = run.get("first_sparse_step")
    counts["dense"] = steps if switch is None else min(steps, switch)
    counts["sparse"] = steps - counts["dense"]
    per_step = run["tokens"] / run["steps"]
    rates = run["tokens_per_s"]
    fallback = statistics.mean(rates.values()) if rates else float("nan")
    return sum(count * per_step / rates.get(phase, fallback) for phase, count in counts.items() if count)


def seconds_to(run: Record, loss: float) -> float | None:
    """Training time until the held-out curve of a run is at `loss`, between two looks along a line."""
    before: tuple[int, float] | None = None
    for step, value in run["held_out"]:
        if value <= loss:
            if before is not None and before[1] > value:
                step = before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
            return training_seconds(run, step)
        before = step, value
    return None


def _against_fp8(runs: list[Record], dense: dict[int, Record]) -> list[str]:
    """Loss and rate against dense fp8 runs, and how long to the last point of the curve of these."""
    gap = difference(runs, dense) if (runs[0]["ffn"], precision(runs[0])) != ("dense", "fp8") else None
    ours, theirs = _mean(runs, "tokens_per_s"), _mean(list(dense.values()), "tokens_per_s")
    pairs = [(r, dense[r["seed"]]) for r in runs if r["seed"] in dense and r["held_out"] and r["tokens_per_s"]]
    reached = [seconds_to(r, other["held_out"][-1][1]) for r, other in pairs if other["held_out"]]
    times = [training_seconds(r, r["steps"]) for r in runs if r["tokens_per_s"]]
    return [
        f"{gap[1]:+.2f}" if gap else "",
        f"{ours / theirs:.2f}" if ours and theirs else "",
        f"{statistics.mean(times):.0f}" if times else "",
        f"{statistics.mean(reached):.0f}" if reached and None not in reached else "not reached" if reached else "",
    ]


def _row(variant: str, runs: list[Record], dense: dict[int, Record]) -> list[str]:
    losses = [r["held_out_loss"] for r in runs if r["held_out_loss"] is not None]
    loss = f"{statistics.mean(losses):.4f}" if losses else "diverged"
    gap = difference(runs, dense) if runs[0]["variant"] != "dense" else None
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
