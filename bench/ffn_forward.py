"""The squared-ReLU FFN forward: sparse24.relu2_mlp against the dense FFNs that users run and the best that could be.

    python bench/ffn_forward.py --out bench/results/<gpu>/ffn_forward.json --budget 400
    python bench/ffn_forward.py --out ffn_forward.json --resume ffn_forward.json --budget 400    # the rest
    python bench/ffn_forward.py --out new.json --compile-cache graphs --sizes large,sweep        # compiles only once
    python bench/ffn_forward.py --out new.json --workers 12      # compiles in 12 processes before it times

The sizes come in the order of their weight: four large ones, few to many tokens at one of them, the sizes of all models
that users run, the same sweep over a narrow FFN, then 50 and 95 % zeros at the large ones. bench/threshold.py finds
from the sweeps from which number of tokens on 2:4 pays.

Variants: `sparse24` (relu2_mlp as it comes, but sparse for any number of tokens), `sparse24_fallback` (the same run
dense, on both sides of the threshold of `sparse24.mlp.pays`), `sparse24_fused` (the first GEMM compresses in its
epilogue), `sparse24_composed` (GEMM, compress, GEMM), `torch_compile` and `eager` in bf16, `scaled_mm_row` and
`scaled_mm_tensor` (torch.compile around `_scaled_mm`, x and the activation quantised inside), `fused_dense`:
linear_relu2, which has the activation and the fp8 cast in its epilogue as linear_compress has, and a dense second GEMM;
and `cusparselt`: torch's first GEMM, relu^2 and pruning in one compiled pass, then torch's own compression and sparse
GEMM. Weights are quantised before on all sides. torch.compile has its default mode (max-autotune was not timed) and
static shapes, so each size is compiled anew.

In fp8 `sparse24` is given the factor of |x_row|^2 that bounds the activation (`bounding_factor`, from the weights
alone, where there is no bias), `sparse24_fused_predicted` a factor from calibration, and the others compute exact
scales, but for those with one scale for the activation, as calibration or a delayed maximum gives it, and one for w2:
`sparse24_fused_static` (`sparse24_fallback_static` run dense), `fused_dense` and `cusparselt`. The GEMMs
alone are in the races gemm1 (records of bench "gemm1") and gemm2; cuSPARSELt's gemm2 is without its compression.

Verified against a float64 second GEMM of the activation that the same first GEMM gives: the dense variants against the
whole activation, the sparse ones against its 2:4 pruned form. `pruning_error` is the distance between those two
references. With many tokens a random sample of them is compared (ffn_checks.py).

At the large sizes networks and first GEMMs are also timed back to back (`sustained_us`), as a GPU at its power limit
runs them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import ffn_cases
import sizes
import timing
import torch
from data import biases, mlp_inputs
from ffn_checks import sampled_rows
from harness import Problem, attempt, main
from options import Options
from precompile import Job
from torch.nn import functional as F


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        type=lambda text: text.split(","),
        default=list(sizes.SETS),
        help=f"sets of sizes, in this order (default: {','.join(sizes.SETS)})",
    )
    parser.add_argument(
        "--zeros",
        type=lambda text: [float(share) for share in text.split(",")],
        default=[0.9, 0.5, 0.95],
        help="shares of zeros; with several, others than 0.9 only at the large sizes (default: 0.9,0.5,0.95)",
    )
    parser.set_defaults(rounds=timing.MIN_ROUNDS)


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    for label, name, size, zeros in labelled(options):
        yield label, partial(problem, name, size, zeros, options)


def compilations(options: Options) -> Iterator[tuple[str, list[Job]]]:
    """What each problem has compiled."""
    for label, _, size, _ in labelled(options):
        yield label, ffn_cases.compilations(*size[:3], size.bias)


def labelled(options: Options) -> Iterator[tuple[str, str, sizes.Size, float]]:
    if options.smoke:
        named = [("smoke", size) for size in sizes.SMOKE]
    elif options.quick:
        named = [("quick", size) for size in sizes.QUICK]
    else:
        named = sizes.chosen(options.extra.sizes)
    for name, size, zeros in sizes.with_zeros(named, options.extra.zeros):
        label = f"T {size.tokens}, D {size.d_model}, F {size.d_ff}, {100 * zeros:.0f} % zeros {size.model}"
        yield label.rstrip(), name, size, zeros


def problem(name: str, size: sizes.Size, zeros: float, options: Options) -> Problem:
    place = {"device": options.device, "seed": options.seed}
    x, w1, w2 = mlp_inputs(*size[:3], zeros, **place)
    b1, b2 = biases(size.d_ff, size.d_model, **place) if size.bias else (None, None)
    ffn = ffn_cases.Operands(x, w1, w2, b1, b2, sampled_rows(size.tokens, **place))
    measured = 1 - torch.count_nonzero(F.linear(x, w1, b1) > 0).item() / (size.tokens * size.d_ff)
    cases = []
    for build, dtype in ((ffn_cases.bf16, "bf16"), (ffn_cases.fp8, "fp8")):
        cases += attempt(partial(build, ffn, options), variant="sparse24", dtype=dtype, role="sparse24")
    gemm = 2.0 * size.tokens * size.d_model * size.d_ff
    for case in cases:
        case.flops = {"forward": 2 * gemm, "gemm1": gemm, "gemm2": gemm}[case.race]
    facts = {"sizes": name, "verified_rows": len(ffn.rows)}
    facts |= {"model": size.model} if size.model else {}
    facts |= {"bias": True} if size.bias else {}
    sustained = ("forward", "gemm1") if name in ("large", "smoke") else ()
    return Problem(*size[:3], measured, cases, sustained=sustained, facts=facts)


if __name__ == "__main__":
    raise SystemExit(main("ffn_forward", problems, __doc__, arguments=arguments, compilations=compilations))
