"""What `sparse24.mlp.pays` loses: the default's time over that of the faster one of sparse and dense, size by size.

python -m bench regret bench/results/<gpu>/ffn_forward.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from bench.reporting.ffn_tables import DEFAULTS
from sparse24.bench import results
from sparse24.mlp import pays

Size = tuple[int, int, int]


def choices(records: Iterable[results.Record], kind: str) -> dict[Size, tuple[float, bool]]:
    """By size: the share of time that the default loses, and whether it runs sparse. `kind` is one of DEFAULTS."""
    how, dtype, sparse, dense, _ = DEFAULTS[kind]
    times: dict[Size, dict[tuple[str, str], float]] = {}
    for r in records:
        if results.usual(r) and r["dtype"] == dtype and r["median_us"]:
            size = (r["tokens"], r["d_model"], r["d_ff"])
            times.setdefault(size, {})[r["race"], r["variant"]] = r["median_us"]
    found = {}
    for (tokens, d_model, d_ff), us in times.items():
        ours, other = us["forward", sparse], us.get(("forward", dense))
        if other is None:  # Not timed: the same kernels as fused_dense, but for torch's second product.
            other = us["forward", "fused_dense"]
            if "row" in kind:
                other += us["gemm2", "dense"] - us["gemm2", "dense_tensor"]
        chosen = pays(tokens, d_ff, d_model, **how)
        found[tokens, d_model, d_ff] = ((ours if chosen else other) / min(ours, other) - 1, chosen)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path)
    read = results.read_json(parser.parse_args(argv).json)
    for kind in DEFAULTS:
        for size, (regret, chosen) in sorted(choices(read, kind).items(), key=lambda item: -item[1][0]):
            print(f"{kind}, {' x '.join(map(str, size))}: {'sparse' if chosen else 'dense'} loses {100 * regret:.1f} %")
    return 0
