"""The tables of the FFN forward: sizes of models, the sweeps with the region where dense is faster, zeros."""

from __future__ import annotations

from collections.abc import Iterable

import report
import threshold
from markdown_table import gain, table, us, zeros

from sparse24.mlp import pays

# relu2_mlp's other paths, by what their variants are called after "sparse24_".
PATHS = ("fused", "composed", "fused_static", "fused_predicted")
# What users run, and what else they could run in torch.
TORCH = {"bf16": ("torch_compile", "eager"), "fp8": ("scaled_mm_row", "scaled_mm_tensor")}

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


def all_tables(records: list[report.Record]) -> str:
    """From the records of bench "ffn_forward" with independent zeros of any share."""
    records = [r for r in records if r["race"] == "forward" and r["pattern"] == "iid"]
    usual = [r for r in records if report.usual(r)]
    found = threshold.points(usual)
    large = [r for r in usual if r.get("sizes", "large") == "large"]
    parts = [_variants(large), _sweeps(found), _as_it_comes(usual, found), _models(usual, found), _shares(records)]
    return "\n\n".join(filter(None, parts))


def by_default(records: list[report.Record], ours: str, fallback: str, **how: bool) -> report.Record | None:
    """Of one problem's records: the variant that relu2_mlp runs by default. `how` as `pays` takes it."""
    for r in records:
        if r["variant"] == (ours if pays(r["tokens"], r["d_ff"], r["d_model"], **how) else fallback):
            return r
    return None


def _variants(records: list[report.Record]) -> str:
    """Every variant of the large sizes."""
    rows = []
    for both in report.group(records, "dtype").values():
        ours, dense = report.fastest(both, "sparse24"), report.fastest(both, "dense")
        if not ours or not dense:
            continue
        by_name = {r["variant"]: r for r in both if r["median_us"]}
        paths = [f"{us(by_name[f'sparse24_{path}'])} {path}" for path in PATHS if f"sparse24_{path}" in by_name]
        in_torch = [f"{us(by_name[name])} {name}" for name in TORCH[ours["dtype"]] if name in by_name]
        fused, cslt = (us(by_name[name]) if name in by_name else "" for name in ("fused_dense", "cusparselt"))
        rows.append([_size(ours), ours["dtype"], us(ours), ", ".join(paths), ", ".join(in_torch), fused, cslt])
        rows[-1] += [gain(dense, ours), f"{100 * ours['pruning_error']:.1f} %"]
    head = ["T, D, F", "precision", "relu2_mlp us", "its paths", "dense in torch", "fused dense", "cuSPARSELt"]
    head += ["over best dense", "pruning error"]
    return table("**FFN forward**, 90 % zeros, all variants", head, rows) if rows else ""


def back_to_back(records: list[report.Record]) -> str:
    """First GEMM and network of the large sizes on a hot card: us, and over what is dense."""
    rows = []
    # Benches "gemm1" and "ffn_forward" of one problem together; gain() compares medians.
    hot = [r | {"bench": "", "median_us": r["sustained_us"]} for r in records]
    for both in report.group(hot, "dtype").values():
        times = {(r["race"], r["variant"]): r for r in both}
        dtype = both[0]["dtype"]
        row = [_size(both[0]), dtype]
        for race, ours, rival in (
            ("gemm1", "linear_compress", "linear_relu2"),
            ("gemm1", "linear_compress", "dense"),
            ("forward", "sparse24", TORCH[dtype][0]),
            ("forward", "sparse24" if dtype == "bf16" else "sparse24_fused_static", "fused_dense"),
        ):
            mine, theirs = times.get((race, ours)), times.get((race, rival))
            row.append(f"{us(mine)}, {gain(theirs, mine)}" if mine and theirs else "")
        rows.append(row)
    head = ["T, D, F", "precision", "linear_compress us, over linear_relu2", "over torch's plain GEMM"]
    head += ["relu2_mlp us, over torch_compile or scaled_mm_row", "over fused dense (fp8: one scale)"]
    title = "**Back to back**, 90 % zeros: each called again and again, on a hot card at its power limit"
    return table(title, head, rows) if rows else ""


def _sweeps(found: list[threshold.Point]) -> str:
    """One row per number of tokens; where dense is faster, bold."""
    rows = []
    swept = threshold.sweeps(found)
    for (d_model, d_ff), some in swept.items():
        for tokens in sorted({p.tokens for p in some}):
            row = [f"{d_model}, {d_ff}", f"{tokens:,}"]
            for dtype in TORCH:
                row += _point(next((p for p in some if p.tokens == tokens and p.dtype == dtype), None))
            rows.append(row)
    if not rows:
        return ""
    limits = ", ".join(
        f"{dtype} from {t:,} tokens on" if t else f"{dtype} at none that was measured"
        for dtype, t in threshold.thresholds(found).items()
    )
    head = ["D, F", "T", *(f"{dtype} {name}" for dtype in TORCH for name in ("us", "best dense us", "over best dense"))]
    title = (
        "**FFN forward over the number of tokens**, 90 % zeros. Sparse at every size, to show where it loses (bold). "
        f"Not slower than the best dense: {limits}. relu2_mlp runs dense below `min_tokens`."
    )
    return table(title, head, rows)


def _as_it_comes(records: list[report.Record], found: list[threshold.Point]) -> str:
    """The sweeps again: what relu2_mlp runs by its own threshold, over the best dense variant with scales like its."""
    swept = threshold.sweeps(found)
    rows = []
    for both in report.group(records).values():
        first = both[0]
        if (first["d_model"], first["d_ff"]) not in swept:
            continue
        row = [f"{first['d_model']}, {first['d_ff']}", f"{first['tokens']:,}"]
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
        "over the best dense variant whose activation and second weight have as many scales"
    )
    return table(title, head, [row for *_, row in sorted(rows, key=lambda r: (-r[0], r[1]))]) if rows else ""


def _models(records: list[report.Record], found: list[threshold.Point]) -> str:
    """One row per size of a model; of a sweep only what a model has."""
    swept = threshold.sweeps(found)
    rows = []
    for both in report.group(records).values():
        first = both[0]
        if not first.get("model") and (first["d_model"], first["d_ff"]) in swept:
            continue
        row = [first.get("model", ""), _size(first)]
        for dtype, names in TORCH.items():
            mine = [r for r in both if r["dtype"] == dtype]
            row += _rivals(mine, names)
        rows.append(row)
    head = ["model", "T, D, F"]
    for dtype, rival in (("bf16", "torch.compile"), ("fp8", "`_scaled_mm`")):
        head += [f"{dtype} us", f"over {rival}", "over best dense", "over cuSPARSELt"]
    return table("**FFN forward of models**, 90 % zeros", head, rows) if rows else ""


def _shares(records: list[report.Record]) -> str:
    """The sizes that were measured with several shares of zeros: time and speed-up of each."""
    shares: dict[tuple, dict[str, list[report.Record]]] = {}
    for both in report.group(records, "dtype").values():
        first = both[0]
        key = (first["tokens"], first["d_model"], first["d_ff"], first["dtype"])
        shares.setdefault(key, {})[zeros(first)] = both
    shares = {key: by_share for key, by_share in shares.items() if len(by_share) > 1}
    columns = sorted({share for by_share in shares.values() for share in by_share})
    rows = []
    for (*size, dtype), by_share in shares.items():
        row = [", ".join(map(str, size)), dtype]
        for share in columns:
            ours, dense = (report.fastest(by_share.get(share, []), role) for role in ("sparse24", "dense"))
            row.append(f"{us(ours)}, {gain(dense, ours)}" if ours and dense else "")
        rows.append(row)
    head = ["T, D, F", "precision", *(f"{share} zeros" for share in columns)]
    return table("**FFN forward by the share of zeros**: us, and over the best dense", head, rows) if rows else ""


def _point(point: threshold.Point | None) -> list[str]:
    if point is None or point.speedup is None:
        return ["", "", "" if point is None else "not verified"]
    return [us(point.ours), f"{us(point.dense)} {point.dense['variant']}", gain(point.dense, point.ours)]


def _rivals(records: list[report.Record], in_torch: Iterable[str]) -> list[str]:
    """Our time, and the speed-up over torch's compiled dense variants, all dense variants and cuSPARSELt."""
    ours = report.fastest(records, "sparse24")
    if not ours:
        return ["not verified", "", "", ""]
    dense = report.fastest(records, "dense")
    cells = [us(ours)]
    compiled = report.fastest([r for r in records if r["variant"] in in_torch and r["variant"] != "eager"], "dense")
    for rival in (compiled, dense, report.fastest(records, "cusparselt")):
        name = f" {rival['variant']}" if rival is dense and rival else ""
        cells.append(f"{gain(rival, ours)}{name}" if rival else "")
    return cells


def _size(record: report.Record) -> str:
    return f"{record['tokens']}, {record['d_model']}, {record['d_ff']}"
