"""The tables of few tokens: how many times as fast as the best dense network, single calls and calls in a stack."""

from __future__ import annotations

from collections.abc import Iterable

from bench.reporting.markdown import gain, table
from bench.reporting.origins import Origins
from sparse24.bench import results

WEIGHTS = {"bf16": "bf16 weights", "fp8": "float8 weights"}


def markdown(records: Iterable[results.Record]) -> str:
    """From the usual records of bench "ffn_few_tokens": a table for each precision."""
    records = [r for r in records if r["bench"] == "ffn_few_tokens" and results.usual(r)]
    by_dtype = {dtype: [r for r in records if r["dtype"] == dtype] for dtype in WEIGHTS}
    return "\n\n".join(_table(dtype, mine) for dtype, mine in by_dtype.items() if mine)


def _table(dtype: str, records: list[results.Record]) -> str:
    races = {}
    for race in results.group(records).values():
        ours, dense = results.fastest(race, "sparse24"), results.fastest(race, "dense")
        if ours and dense:
            races[ours["d_model"], ours["d_ff"], ours["tokens"]] = (ours, race)
    origins, rows = Origins(ours for ours, _ in races.values()), []
    tokens = sorted({key[2] for key in races})
    for size in sorted({key[:2] for key in races}, key=lambda size: (-size[0] * size[1], size)):
        here = {t: races[(*size, t)] for t in tokens if (*size, t) in races}
        model = next((ours["model"] for ours, _ in here.values() if ours.get("model")), "")
        cells = [_cell(*here[t], origins) if t in here else "" for t in tokens]
        rows.append(["{}, {}".format(*size), model, *cells])
    title = (
        f"**Few tokens, {WEIGHTS[dtype]}**, 90 % independent zeros, in CUDA graphs on a cold cache: speed-up over the "
        "best dense network of the weights' precision, of a single call / of a call in a stack of layers, each with "
        f"weights of its own. {origins.note()}"
    )
    return table(title, ["D, F", "FFN of", *(f"{t} token{'s' if t > 1 else ''}" for t in tokens)], rows)


def _cell(ours: results.Record, race: list[results.Record], origins: Origins) -> str:
    said = [gain(results.fastest(race, "dense"), ours)]
    in_stack = results.fastest(race, "dense", "stack_us")
    if in_stack and ours.get("stack_us"):
        said.append(gain(in_stack, ours, "stack_us"))
    return " / ".join(said) + origins.mark(ours)
