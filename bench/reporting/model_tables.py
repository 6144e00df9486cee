"""The tables of whole models of others: training steps of nanochat."""

from __future__ import annotations

from bench.reporting.markdown import gain, size, table, zeros
from bench.reporting.origins import Origins
from sparse24.bench import results

#: What each variant is called in the table.
STEPS = {
    "bf16": "as it is",
    "sparse24_bf16": "converted",
    "fp8": "as it is",
    "sparse24_fp8": "converted",
    "sparse24_fp8_all": "converted, all products of its networks fp8",
}


def steps(records: list[results.Record]) -> str:
    """From the records of bench "nanochat_step": a row per width and variant."""
    origins, rows = Origins(records), []
    for race in results.group(records, "dtype").values():
        dense = results.fastest(race, "dense")
        for r in race:
            row = [size(r) + origins.mark(r), zeros(r), r["dtype"], STEPS.get(r["variant"], r["variant"])]
            if not r["median_us"]:
                rows.append([*row, "not verified", "", "", "", ""])
                continue
            row += [f"{r['median_us'] / 1e3:.1f}", f"{r['tokens_per_s']:,.0f}"]
            row.append(f"{r['peak_gb']:.1f}" if "peak_gb" in r else "")
            hot = dense and dense.get("sustained_us") and r.get("sustained_us")
            over = (
                [gain(dense, r), gain(dense, r, "sustained_us") if hot else ""]
                if dense and dense is not r
                else ["", ""]
            )
            rows.append(row + over)
    first = records[0]
    title = (
        f"**Whole steps of nanochat's own GPT**, {first['layers']} layers, torch {first['torch']}: forward, backward "
        "and its own optimizer, compiled as its script does it, with torch's attention; fp8 is its own in all layers "
        f"but the converted networks. Speed-ups are over nanochat as it is in the same precision. {origins.note()}"
    )
    head = ["T, D, F", "zeros", "precision", "nanochat", "ms a step", "tokens/s", "peak GB", "speed-up", "back to back"]
    return table(title, head, rows)
