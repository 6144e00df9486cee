"""Times every tile and order of tiles of the first GEMM, for `python -m bench fit`.

    python -m bench tune_linear --out bench/results/<gpu>/tune_linear.json

As tune_mm, with SPARSE24_LINEAR_CONFIG, for linear_relu2 and linear_compress; beside them the dense product alone
(torch.matmul, `_scaled_mm` row-wise) without the activation. Outputs must equal those of the default configuration in
every bit: the products of one output are added in the same order under all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

import sparse24
from sparse24.bench.ffn import baselines
from sparse24.bench.harness import Case, Options, Problem, run_bench
from sparse24.bench.inputs import mlp_inputs
from sparse24.bench.reference import Unverified

VARIABLE = "SPARSE24_LINEAR_CONFIG"
SIZES = [(8192, 4096, 16384), (16384, 4096, 21504), (32768, 1664, 6656), (16384, 2560, 18432), (512, 4096, 16384)]
SMOKE_SIZES = [(48, 64, 128)]
#: Of those that are no power of two all but 128x256 take the one below.
SWIZZLES = (1, 2, 4, 6, 8, 12, 16, 24)
RASTERS = ("m", "n")
DTYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}
#: The one whose last tiles can be divided.
SPLIT = "128x256"
Outputs = tuple[torch.Tensor, ...]


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    for tokens, d_model, d_ff in SMOKE_SIZES if options.smoke else SIZES[:1] if options.quick else SIZES:
        for dtype in ("bf16", "fp8"):
            yield f"{tokens} x {d_ff} x {d_model} {dtype}", partial(problem, tokens, d_model, d_ff, dtype, options)


def problem(tokens: int, d_model: int, d_ff: int, dtype: str, options: Options) -> Problem:
    x, w, _ = mlp_inputs(tokens, d_model, d_ff, 0.9, device=options.device, seed=options.seed)
    if dtype == "bf16":
        ops = {
            "linear_relu2": lambda: sparse24.linear_relu2(x, w, statistics=False)[:1],
            "linear_compress": lambda: sparse24.linear_compress(x, w, statistics=False)[:2],
        }
        dense = partial(torch.matmul, x, w.t())
    else:
        (xq, sx), (wq, sw) = sparse24.quantize_fp8(x), sparse24.quantize_fp8(w)
        scale = torch.full((1,), 0.02, device=options.device)
        ops = {
            "linear_relu2": lambda: sparse24.linear_relu2(xq, wq, sx, sw, None, scale, statistics=False)[:1],
            "linear_compress": lambda: sparse24.linear_compress(xq, wq, sx, sw, None, scale, statistics=False)[:2],
        }
        dense = partial(baselines.scaled_mm, xq, wq.t(), sx, sw.t())
    cases = [Case("dense", dtype, lambda _: dense(), lambda _: {}, "part")]
    for op, run in ops.items():
        check = partial(equals, expected=run())
        cases.append(Case(op, dtype, partial(call, run, None), check, "sparse24"))
        tiles = [c["tile"] for c in sparse24._C.linear_configs(DTYPES[dtype], op == "linear_compress")]
        for (index, tile), swizzle, raster in product(enumerate(tiles), SWIZZLES, RASTERS):
            name, config = f"{op} {tile} swizzle {swizzle} along {raster}", f"{index},{swizzle},{raster}"
            facts = {"op": op, "tile": tile, "swizzle": swizzle, "raster": raster, "splits_last_wave": False}
            cases.append(Case(name, dtype, partial(call, run, config), check, "part", facts=facts))
            if tile == SPLIT:
                one = partial(call, run, f"{config},4")
                name, facts = f"{name}, the last tiles in quarters", facts | {"splits_last_wave": True}
                cases.append(Case(name, dtype, one, check, "part", facts=facts))
    for case in cases:
        case.flops = 2.0 * tokens * d_model * d_ff
    return Problem(tokens, d_model, d_ff, 0.9, cases)


def call(run: Callable[[], Outputs], config: str | None, _: int) -> Outputs:
    """One product under a configuration; the dispatcher reads the variable at every call."""
    if config is not None:
        os.environ[VARIABLE] = config
    try:
        return run()
    finally:
        os.environ.pop(VARIABLE, None)


def equals(output: Outputs, expected: Outputs) -> dict[str, float]:
    for got, wanted in zip(output, expected, strict=True):
        if not torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)):
            raise Unverified("expected the bits of the default configuration, got others")
    return {}


def main(argv: list[str] | None = None) -> int:
    return run_bench("tune_linear", problems, __doc__, argv, top=8)
