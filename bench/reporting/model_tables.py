"""The tables of whole models of others: training steps of nanochat, and generation with models of transformers."""

from __future__ import annotations

from collections.abc import Sequence

from bench.reporting.markdown import gain, table
from bench.reporting.origins import Origins
from sparse24.bench import results

#: By variant: its column, and the variant that it is compared with.
STEPS = {
    "bf16": ("bf16", None),
    "sparse24_bf16": ("converted", "bf16"),
    "fp8": ("fp8", None),
    "sparse24_fp8": ("converted, fp8", "fp8"),
    "sparse24_fp8_16bit_dw": ("converted, fp8 but weight gradients", "fp8"),
}
GENERATING = {
    "dense": ("as it is", None),
    "sparse24": ("converted", "dense"),
    "sparse24_fp8": ("converted, fp8", "dense"),
}


def all_tables(records: Sequence[results.Record]) -> list[str]:
    """Those that there are records for."""
    made = []
    for bench, make in (("nanochat_step", steps), ("generate", generation)):
        chosen = [r for r in records if r["bench"] == bench]
        made += [make(chosen)] if chosen else []
    return made


def steps(records: list[results.Record]) -> str:
    """From the records of bench "nanochat_step": a row per width."""
    origins, rows = Origins(records), []
    there = {r["variant"] for r in records}
    columns = {name: column for name, column in STEPS.items() if name in there}
    for race in results.group(records, "layers").values():
        by_name = {r["variant"]: r for r in race}
        first = race[0]
        row = [f"{first['tokens']}, {first['d_model']}, {first['layers']}"]
        for name, (_, rival) in columns.items():
            record = by_name.get(name)
            cell = _cell(record, by_name.get(rival or ""), _rate_and_memory)
            row.append(cell + (origins.mark(record) if record else ""))  # precisions are races of their own
        rows.append(row)
    title = (
        f"**Whole training steps of nanochat's own GPT**, torch {records[0]['torch']}, {_zeros(records)}: forward, "
        "backward and its own optimizer, compiled as its script does it, with torch's attention. fp8: its own float8 "
        "layers, in converted models in all but the converted networks. Tokens per second, in brackets peak GB, and "
        f"the speed-up over nanochat as it is in that precision. {origins.note()}"
    )
    return table(title, ["T, D, layers", *(name for name, _ in columns.values())], rows)


def generation(records: list[results.Record]) -> str:
    """From the records of bench "generate": a row per model and depth, a column per kind of cache and batch."""
    origins, rows = Origins(records), []
    columns = sorted(dict.fromkeys((r["race"], r["batch"]) for r in records))
    depths = sorted({r["layers"] for r in records})
    for model, layers in dict.fromkeys((r["model"], r["layers"]) for r in records):
        mine = [r for r in records if (r["model"], r["layers"]) == (model, layers)]
        mine = {(r["race"], r["batch"], r["variant"]): r for r in mine}
        row = [model if len(depths) == 1 else f"{model}, {layers} layers"]
        for way in columns:
            cells = [
                _cell(mine.get((*way, name)), mine.get((*way, rival or "")), _tokens_generated)
                for name, (_, rival) in GENERATING.items()
            ]
            raced = mine.get((*way, "dense"))
            row.append(" / ".join(filter(None, cells)) + (origins.mark(raced) if raced else ""))
        rows.append(row)
    first = records[0]
    title = (
        f"**Tokens per second of transformers' `generate`**, {' and '.join(map(str, depths))} layers, torch "
        f"{first['torch']}, {_zeros(records)}: {' / '.join(name for name, _ in GENERATING.values())}; with its own "
        "cache (eager) or a static one, which it compiles, by sequences; converted with `decode=True`, and the "
        f"speed-up over the model as it is in bf16. {origins.note()}"
    )
    return table(title, ["model", *(f"{race}, {batch}" for race, batch in columns)], rows)


def _cell(ours: results.Record | None, rival: results.Record | None, text) -> str:
    """What `text` says of a record, and its speed-up."""
    if ours is None:
        return ""
    if not ours["median_us"]:
        return "not verified"
    over = f", {gain(rival, ours)}" if rival and rival["median_us"] else ""
    return text(ours) + over


def _rate_and_memory(record: results.Record) -> str:
    memory = f" ({record['peak_gb']:.1f})" if "peak_gb" in record else ""
    return f"{record['tokens_per_s']:,.0f}{memory}"


def _tokens_generated(record: results.Record) -> str:
    return f"{record['batch'] / record['median_us'] * 1e6:,.0f}"


def _zeros(records: list[results.Record]) -> str:
    return f"random weights, {100 * sum(r['zeros'] for r in records) / len(records):.0f} % zeros"
