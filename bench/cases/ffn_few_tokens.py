"""The squared-ReLU FFN for few tokens, as in decoding: relu2_mlp_few and dense FFNs, all in CUDA graphs.

    python -m bench ffn_few_tokens --out bench/results/<gpu>/ffn_few_tokens.json --budget 300 --workers 12
    python -m bench ffn_few_tokens --out new.json --sizes decode --tokens 1,4,8
    python -m bench ffn_few_tokens --out new.json --patterns DIR --resume new.json    # with recorded zeros

90 % independent zeros at the sizes of five models first, one number of tokens after the other, then at those of all
models; then, at the five, recorded patterns, and 50, 80 and 95 % zeros. The 40 problems of the first kind take an H200
about three minutes. `python -m bench fit_few_tokens` makes the table of few tokens from the records.

sparse24/bench/ffn/few_tokens.py says what the variants are, and how they are verified.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

from sparse24.bench import sizes, timing
from sparse24.bench.ffn import few_tokens
from sparse24.bench.harness import Problem, run_bench
from sparse24.bench.inputs import Sparsity, recorded
from sparse24.bench.options import Options
from sparse24.bench.precompile import Job
from sparse24.bench.sizes import Size

#: Those that issues of decoding speak of: Persimmon-8B, Nemotron-H-8B, AFM-4.5B, Nemotron-Mini-4B, nanochat d26.
DECODE = ((4096, 16384), (4096, 21504), (2560, 18432), (3072, 9216), (1664, 6656))
#: In this order: what is closest to dense first.
TOKENS = (16, 32, 64, 128, 1, 4, 8, 2)
ZEROS = (0.9, 0.5, 0.8, 0.95)
SMOKE = (Size(1, 64, 160), Size(5, 64, 96, bias=True), Size(70, 64, 160))


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        type=lambda text: text.split(","),
        default=["decode", "users"],
        help="decode, users, or sizes such as 4096x16384 (default: decode,users)",
    )
    parser.add_argument(
        "--tokens", type=numbers, default=list(TOKENS), help="in this order (default: 16,32,64,128,1,4,8,2)"
    )
    parser.add_argument(
        "--zeros",
        type=lambda text: [float(share) for share in text.split(",")],
        default=list(ZEROS),
        help="shares of zeros; others than the first only at the sizes of decode (default: 0.9,0.5,0.8,0.95)",
    )
    parser.set_defaults(rounds=timing.MIN_ROUNDS, seconds=0.5)


def ffns(names: list[str]) -> list[Size]:
    """The FFNs of these sets and sizes, each once, for any number of tokens."""
    by_sizes = {size[1:3]: size for size in reversed(sizes.USERS)}
    found: dict[tuple[int, int], Size] = {}
    for name in names:
        pairs = {"decode": DECODE, "users": tuple(size[1:3] for size in sizes.USERS)}.get(name)
        for pair in pairs or [tuple(numbers(name.replace("x", ",")))]:
            found.setdefault(pair, by_sizes.get(pair, Size(0, *pair)))
    return list(found.values())


def labelled(options: Options) -> Iterator[tuple[str, Size, Sparsity]]:
    """The first share of zeros at all sizes; then patterns and other shares at the first ones."""
    asked = options.extra
    if options.smoke:
        chosen, first = list(SMOKE), 0
    else:
        found = ffns(asked.sizes)
        tokens = [t for t in asked.tokens if t in (1, 8, 64)] or asked.tokens if options.quick else asked.tokens
        special = [size for size in found if size[1:3] in DECODE or name_of(size) in asked.sizes]
        others = [size for size in found if size not in special]
        chosen = [size._replace(tokens=t) for part in (special, others) for t in tokens for size in part]
        first = len(tokens) * len(special)
    usual, *more = [Sparsity(share) for share in asked.zeros]
    order = [(size, usual) for size in chosen]
    if not options.quick:
        order += [(size, other) for other in [*recorded(options.patterns), *more] for size in chosen[:first]]
    if options.smoke:
        order += [(SMOKE[1], other) for other in [*recorded(options.patterns), *more]]
    for size, sparsity in order:
        zeros = f"{100 * sparsity.zeros:.0f} % zeros" if sparsity.pattern is None else sparsity.name
        yield f"T {size.tokens}, D {size.d_model}, F {size.d_ff}, {zeros} {size.model}".rstrip(), size, sparsity


def name_of(size: Size) -> str:
    return f"{size.d_model}x{size.d_ff}"


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    for label, size, sparsity in labelled(options):
        yield label, partial(few_tokens.problem, size, sparsity, options)


def compilations(options: Options) -> Iterator[tuple[str, list[Job]]]:
    """What each problem has compiled."""
    for label, size, _ in labelled(options):
        yield label, few_tokens.compilations(*size[:3], size.bias)


def main(argv: list[str] | None = None) -> int:
    return run_bench("ffn_few_tokens", problems, __doc__, argv, arguments=arguments, compilations=compilations)
