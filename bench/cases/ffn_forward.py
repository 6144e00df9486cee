"""The squared-ReLU FFN forward: sparse24.relu2_mlp against the dense FFNs that users run and the best that could be.

    python -m bench ffn_forward --out bench/results/<gpu>/ffn_forward.json --budget 400
    python -m bench ffn_forward --out ffn_forward.json --resume ffn_forward.json --budget 400    # the rest
    python -m bench ffn_forward --out new.json --compile-cache graphs --sizes large,sweep        # compiles only once
    python -m bench ffn_forward --out new.json --workers 12      # compiles in 12 processes before it times

The sizes come in the order of their weight: four large ones, few to many tokens at one of them, the sizes of all models
that users run, the same sweep over a narrow FFN, then 50 and 95 % zeros at the large ones. `threshold` finds from
the sweeps from which number of tokens on 2:4 pays.

sparse24/bench/ffn/forward.py says what the variants are, and how they are verified.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

from sparse24.bench import sizes, timing
from sparse24.bench.ffn import forward
from sparse24.bench.harness import Problem, run_bench
from sparse24.bench.options import Options
from sparse24.bench.precompile import Job


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
        yield label, partial(forward.problem, size, zeros, options, name)


def compilations(options: Options) -> Iterator[tuple[str, list[Job]]]:
    """What each problem has compiled."""
    for label, _, size, _ in labelled(options):
        yield label, forward.compilations(*size[:3], size.bias)


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


def main(argv: list[str] | None = None) -> int:
    return run_bench("ffn_forward", problems, __doc__, argv, arguments=arguments, compilations=compilations)
