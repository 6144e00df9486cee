"""The squared-ReLU FFN with 2:4 weights, forward and training, beside dense networks with the same weights.

    python -m bench ffn_weights --out bench/results/<gpu>/ffn_weights.json

sparse24/bench/ffn/weights.py says what the variants are, and how they are verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from sparse24.bench.ffn import weights
from sparse24.bench.harness import Problem, run_bench
from sparse24.bench.options import Options
from sparse24.bench.precompile import Job
from sparse24.bench.sizes import Size

SIZES = (
    Size(8192, 4096, 16384),
    Size(16384, 4096, 21504),
    Size(16384, 2560, 18432),
    Size(32768, 1664, 6656),
)
SMOKE = (Size(128, 64, 256),)
ZEROS = 0.9


def labelled(options: Options) -> Iterator[tuple[str, Size, bool]]:
    """Of each size the forward pass and a training step."""
    for size in SMOKE if options.smoke else SIZES[:1] if options.quick else SIZES:
        for trains in (False, True):
            kind = "training" if trains else "forward"
            yield f"{kind} T {size.tokens}, D {size.d_model}, F {size.d_ff}", size, trains


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    for label, size, trains in labelled(options):
        yield label, partial(weights.problem, size, ZEROS, options, trains)


def compilations(options: Options) -> Iterator[tuple[str, list[Job]]]:
    """What each problem has compiled."""
    for label, size, trains in labelled(options):
        yield label, weights.compilations(*size[:3], trains)


def main(argv: list[str] | None = None) -> int:
    return run_bench("ffn_weights", problems, __doc__, argv, compilations=compilations)
