"""The table of the bench ffn_weights: networks whose weights are 2:4, beside 2:4 activations alone and dense ones."""

from __future__ import annotations

from collections.abc import Iterable

from bench.reporting.markdown import gain_both, size, table, us
from bench.reporting.origins import Origins
from sparse24.bench import results

TRAINED = ("sparse24_up", "sparse24_both", "sparse24_adapters")
#: By race and precision: ours with dense products of the weights, what packs weights, and the dense rivals.
RACES: dict[tuple[str, str], tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    ("forward", "bf16"): ("sparse24", ("sparse24_up",), ("fused_dense", "torch_compile")),
    ("forward", "fp8"): ("sparse24", ("sparse24_up", "sparse24_up_row"), ("fused_dense", "scaled_mm_row")),
    ("training", "bf16"): ("sparse24", TRAINED, ("fused_dense", "torch_compile")),
    ("training", "fp8"): ("sparse24_fp8", TRAINED, ("fused_dense_fp8", "scaled_mm_tensor")),
}
NAMES = {
    "up": "w1",
    "both": "w1 and w2",
    "adapters": "w1 and w2, adapters of rank 64",
    "row": "w1, scales of rows",
}


def speed_table(records: list[results.Record]) -> str:
    """A row for each size, pass, precision and choice of weights."""
    records = [r for r in records if r["median_us"] and (r["race"], r["dtype"]) in RACES]
    origins, rows = Origins(records), []
    for race in results.group(records, "race", "dtype").values():
        first, by_name = race[0], {r["variant"]: r for r in race}
        activations, packed, rivals = RACES[first["race"], first["dtype"]]
        for variant in packed:
            ours = by_name.get(variant)
            if ours is None:
                continue
            beside = [by_name.get(name) for name in (*rivals, activations)]
            cells = [f"{us(r)}, {gain_both(r, ours)}" if r else "" for r in beside]
            what = NAMES[variant.rpartition("_")[2]]
            rows.append([size(ours) + origins.mark(ours), first["race"], first["dtype"], what, us(ours), *cells])
    head = ["T, D, F", "pass", "precision", "2:4 weights", "us", "fused dense: us, over it"]
    head += ["torch.compile (fp8 forward: by row): us, over it", "2:4 activations alone: us, over it"]
    title = (
        "**2:4 weights**, 90 % zeros, activations 2:4 too: forward with weights packed before, a training step packs "
        f"them. In parentheses back to back, on a hot card. {origins.note()}"
    )
    return table(title, head, rows) if rows else ""


def all_tables(records: list[results.Record]) -> str:
    """Whole passes, and the first GEMM alone."""
    return "\n\n".join(filter(None, (speed_table(records), _first_table(records))))


def _first_table(records: list[results.Record]) -> str:
    records = [r for r in records if r["median_us"] and r["race"] == "gemm1"]
    origins, rows = Origins(records), []
    for race in results.group(records, "dtype").values():
        by_name = {r["variant"]: r for r in race}
        dense, packed = by_name.get("linear_compress"), by_name.get("linear_compress_packed")
        if dense and packed:
            shape = f"{dense['tokens']} x {dense['d_ff']} x {dense['d_model']}{origins.mark(packed)}"
            rows.append([shape, dense["dtype"], us(dense), f"{us(packed)}, {gain_both(dense, packed)}"])
    head = ["tokens x out x reduction", "dtype", "linear_compress us", "linear_compress_packed us, over it"]
    return table(f"**First GEMM with a 2:4 weight**. {origins.note()}", head, rows) if rows else ""


def gains(records: Iterable[results.Record], race: str, dtype: str, ours: str, theirs: str, field: str) -> list[float]:
    """Ours over a rival, by size."""
    found = []
    chosen = [r for r in records if r["race"] == race and r["dtype"] == dtype and r.get(field)]
    for some in results.group(chosen).values():
        by_name = {r["variant"]: r[field] for r in some}
        if ours in by_name and theirs in by_name:
            found.append(by_name[theirs] / by_name[ours])
    return found
