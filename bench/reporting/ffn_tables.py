"""The tables of the FFN forward: sizes of models, the sweeps with the region where dense is faster, zeros."""

from __future__ import annotations

from collections.abc import Iterable

from bench.reporting import threshold
from bench.reporting.markdown import gain, size, table, us, zeros
from bench.reporting.origins import Origins
from sparse24.bench import results
from sparse24.mlp import pays

# What users run, and what else they could run in torch.
TORCH = {"bf16": ("torch_compile", "eager"), "fp8": ("scaled_mm_row", "scaled_mm_tensor")}
# How relu2_mlp scales the activation: dtype, variant, the same from separate kernels.
SCALES = {
    "bf16": ("bf16", "sparse24", "sparse24_composed"),
    "fp8, exact scales": ("fp8", "sparse24_fused", "sparse24_composed"),
    "fp8, bounded scales": ("fp8", "sparse24", ""),
    "fp8, one scale": ("fp8", "sparse24_fused_static", ""),
}
# Said where they stand beside each other.
SCALES_MEAN = (
    "Exact: the largest of each row, found in the call, as `_scaled_mm` row-wise has it. Bounded: `bounding_factor` of "
    "the weights, found before, as quantised modules without a bias have it. One: calibrated before, as fused_dense "
    "and cuSPARSELt have it"
)
CUSPARSELT_IS = (
    "cuSPARSELt is composed of torch's ops: most of its time is the pruning pass and `_cslt_compress`, which is not "
    "made for activations"
)

# By precision and scales of the activation and w2: these as `pays` takes them, dtype, relu2_mlp, the same where it runs
# dense, dense variants.
DEFAULTS = {
    "bf16": ({}, "bf16", "sparse24", "sparse24_fallback", ("torch_compile", "eager", "fused_dense")),
    "fp8, a scale per row": ({"fp8": True}, "fp8", "sparse24", "sparse24_fallback", ("scaled_mm_row",)),
    "fp8, one scale": (
        {"fp8": True, "one_scale": True},
        "fp8",
        "sparse24_fused_static",
        "sparse24_fallback_static",
        ("fused_dense", "scaled_mm_tensor"),
    ),
}


def all_tables(records: list[results.Record]) -> str:
    """From the records of bench "ffn_forward" with independent zeros of any share."""
    records = [r for r in records if r["race"] == "forward" and r["pattern"] == "iid"]
    usual = [r for r in records if results.usual(r)]
    found = threshold.points(usual)
    large = [r for r in usual if r.get("sizes", "large") == "large"]
    parts = [_variants(large), _sweeps(found), _as_it_comes(usual, found), _models(usual, found), _shares(records)]
    return "\n\n".join(filter(None, parts))


def by_default(records: list[results.Record], ours: str, fallback: str, **how: bool) -> results.Record | None:
    """Of one problem's records: the variant that relu2_mlp runs by default. `how` as `pays` takes it."""
    for r in records:
        if r["variant"] == (ours if pays(r["tokens"], r["d_ff"], r["d_model"], **how) else fallback):
            return r
    return None


def compiled(records: Iterable[results.Record], dtype: str) -> results.Record | None:
    """Of one problem's records: the fastest that torch.compile makes of plain torch in this precision."""
    names = [name for name in TORCH[dtype] if name != "eager"]
    return results.fastest([r for r in records if r["dtype"] == dtype and r["variant"] in names], "dense")


def _variants(records: list[results.Record]) -> str:
    """Every kind of scales of the large sizes, and its rivals."""
    origins, rows = Origins(records), []
    for problem in results.group(records).values():
        for name, (dtype, variant, composed) in SCALES.items():
            by_name = {r["variant"]: r for r in problem if r["dtype"] == dtype and r["median_us"]}
            ours, in_torch = by_name.get(variant), compiled(problem, dtype)
            if not ours or not in_torch:
                continue
            fused = by_name.get("fused_dense")
            row = [size(ours) + origins.mark(ours), name, us(ours)]
            row += [us(by_name[composed]) if composed in by_name else "", f"{us(in_torch)} {in_torch['variant']}"]
            row += [us(by_name[other]) if other in by_name else "" for other in ("fused_dense", "cusparselt")]
            row += [gain(in_torch, ours), gain(fused, ours) if fused else ""]
            rows.append(row + [_percent(ours, "rel_error"), _percent(ours, "pruning_error")])
    head = ["T, D, F", "precision", "relu2_mlp us", "composed", "torch.compile", "fused dense", "cuSPARSELt"]
    head += ["over torch.compile", "over fused dense", "error", "of pruning alone"]
    title = (
        f"**FFN forward**, 90 % zeros, all variants. {SCALES_MEAN}. Errors are relative, of the output: to the pruned "
        f"network, and of that to the unpruned one. {CUSPARSELT_IS}. {origins.note()}"
    )
    return table(title, head, rows) if rows else ""


def back_to_back(records: list[results.Record]) -> str:
    """First GEMM and network of the large sizes on a hot card: us, and over what is dense."""
    origins, rows = Origins(records), []
    # Benches "gemm1" and "ffn_forward" of one problem together; gain() compares medians.
    hot = [r | {"bench": "", "median_us": r["sustained_us"]} for r in records]
    for both in results.group(hot, "dtype").values():
        times = {(r["race"], r["variant"]): r for r in both}
        dtype = both[0]["dtype"]
        first_gemm = (("gemm1", "linear_compress", "linear_relu2"), ("gemm1", "linear_compress", "dense"))
        for name, (of, variant, _) in SCALES.items():
            if of != dtype or ("forward", variant) not in times:
                continue
            row = [size(both[0]) + origins.mark(both[0]), name]
            whole = (("forward", variant, TORCH[dtype][0]), ("forward", variant, "fused_dense"))
            for race, ours, rival in (*first_gemm, *whole):
                mine, theirs = times.get((race, ours)), times.get((race, rival))
                row.append(f"{us(mine)}, {gain(theirs, mine)}" if mine and theirs else "")
            rows.append(row)
            first_gemm = ((None, None, None),) * 2  # once for each precision
    head = ["T, D, F", "precision", "linear_compress us, over linear_relu2", "over torch's plain GEMM (fp8: row-wise)"]
    head += ["relu2_mlp us, over torch_compile or scaled_mm_row", "over fused dense (fp8: one scale)"]
    title = "**Back to back**, 90 % zeros: each called again and again, on a hot card at its power limit"
    return table(f"{title}. {origins.note()}", head, rows) if rows else ""


def _sweeps(found: list[threshold.Point]) -> str:
    """One row per number of tokens; where dense is faster, bold."""
    rows = []
    swept = threshold.sweeps(found)
    origins = Origins(p.ours for some in swept.values() for p in some if p.ours)
    for (d_model, d_ff), some in swept.items():
        for tokens in sorted({p.tokens for p in some}):
            mine = [p for p in some if p.tokens == tokens]
            mark = next((origins.mark(p.ours) for p in mine if p.ours), "")
            row = [f"{d_model}, {d_ff}{mark}", f"{tokens:,}"]
            for dtype in TORCH:
                row += _point(next((p for p in mine if p.dtype == dtype), None))
            rows.append(row)
    if not rows:
        return ""
    limits = ", ".join(
        f"{dtype} from {t:,} tokens on" if t else f"{dtype} at none that was measured"
        for dtype, t in threshold.thresholds(found).items()
    )
    head = ["D, F", "T", *(f"{dtype} {name}" for dtype in TORCH for name in ("us", "best dense us", "over best dense"))]
    title = (
        "**FFN forward over the number of tokens**, 90 % zeros. Sparse at every size, to show where it loses (bold); "
        "fp8 with bounded scales, where fused_dense has one scale. "
        f"Not slower than the best dense: {limits}. relu2_mlp runs dense below `min_tokens`. {origins.note()}"
    )
    return table(title, head, rows)


def _as_it_comes(records: list[results.Record], found: list[threshold.Point]) -> str:
    """The sweeps again: what relu2_mlp runs by its own threshold, over the best dense variant with scales like its."""
    swept = threshold.sweeps(found)
    records = [r for r in records if (r["d_model"], r["d_ff"]) in swept]
    origins, rows = Origins(records), []
    for both in results.group(records).values():
        first = both[0]
        row = [f"{first['d_model']}, {first['d_ff']}{origins.mark(first)}", f"{first['tokens']:,}"]
        for how, dtype, ours, fallback, rivals in DEFAULTS.values():
            mine = [r for r in both if r["dtype"] == dtype and r["median_us"]]
            chosen = by_default(mine, ours, fallback, **how)
            dense = min((r for r in mine if r["variant"] in rivals), key=lambda r: r["median_us"], default=None)
            if chosen is None or dense is None:
                row += ["", ""]
                continue
            kind = "dense" if chosen["variant"] == fallback else "sparse"
            row += [f"{us(chosen)} {kind}", f"{gain(dense, chosen)} {dense['variant']}"]
        rows.append((first["d_model"], first["tokens"], row))
    head = ["D, F", "T", *(text for name in DEFAULTS for text in (f"{name} us", "over best dense"))]
    title = (
        "**FFN forward as relu2_mlp runs it by default**, 90 % zeros: dense where `sparse24.mlp.pays` says so, and "
        "over the best dense variant whose activation and second weight have as many scales; a scale per row is the "
        f"bounded one. {origins.note()}"
    )
    return table(title, head, [row for *_, row in sorted(rows, key=lambda r: (-r[0], r[1]))]) if rows else ""


def _models(records: list[results.Record], found: list[threshold.Point]) -> str:
    """One row per size of a model; of a sweep only what a model has."""
    swept = threshold.sweeps(found)
    records = [r for r in records if r.get("model") or (r["d_model"], r["d_ff"]) not in swept]
    origins, rows = Origins(records), []
    for both in results.group(records).values():
        row = [both[0].get("model", ""), size(both[0]) + origins.mark(both[0])]
        for dtype in TORCH:
            row += _rivals([r for r in both if r["dtype"] == dtype], dtype)
        exact = next((r for r in both if r["variant"] == "sparse24_fused" and r["dtype"] == "fp8"), None)
        fused = next((r for r in both if r["variant"] == "fused_dense" and r["dtype"] == "fp8"), None)
        known = exact and exact["median_us"]
        row.append(us(exact) if known else "")
        row += [gain(r, exact) if known and r and r["median_us"] else "" for r in (compiled(both, "fp8"), fused)]
        rows.append(row)
    head = ["model", "T, D, F"]
    for dtype, rival in (("bf16", "torch.compile"), ("fp8", "`_scaled_mm`")):
        head += [f"{dtype} us", f"over {rival}", "over best dense", "over cuSPARSELt"]
    head += ["fp8, exact scales us", "over `_scaled_mm`", "over fused dense"]
    title = (
        "**FFN forward of models**, 90 % zeros; fp8 with bounded scales (exact where there is a bias), and in the last "
        f"columns with exact ones; `_scaled_mm` compiled, by row or tensor, what is faster. {CUSPARSELT_IS}. "
        f"{origins.note()}"
    )
    return table(title, head, rows) if rows else ""


def _shares(records: list[results.Record]) -> str:
    """The sizes that were measured with several shares of zeros: time and speed-up of each."""
    shares: dict[tuple, dict[str, list[results.Record]]] = {}
    for both in results.group(records, "dtype").values():
        first = both[0]
        key = (first["tokens"], first["d_model"], first["d_ff"], first["dtype"])
        shares.setdefault(key, {})[zeros(first)] = both
    shares = {key: by_share for key, by_share in shares.items() if len(by_share) > 1}
    columns = sorted({share for by_share in shares.values() for share in by_share})
    origins = Origins(r for by_share in shares.values() for both in by_share.values() for r in both)
    rows = []
    for (*of, dtype), by_share in shares.items():
        row = [", ".join(map(str, of)), dtype]
        for share in columns:
            ours, dense = (results.fastest(by_share.get(share, []), role) for role in ("sparse24", "dense"))
            row.append(f"{us(ours)}, {gain(dense, ours)}{origins.mark(ours)}" if ours and dense else "")
        rows.append(row)
    head = ["T, D, F", "precision", *(f"{share} zeros" for share in columns)]
    title = "**FFN forward by the share of zeros**: us, and over the best dense; fp8 with bounded scales. "
    return table(title + origins.note(), head, rows) if rows else ""


def _point(point: threshold.Point | None) -> list[str]:
    if point is None or point.speedup is None:
        return ["", "", "" if point is None else "not verified"]
    return [us(point.ours), f"{us(point.dense)} {point.dense['variant']}", gain(point.dense, point.ours)]


def _rivals(records: list[results.Record], dtype: str) -> list[str]:
    """Our time, and the speed-up over torch's compiled dense variants, all dense variants and cuSPARSELt."""
    ours = results.fastest(records, "sparse24")
    if not ours:
        return ["not verified", "", "", ""]
    dense = results.fastest(records, "dense")
    cells = [us(ours)]
    for rival in (compiled(records, dtype), dense, results.fastest(records, "cusparselt")):
        name = f" {rival['variant']}" if rival is dense and rival else ""
        cells.append(f"{gain(rival, ours)}{name}" if rival else "")
    return cells


def _percent(record: results.Record, key: str) -> str:
    return f"{100 * record[key]:.2f} %" if key in record else ""
