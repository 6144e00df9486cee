"""What `sparse24.analyze_model` expects of a network's speed, from the records: python/sparse24/analyze/measured.json.

A row is a size that was measured: how many times as fast as the fastest that plain torch offers in that precision
(compiled or not; fp8 by row or by tensor) the network is when it runs sparse, as `convert` makes it run: in fp8 with
exact scales. Of few tokens: when it runs prepared for decoding. Experts are compared with torch's grouped products.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from bench.reporting import experts_tables
from bench.reporting.ffn_tables import TORCH
from sparse24.bench import results

#: By pass and precision: what is the network, and what else there is.
OURS = {
    ("forward", "bf16"): ("sparse24",),
    ("forward", "fp8"): ("sparse24_fused",),
    ("decode", "bf16"): ("sparse24",),
    ("decode", "fp8"): ("sparse24",),
    ("training", "bf16"): ("sparse24", "sparse24_compiled"),
    ("training", "fp8"): ("sparse24_fp8", "sparse24_fp8_compiled", "sparse24_fp8_16bit_dw"),
}
#: By bench: its race, and the pass that it measures.
BENCHES = {
    "ffn_forward": ("forward", "forward"),
    "ffn_few_tokens": ("forward", "decode"),
    "ffn_training": ("training", "training"),
}


def rows(records: Iterable[results.Record]) -> list[list[object]]:
    """Pass, precision, tokens, d_model, d_ff and speed-up, in order."""
    found = []
    usual = [r for r in records if r["bench"] in BENCHES and results.usual(r) and r["median_us"]]
    for problem in results.group(r for r in usual if r["race"] == BENCHES[r["bench"]][0]).values():
        for (kind, dtype), variants in OURS.items():
            mine = [r for r in problem if (BENCHES[r["bench"]][1], r["dtype"]) == (kind, dtype)]
            ours = min((r["median_us"] for r in mine if r["variant"] in variants), default=None)
            theirs = min((r["median_us"] for r in mine if r["variant"] in TORCH[dtype]), default=None)
            if ours and theirs:
                size = [mine[0][name] for name in ("tokens", "d_model", "d_ff")]
                found.append([kind, dtype, *size, round(theirs / ours, 3)])
    return sorted(found)


def rows_of_experts(records: Iterable[results.Record]) -> list[list[object]]:
    """The same of mixtures with balanced routing: passes "experts" and "experts_training", tokens of a call."""
    found = []
    usual = [r for r in records if r["bench"] == "experts" and r["routing"] == "balanced" and results.usual(r)]
    for problem in experts_tables.problems(usual):
        ours, rival = experts_tables.fastest(problem), experts_tables.named(problem, "grouped_mm")
        if ours and rival:
            kind = "experts_training" if ours["race"] == "training" else "experts"
            size = [ours[name] for name in ("tokens", "d_model", "d_ff")]
            found.append([kind, ours["dtype"], *size, round(rival["median_us"] / ours["median_us"], 3)])
    return sorted(found)


def text(records: list[results.Record]) -> str:
    """The file."""
    found = [*rows(records), *rows_of_experts(records)]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in found)
    columns = json.dumps(["pass", "dtype", "tokens", "d_model", "d_ff", "speedup"])
    return f'{{"gpu": {json.dumps(records[0]["gpu"])},\n"columns": {columns},\n"rows": [\n{lines}\n]}}\n'
