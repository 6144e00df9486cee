"""The squared-ReLU FFN in training: forward and backward, each GEMM alone, and the memory they take.

    python -m bench ffn_training --out bench/results/<gpu>/ffn_training.json
    python -m bench ffn_training --fp8 --out DIR/ffn_training.json --resume DIR/ffn_training.json

sparse24/bench/ffn/training.py says what the variants are, and how they are verified; the GEMMs alone are in the races
of gemm_training.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

from bench.cases.gemm_training import gemm_cases
from sparse24.bench import sizes
from sparse24.bench.ffn import training
from sparse24.bench.harness import Problem, run_bench
from sparse24.bench.inputs import Sparsity, recorded
from sparse24.bench.options import Options
from sparse24.bench.precompile import Job

SIZES = list(sizes.TRAINING)
#: Numbers of tokens off the multiples that tiles and copies have: a step takes as long for each token as of 8,192.
ODD = [(8191, 4096, 16384), (8188, 4096, 16384), (32767, 1664, 6656)]
#: Beside those the FFNs of all models, at 90 % zeros and without the GEMMs alone.
MODELS = [*ODD, *(size[:3] for size in sizes.USERS if size[:3] not in SIZES)]
SMOKE_SIZES = [(128, 64, 512)]
OTHER_ZEROS = [0.5, 0.95]  # beside 90 %, which every size has


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    for label, size, sparsity in labelled(options):
        # The GEMMs depend little on which entries are zero: once per size.
        alone = sparsity == Sparsity(0.9) and size not in MODELS and not options.extra.fp8
        products = gemm_cases if alone else None
        yield label, partial(training.problem, *size, sparsity, options, products, variants_of(options))


def compilations(options: Options) -> Iterator[tuple[str, list[Job]]]:
    """What each problem has compiled."""
    for label, size, _ in labelled(options):
        yield label, training.compilations(*size, variants_of(options))


def variants_of(options: Options) -> str:
    return training.FP8_ONLY if options.extra.fp8 else training.ALL


def labelled(options: Options) -> Iterator[tuple[str, tuple[int, int, int], Sparsity]]:
    """90 % zeros at every size; then recorded patterns and other shares of zeros, the first sizes first."""
    own, models = (SMOKE_SIZES, []) if options.smoke else (SIZES, MODELS)
    others = [] if options.extra.fp8 else [*recorded(options.patterns), *map(Sparsity, OTHER_ZEROS)]
    if options.quick:
        own, models, others = own[:2], [], others[:1]
    order = [(size, Sparsity(0.9)) for size in own]
    order += [(size, other) for size in own for other in others] + [(size, Sparsity(0.9)) for size in models]
    for size, sparsity in order:
        name = f"{100 * sparsity.zeros:.0f} % zeros" if sparsity.pattern is None else sparsity.name
        yield "T {}, D {}, F {}, ".format(*size) + name, size, sparsity


def main(argv: list[str] | None = None) -> int:
    return run_bench("ffn_training", problems, __doc__, argv, arguments=arguments, compilations=compilations)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fp8", action="store_true", help="90 %% zeros and the variants in fp8 only, and bf16's best")
