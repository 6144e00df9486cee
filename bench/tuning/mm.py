"""Times every kernel configuration of sparse24.mm, for `python -m bench fit`.

    python -m bench tune_mm --out bench/results/<gpu>/tune_mm.json

The CUDA dispatcher reads SPARSE24_MM_CONFIG="<tile>,<swizzle>,<m|n>,<splits>" at every call: tile is an index into
mm_configs, swizzle the number of tiles grouped in a raster line, m or n the direction of the raster, splits the parts
of K. Many tokens are tried with all orders of tiles, few tokens with all splits. Each configuration is verified against
a float64 product. "default" is what select_mm_config chooses. Only the fastest of each size are printed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import torch

import sparse24
from bench.cases import mm
from sparse24.bench import reference
from sparse24.bench.harness import Case, Options, Problem, run_bench
from sparse24.bench.inputs import Sparsity, preactivations, weights, zero_share

VARIABLE = "SPARSE24_MM_CONFIG"
SWIZZLES = (1, 2, 4, 8)
RASTERS = ("m", "n")
SPLITS = (1, 2, 4)
# Below, there are too few tiles for their order to matter, and room for parts of K.
MANY_TOKENS = 2048


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    sizes = mm.SMOKE_SIZES if options.smoke else mm.SIZES[-3:] if options.quick else mm.SIZES[::-1]
    for tokens, out, reduction in sizes:
        for dtype in ("bf16", "fp8"):
            yield f"{tokens} x {out} x {reduction} {dtype}", partial(problem, tokens, out, reduction, dtype, options)


def problem(tokens: int, out: int, reduction: int, dtype: str, options: Options) -> Problem:
    pre_activation = preactivations(tokens, reduction, Sparsity(), device=options.device, seed=options.seed)
    w = weights(out, reduction, device=options.device, seed=options.seed + 1)
    multiply, expected = product(pre_activation, w, dtype)
    check = partial(verify, expected=expected, limit=mm.BOUNDS[dtype])
    chosen = mm.chosen_config(dtype, tokens, out, reduction, options.device)
    cases = [Case("default", dtype, partial(call, multiply, None), check, "sparse24", facts=chosen)]
    for index, tile in enumerate(sparse24._C.mm_configs(mm.DTYPES[dtype])):
        for swizzle, raster, splits in orders(tokens):
            variant = f"{tile['tile']} swizzle {swizzle} along {raster} split {splits}"
            run = partial(call, multiply, f"{index},{swizzle},{raster},{splits}")
            facts = {"op": "mm", "tile": tile["tile"], "swizzle": swizzle, "raster": raster, "splits": splits}
            cases.append(Case(variant, dtype, run, check, "part", facts=facts))
    for case in cases:
        case.flops = 2.0 * tokens * out * reduction
    return Problem(tokens, out, reduction, zero_share(pre_activation), cases)


def orders(tokens: int) -> list[tuple[int, str, int]]:
    """Swizzle, raster and splits to try."""
    if tokens >= MANY_TOKENS:
        return [(swizzle, raster, 1) for swizzle in SWIZZLES for raster in RASTERS]
    return [(1, "m", splits) for splits in SPLITS]


def product(
    pre_activation: torch.Tensor, w: torch.Tensor, dtype: str
) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """The sparse product to time, and its float64 result."""
    if dtype == "bf16":
        values, meta = sparse24.compress(pre_activation, "relu2")
        y = sparse24.decompress(values, meta, *pre_activation.shape)
        return lambda: sparse24.mm(values, meta, w.t()), reference.product(y, w.t())
    values, meta, scale_y = sparse24.compress_fp8(pre_activation, None, "relu2")
    y = sparse24.decompress(values, meta, *pre_activation.shape)
    wq, scale_w = sparse24.quantize_fp8(w)
    expected = reference.product(y, wq.t()) * scale_y * scale_w.t()
    return lambda: sparse24.mm(values, meta, wq.t(), scale_y, scale_w, out_dtype=torch.bfloat16), expected


def call(multiply: Callable[[], torch.Tensor], config: str | None, _: int) -> torch.Tensor:
    """One product under a configuration: os.environ sets the process's variable, which the dispatcher reads."""
    if config is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = config
    try:
        return multiply()
    finally:
        os.environ.pop(VARIABLE, None)


def verify(output: torch.Tensor, expected: torch.Tensor, limit: float) -> dict[str, float]:
    return {"rel_error": reference.expect_error(output, expected, limit)}


def main(argv: list[str] | None = None) -> int:
    return run_bench("tune_mm", problems, __doc__, argv, top=6)
