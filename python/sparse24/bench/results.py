"""Records of measurements: their file format, and how those that compute the same thing compare."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def write_json(path: Path, records: list[Record]) -> None:
    """One record per line: diffs of committed results stay readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(r, separators=(",", ":")) for r in records) + "\n]\n")


def read_json(paths: Iterable[Path]) -> list[Record]:
    """Records of files that hold a list of them, or one (a run of training)."""
    contents = [json.loads(path.read_text()) for path in paths]
    return [record for content in contents for record in (content if isinstance(content, list) else [content])]


def problem_of(record: Record) -> tuple:
    return tuple(record[k] for k in ("bench", "tokens", "d_model", "d_ff", "zeros", "pattern"))


def usual(record: Record) -> bool:
    """Independent zeros, about 90 % of them: what tables and drawings show. The records hold the rest."""
    return record.get("pattern") == "iid" and 0.85 < record["zeros"] < 0.93


def of_tuning(record: Record) -> bool:
    """Times of chosen configurations, which no table or drawing shows."""
    return record["bench"].startswith("tune_")


def group(records: Iterable[Record], *extra: str) -> dict[tuple, list[Record]]:
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[problem_of(record) + tuple(record[k] for k in extra)].append(record)
    return groups


def fastest(records: Iterable[Record], role: str, field: str = "median_us") -> Record | None:
    timed = [r for r in records if r["role"] == role and r.get(field)]
    return min(timed, key=lambda r: r[field], default=None)


def add_comparisons(records: list[Record]) -> None:
    """Adds to each of our records its speed-ups over its rivals, and to all the share of the copy bandwidth."""
    for race in group(records, "race", "dtype").values():
        dense, cusparselt = fastest(race, "dense"), fastest(race, "cusparselt")
        for record in race:
            if record["role"] != "sparse24" or not record["median_us"]:
                continue
            if dense:
                record["best_dense"] = dense["variant"]
                record["speedup_vs_best_dense"] = round(dense["median_us"] / record["median_us"], 3)
            in_stack = fastest(race, "dense", "stack_us")
            if in_stack and record.get("stack_us"):
                record["speedup_in_stack"] = round(in_stack["stack_us"] / record["stack_us"], 3)
            if cusparselt:
                record["speedup_vs_cusparselt"] = round(cusparselt["median_us"] / record["median_us"], 3)
    for problem in group(records).values():
        roof = fastest(problem, "roof")
        for record in problem:
            if roof and record.get("gb_per_s") and record is not roof:
                record["share_of_copy"] = round(record["gb_per_s"] / roof["gb_per_s"], 3)
