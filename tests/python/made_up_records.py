"""Benchmark records made up for tests: sweeps over the tokens, and sizes of models."""

FACTS = {
    "gpu": "Made up",
    "torch": "2",
    "cuda": "13",
    "driver": "1",
    "sparse24": "0",
    "commit": "c",
    "date": "2026-01-01",
}
WIDE, NARROW = (4096, 16384), (1664, 6656)
DENSE = {"bf16": "torch_compile", "fp8": "scaled_mm_row"}


def record(tokens, ffn, dtype, variant, role, us, **more):
    fields = {
        "bench": "ffn_forward",
        "problem": f"T {tokens}, D {ffn[0]}, F {ffn[1]}, {more.get('zeros', 0.9)}",
        "variant": variant,
        "dtype": dtype,
        "tokens": tokens,
        "d_model": ffn[0],
        "d_ff": ffn[1],
        "zeros": 0.9,
        "pattern": "iid",
        "race": "forward",
        "role": role,
        "verified": us is not None,
        "median_us": us,
        "iqr_us": 1.0,
        "tflops_dense_equivalent": 100.0,
        "pruning_error": 0.016,
    }
    return fields | FACTS | more


def size(tokens, ffn, dtype, speedup, **more):
    """All variants of one size: ours takes 100 us, or is not verified where the speed-up is None."""
    dense = 100.0 * (speedup or 1.0)
    return [
        record(tokens, ffn, dtype, DENSE[dtype], "dense", 1.1 * dense, **more),
        record(tokens, ffn, dtype, "fused_dense", "dense", dense, **more),
        record(tokens, ffn, dtype, "cusparselt", "cusparselt", 120.0, **more),
        record(tokens, ffn, dtype, "sparse24", "sparse24", 100.0 if speedup else None, **more),
        record(tokens, ffn, dtype, "sparse24_composed", "part", 104.0, **more),
    ]


def sweep(ffn, dtype, speedups):
    return [r for tokens, speedup in speedups.items() for r in size(tokens, ffn, dtype, speedup, sizes="sweep")]


SWEEPS = [
    *sweep(WIDE, "bf16", {128: 0.7, 512: 1.02, 1024: 0.99, 2048: 1.1, 8192: 1.2}),
    *sweep(WIDE, "fp8", {128: 0.9, 512: 1.0, 1024: 1.1, 2048: 1.2, 8192: 1.3}),
    *sweep(NARROW, "bf16", {512: 1.1, 1024: 1.1, 2048: 1.1}),
    *sweep(NARROW, "fp8", {512: 0.8, 1024: 1.01, 2048: 1.1}),
]
# Neither many tokens of one size, nor another share of zeros, belongs to a sweep.
MODELS = [
    *size(32768, (768, 3072), "bf16", 0.96, model="nanochat d12", sizes="users"),
    *size(8192, (3072, 9216), "fp8", 1.25, model="Mini-4B", sizes="large"),
    *size(8192, (3072, 9216), "fp8", 0.5, model="Mini-4B", sizes="large", zeros=0.5),
]
