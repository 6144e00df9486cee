"""From records to files and tables: JSON, plain text for the terminal, the README's tables.

    python bench/report.py bench/results/<gpu>/*.json --readme README.md

replaces what stands between `<!-- bench:begin -->` and `<!-- bench:end -->`; without --readme it prints the tables.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def write_json(path: Path, records: list[Record]) -> None:
    """One record per line: diffs of committed results stay readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")


def read_json(paths: Iterable[Path]) -> list[Record]:
    return [record for path in paths for record in json.loads(path.read_text())]


def problem_of(record: Record) -> tuple:
    return tuple(record[k] for k in ("bench", "tokens", "d_model", "d_ff", "zeros", "pattern"))


def group(records: Iterable[Record], *extra: str) -> dict[tuple, list[Record]]:
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[problem_of(record) + tuple(record[k] for k in extra)].append(record)
    return groups


def fastest(records: Iterable[Record], role: str) -> Record | None:
    timed = [r for r in records if r["role"] == role and r["median_us"]]
    return min(timed, key=lambda r: r["median_us"], default=None)


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
            if cusparselt:
                record["speedup_vs_cusparselt"] = round(cusparselt["median_us"] / record["median_us"], 3)
    for problem in group(records).values():
        roof = fastest(problem, "roof")
        for record in problem:
            if roof and record.get("gb_per_s") and record is not roof:
                record["share_of_copy"] = round(record["gb_per_s"] / roof["gb_per_s"], 3)


def text_table(records: list[Record]) -> str:
    """A short table for a terminal, one line per record."""
    lines = []
    for r in records:
        name = f"{r['dtype']:<8}{r['variant']:<36}"
        if not r["median_us"]:
            lines.append(f"{name} NOT VERIFIED: {r.get('error', '')[:160]}")
            continue
        text = f"{name}{r['median_us']:>9.1f} us +-{r['iqr_us']:<7.1f}"
        if "tflops_dense_equivalent" in r:
            text += f"{r['tflops_dense_equivalent']:>7.0f} TFLOP/s"
        if "gb_per_s" in r:
            text += f"{r['gb_per_s']:>7.0f} GB/s"
        if "share_of_copy" in r:
            text += f" {100 * r['share_of_copy']:>4.0f} % of copy"
        if "speedup_vs_best_dense" in r:
            text += f"  {r['speedup_vs_best_dense']:.2f}x {r['best_dense']}"
        if "speedup_vs_cusparselt" in r:
            text += f"  {r['speedup_vs_cusparselt']:.2f}x cuSPARSELt"
        if r.get("repeatable") is False:
            text += "  (bits differ between runs)"
        lines.append(text)
    return "\n".join(lines)


def markdown(records: list[Record]) -> str:
    """All tables of the README: independent zeros, about 90 % of them. The records hold the rest."""
    records = [r for r in records if r["pattern"] == "iid" and 0.85 < r["zeros"] < 0.93]
    parts = [_headline(records)]
    for bench, table in (
        ("compress", _compress_table),
        ("mm", _mm_table),
        ("ffn_forward", _ffn_table),
        ("gemm1", _gemm1_table),
    ):
        chosen = [r for r in records if r["bench"] == bench]
        if chosen:
            parts.append(table(chosen))
    return "\n\n".join(parts)


def _headline(records: list[Record]) -> str:
    first = records[0]
    clocks = [r["sm_clock_mhz"] for r in records if r.get("sm_clock_mhz")]
    clock = f", SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz while timing" if clocks else ""
    commits = ", ".join(sorted({r["commit"][:12] for r in records}))
    return (
        f"{first['gpu']}, driver {first['driver']}, torch {first['torch']}, CUDA {first['cuda']}{clock}; "
        f"commit {commits}, {first['date'][:10]}. Medians of at least 15 interleaved rounds on a cold L2; every output "
        "was verified before it was timed. TFLOP/s are dense-equivalent: 2 x tokens x out x reduction over the time."
    )


def _compress_table(records: list[Record]) -> str:
    rows = []
    for r in records:
        if r["role"] == "roof" or not r["median_us"]:
            continue
        share = f"{100 * r['share_of_copy']:.0f} %" if "share_of_copy" in r else ""
        size = f"{r['tokens']} x {r['d_ff']}"
        rows.append([size, _data(r), r["variant"], _us(r), f"{r['gb_per_s']:.0f}", share])
    head = ["tokens x features", "zeros", "kernel", "us", "GB/s", "of the copy bandwidth"]
    return _table("**Memory-bound kernels**", head, rows)


def _mm_table(records: list[Record]) -> str:
    rows = []
    for race in group(records, "race", "dtype").values():
        ours, dense, cslt = (fastest(race, role) for role in ("sparse24", "dense", "cusparselt"))
        if not ours:
            continue
        first = race[0]
        rows.append(
            [
                f"{first['tokens']} x {first['d_model']} x {first['d_ff']}",
                _data(first),
                first["race"],
                first["dtype"],
                _rate(ours),
                f"{_rate(dense)} {dense['variant']}" if dense else "",
                _rate(cslt) if cslt else "",
                f"{ours['speedup_vs_best_dense']:.2f}" if dense else "",
                f"{ours['speedup_vs_cusparselt']:.2f}" if cslt else "",
            ]
        )
    head = [
        "tokens x out x reduction",
        "zeros",
        "product",
        "dtype",
        "sparse24 us (TFLOP/s)",
        "best dense",
        "cuSPARSELt",
    ]
    return _table("**Sparse GEMM**", [*head, "over dense", "over cuSPARSELt"], rows)


def _ffn_table(records: list[Record]) -> str:
    rows = []
    for both in group(records, "dtype").values():
        forward = [r for r in both if r["race"] == "forward"]
        ours, dense = fastest(forward, "sparse24"), fastest(forward, "dense")
        if not ours or not dense:
            continue
        first = forward[0]
        others = ("sparse24_composed", "sparse24_fused", "sparse24_fused_static")
        other = ", ".join(f"{_us(r)} {r['variant'][9:]}" for r in both if r["variant"] in others and r["median_us"])
        users = fastest([r for r in forward if r["variant"] != "fused_dense"], "dense")
        size = f"{first['tokens']}, {first['d_model']}, {first['d_ff']}"
        best = f"{_us(dense)} {dense['variant']}"
        over = f"{ours['speedup_vs_best_dense']:.2f}"
        over_users = f"{users['median_us'] / ours['median_us']:.2f} {users['variant']}" if users else ""
        name = f"{_us(ours)} {ours['variant']}"
        rows.append([size, _data(first), first["dtype"], name, other, over_users, best, over])
    head = ["T, D, F", "zeros", "precision", "relu2_mlp us", "other paths us", "over what users run"]
    head += ["best dense measured, us", "over best dense"]
    title = "**FFN forward** (sparse at every size, to show where it loses: relu2_mlp runs dense below 1,024 tokens)"
    return _table(title, head, rows)


def _gemm1_table(records: list[Record]) -> str:
    rows = []
    for race in group(records, "dtype").values():
        times = {r["variant"]: _rate(r) for r in race if r["median_us"]}
        first = race[0]
        size = f"{first['tokens']} x {first['d_ff']} x {first['d_model']}"
        names = ("linear_compress", "linear_relu2", "dense")
        rows.append([size, first["dtype"], *(times.get(name, "") for name in names)])
    head = ["tokens x out x reduction", "dtype", "linear_compress us (TFLOP/s)", "linear_relu2", "plain GEMM of torch"]
    return _table("**First GEMM alone**", head, rows)


def _data(record: Record) -> str:
    share = f"{100 * record['zeros']:.0f} %"
    return share if record["pattern"] == "iid" else f"{share} ({record['pattern']})"


def _us(record: Record) -> str:
    return f"{record['median_us']:.0f}" if record["median_us"] >= 100 else f"{record['median_us']:.1f}"


def _rate(record: Record) -> str:
    return f"{_us(record)} ({record['tflops_dense_equivalent']:.0f})"


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def replace_section(text: str, section: str) -> str:
    """`text` with `section` between the two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"expected the marks {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path)
    args = parser.parse_args()
    section = markdown(read_json(args.json))
    if args.readme:
        args.readme.write_text(replace_section(args.readme.read_text(), section))
    else:
        print(section)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
