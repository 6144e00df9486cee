"""What the default loses: its time over that of the faster one of sparse and dense, size by size.

python -m bench regret bench/results/<gpu>/ffn_forward.json bench/results/<gpu>/ffn_training.json
    bench/results/<gpu>/experts.json

The default is `sparse24.mlp.pays` of a network, and `sparse24.experts.pays` of experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from bench.reporting import experts_tables
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


def training(records: Iterable[results.Record]) -> dict[Size, tuple[float, bool]]:
    """The same of a training step whose six products are float8, beside our dense one."""
    times: dict[Size, dict[str, float]] = {}
    for r in records:
        if results.usual(r) and r["race"] == "training" and r["median_us"]:
            times.setdefault((r["tokens"], r["d_model"], r["d_ff"]), {})[r["variant"]] = r["median_us"]
    found = {}
    for (tokens, d_model, d_ff), us in times.items():
        if {"sparse24_fp8", "fused_dense_fp8"} <= us.keys():
            ours, dense = us["sparse24_fp8"], us["fused_dense_fp8"]
            chosen = pays(tokens, d_ff, d_model, fp8=True, step=True)
            found[tokens, d_model, d_ff] = ((ours if chosen else dense) / min(ours, dense) - 1, chosen)
    return found


def experts(records: Iterable[results.Record], race: str, dtype: str) -> dict[tuple, tuple[float, bool]]:
    """The same of `sparse24.experts.pays`, by rows per expert and what else a problem is."""
    found = {}
    for problem in experts_tables.problems(r for r in records if (r["race"], r["dtype"]) == (race, dtype)):
        ours, first = experts_tables.named(problem, "sparse24"), problem[0]
        always = experts_tables.named(problem, "always_sparse")  # only where the default is dense
        sparse, other = always is None, always or experts_tables.named(problem, "fused_dense")
        if ours and other:
            rows = first["tokens"] * first["top_k"] / first["experts"]
            size = rows, first["experts"], first["d_model"], first["d_ff"], first["routing"]
            us = ours["median_us"]
            found[size] = (us / min(us, other["median_us"]) - 1, sparse)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path)
    read = results.read_json(parser.parse_args(argv).json)
    mixtures = [r for r in read if r["bench"] == "experts"]
    networks = [r for r in read if r["bench"] == "ffn_forward"]
    found = {kind: choices(networks, kind) for kind in DEFAULTS if networks}
    if steps := training(r for r in read if r["bench"] == "ffn_training"):
        found["fp8, training"] = steps
    for race, dtype in sorted({(r["race"], r["dtype"]) for r in mixtures}):
        found[f"experts, {race}, {dtype}"] = experts(mixtures, race, dtype)
    for kind, of_sizes in found.items():
        for size, (regret, chosen) in sorted(of_sizes.items(), key=lambda item: -item[1][0]):
            print(f"{kind}, {' x '.join(map(str, size))}: {'sparse' if chosen else 'dense'} loses {100 * regret:.1f} %")
    return 0
