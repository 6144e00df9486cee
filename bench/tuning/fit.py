"""Fits the constants of the cost model to timed configurations, and tells what its choices lose.

    python -m bench fit bench/results/<gpu>/tune_mm.json bench/results/<gpu>/tune_linear.json [--write]

Records are those of tune_mm and tune_linear: an op, its sizes, a configuration and a time. Only times of one race,
which is a `problem`, are compared. Constants are the rows of cpp/heuristics/sm90_costs.inc that the records can tell:
what a tile costs, and, where times are in us, the rate of its products. `--write` replaces their values there and names
the records. The model itself is C++ (sparse24._C._CostModel); this varies its constants one by one and keeps what
predicts better.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparse24 import _C
from sparse24.bench import results

Row = dict[str, Any]
Record = dict[str, Any]
Race = list[Record]

ROOT = Path(__file__).resolve().parents[2]
COSTS = ROOT / "cpp" / "heuristics" / "sm90_costs.inc"
DTYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}
#: What a record may say of a configuration beside its tile; older ones say "divides" for "splits_last_wave".
FACTS = ("swizzle", "raster", "splits", "splits_last_wave", "divides")
#: What is fitted, of a tile; a throughput that others are relative to stays.
TILE_FIELDS = ("throughput", "start", "tail", "half_empty")
UNIT = "the unit"
#: Shares by which a constant is changed, from the first to the last.
STEPS = (0.1, 0.03, 0.01, 0.003)
#: A change that predicts better by less is noise.
LEAST_GAIN = 1e-4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", nargs="+", type=Path, help="records of tune_mm and tune_linear")
    parser.add_argument("--write", action="store_true", help=f"write what was fitted to {COSTS.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    races = races_of(results.read_json(args.json))
    source = " ".join(path.as_posix() for path in args.json)
    before = with_timed_tiles(_C.cost_rows(), races, source)
    after = fit(before, races, source)
    for old, new in zip(before, after, strict=True):
        if old["value"] != new["value"]:
            print(f"{new['product']} {new['tile']} {new['bits']} bits: {new['field']} {old['value']} -> {new['value']}")
    print(f"error of predicted times: {error(before, races):.3f} -> {error(after, races):.3f}")
    print(f"mean regret: {mean_regret(before, races):.2%} -> {mean_regret(after, races):.2%}")
    if args.write:
        write(COSTS, after)
    return 0


def races_of(records: Iterable[Record]) -> list[Race]:
    """Timed configurations, by op and problem; defaults and rivals have no tile."""
    races: dict[tuple[str, str], Race] = {}
    for record in records:
        if isinstance(record.get("tile"), str) and time_of(record):
            races.setdefault((record["op"], record["problem"]), []).append(record)
    return list(races.values())


def time_of(record: Record) -> float | None:
    """In us, or over the time of something else in the race."""
    return record.get("median_us") or record.get("relative_time")


def problem_of(record: Record) -> tuple[str, str, int, int, int]:
    """Product, dtype, m, n and k, as the cost model has them."""
    wide, narrow = record["d_ff"], record["d_model"]
    n, k = (narrow, wide) if record["op"] == "mm" else (wide, narrow)
    product = "sparse" if record["op"] == "mm" else "dense"
    return product, DTYPES[record["dtype"]], record["tokens"], n, k


def predicted_us(model: _C._CostModel, record: Record) -> float:
    config = {"tile": record["tile"]} | {fact: record[fact] for fact in FACTS if fact in record}
    return model.predicted_us(*problem_of(record), config)


def candidates(record: Record) -> list[dict[str, Any]]:
    """What the library chooses from for the problem of a record."""
    dtype = DTYPES[record["dtype"]]
    if record["op"] != "mm":
        return list(_C.linear_configs(dtype, record["op"] == "linear_compress"))
    k = problem_of(record)[-1]
    configs = itertools.product(_C.mm_configs(dtype), range(1, 9))
    return [c | {"splits": parts} for c, parts in configs if parts == 1 or k % (c["tile_k"] * parts) == 0]


def regret(model: _C._CostModel, race: Race) -> float | None:
    """The share of time that the choice of the model loses to the fastest of a race; None where it was not timed."""
    chosen = model.fastest(*problem_of(race[0]), candidates(race[0]))
    same = [r for r in race if r["tile"] == chosen["tile"] and all(r[f] == chosen[f] for f in FACTS if f in r)]
    if not same:
        return None
    return min(time_of(r) for r in same) / min(time_of(r) for r in race) - 1


def mean_regret(rows: Sequence[Row], races: Iterable[Race]) -> float:
    model = _C._CostModel(list(rows))
    found = [loss for race in races if (loss := regret(model, race)) is not None]
    return sum(found) / max(len(found), 1)


def error(rows: Sequence[Row], races: Iterable[Race]) -> float:
    """Root mean square of the logarithms of predicted over measured times, about their mean in each race."""
    model = _C._CostModel(list(rows))
    total, count = 0.0, 0
    for race in races:
        logs = [math.log(predicted_us(model, r) / time_of(r)) for r in race]
        mean = sum(logs) / len(logs)
        total += sum((x - mean) ** 2 for x in logs)
        count += len(logs)
    return math.sqrt(total / max(count, 1))


def fit(rows: Sequence[Row], races: list[Race], source: str) -> list[Row]:
    """The rows, with those that the races can tell at the values that predict them best, and `source` as record."""
    fitted = [dict(row) for row in rows]
    tiles = {(problem_of(r)[0], bits_of(r), r["tile"]) for race in races for r in race}
    free = [row for row in fitted if is_told(row, tiles)]
    least = error(fitted, races)
    for step in STEPS:
        improved = True
        while improved:
            improved = False
            for row, factor in itertools.product(free, (1 + step, 1 / (1 + step))):
                kept = row["value"]
                row["value"] = float(f"{kept * factor:.3g}")
                now = error(fitted, races)
                if now < least * (1 - LEAST_GAIN):
                    least, improved = now, True
                else:
                    row["value"] = kept
    set_rates(fitted, races)
    for new, old in zip(fitted, rows, strict=True):
        if new["value"] != old["value"]:
            new["record"] = source
    return fitted


def with_timed_tiles(rows: list[Row], races: Iterable[Race], source: str) -> list[Row]:
    """The rows, and one to begin with for each timed tile that has no throughput yet."""
    known = {(row["product"], row["tile"]) for row in rows if row["field"] == "throughput"}
    timed = {(problem_of(r)[0], r["tile"]) for race in races for r in race}
    new = [{"product": product, "bits": 0, "tile": tile} for product, tile in sorted(timed - known)]
    return rows + [row | {"field": "throughput", "value": 1.0, "record": source} for row in new]


def bits_of(record: Record) -> int:
    return 8 if record["dtype"] == "fp8" else 16


def is_told(row: Row, tiles: set[tuple[str, int, str]]) -> bool:
    """Whether a row is a constant of tiles that were timed."""
    if row["field"] not in TILE_FIELDS or row["record"] == UNIT or not row["value"]:
        return False
    return any(
        row["product"] == product and row["bits"] in (0, bits) and row["tile"] in ("", tile)
        for product, bits, tile in tiles
    )


def set_rates(rows: list[Row], races: list[Race]) -> None:
    """mac_us of each product and width, so that predicted times are right on average where they are known in us."""
    for row in rows:
        if row["field"] != "mac_us":
            continue
        model = _C._CostModel(rows)
        of_row = [r for race in races for r in race if "median_us" in r and r["median_us"]]
        of_row = [r for r in of_row if (problem_of(r)[0], bits_of(r)) == (row["product"], row["bits"])]
        if not of_row:
            continue
        logs = [math.log(r["median_us"] / predicted_us(model, r)) for r in of_row]
        factor = math.exp(sum(logs) / len(logs))
        row["value"] = float(f"{row['value'] * factor:.3g}")


def write(path: Path, rows: Iterable[Row]) -> None:
    """The rows as C++ initialisers, below the comment that the file begins with."""
    comment = [line for line in path.read_text().splitlines() if line.startswith("//")]
    path.write_text("\n".join(comment + [line_of(row) for row in rows]) + "\n")


def line_of(row: Row) -> str:
    texts = [f'"{row[name]}"' for name in ("product", "tile", "field", "record")]
    return f"{{{texts[0]}, {row['bits']}, {texts[1]}, {texts[2]}, {row['value']:g}, {texts[3]}}},"
