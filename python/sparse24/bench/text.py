"""Records as a table for a terminal."""

from __future__ import annotations

from sparse24.bench.results import Record


def table(records: list[Record]) -> str:
    """A short table for a terminal, one line per record."""
    lines = []
    width = max((len(r["race"]) for r in records), default=0) + 2
    for r in records:
        name = f"{r['dtype']:<8}{r['race']:<{width}}{r['variant']:<36}"
        if not r["median_us"]:
            lines.append(f"{name} NOT VERIFIED: {r.get('error', '')[:160]}")
            continue
        text = f"{name}{r['median_us']:>9.1f} us +-{r['iqr_us']:<7.1f}"
        if "tflops_dense_equivalent" in r:
            text += f"{r['tflops_dense_equivalent']:>7.0f} TFLOP/s"
        if "gb_per_s" in r:
            text += f"{r['gb_per_s']:>7.0f} GB/s"
        if "tokens_per_s" in r:
            text += f"{r['tokens_per_s']:>10,.0f} tokens/s"
        if "scaling" in r:
            text += f" {100 * r['scaling']:>6.1f} % of one GPU's a GPU"
        if "peak_gb" in r:
            text += f"{r['peak_gb']:>6.1f} GB"
        if "share_of_copy" in r:
            text += f" {100 * r['share_of_copy']:>4.0f} % of copy"
        if "speedup_vs_best_dense" in r:
            text += f"  {r['speedup_vs_best_dense']:.2f}x {r['best_dense']}"
        if "speedup_vs_cusparselt" in r:
            text += f"  {r['speedup_vs_cusparselt']:.2f}x cuSPARSELt"
        if "stack_us" in r:
            text += f"  in a stack {r['stack_us']:.1f} us"
        if "speedup_in_stack" in r:
            text += f", {r['speedup_in_stack']:.2f}x"
        if r.get("repeatable") is False:
            text += "  (bits differ between runs)"
        lines.append(text)
    return "\n".join(lines)
