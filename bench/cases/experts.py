"""The squared-ReLU experts of a mixture: relu2_experts beside torch's grouped products, forward and training.

    python -m bench experts --out bench/results/<gpu>/experts.json --budget 300 --workers 12
    python -m bench experts --out new.json --models nano --tokens 8192 --routing balanced,zipf --races forward

The experts of Nemotron-3 Nano, Super and Ultra, from single tokens to prefills, with 90 % independent zeros; skewed
routing and training steps at the larger numbers of tokens.

sparse24/bench/ffn/experts.py says what the variants are, and how they are verified.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

from sparse24.bench import timing
from sparse24.bench.ffn import experts
from sparse24.bench.ffn.experts import Size
from sparse24.bench.harness import Problem, run_bench
from sparse24.bench.inputs import Sparsity
from sparse24.bench.options import Options
from sparse24.bench.precompile import Job

#: By the model: experts, those of a token, and the sizes of one.
MODELS = {
    "nano": Size(0, 128, 6, 2688, 1856, "Nemotron-3 Nano"),
    "super": Size(0, 512, 22, 1024, 2688, "Nemotron-3 Super"),
    "ultra": Size(0, 512, 22, 2048, 5120, "Nemotron-3 Ultra"),
}
TOKENS = (8192, 32768, 1, 8, 64, 512, 2048, 65536)
ROUTING = ("balanced", "zipf", "recorded")
#: Numbers of tokens for which routing is skewed, too, and with which there are training steps.
SKEWED, TRAINED = (8192, 32768), (8192, 32768, 65536)
#: The largest weights leave room for the activations of so many tokens in a training step.
MOST_TRAINED = 16e9, 8192  # bytes, tokens
SMOKE = (Size(24, 4, 2, 64, 96), Size(24, 5, 2, 32, 64, routing="zipf"))


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=words, default=list(MODELS), help=f"default: {','.join(MODELS)}")
    parser.add_argument("--tokens", type=numbers, default=list(TOKENS), help="default: 1,8,64,512,...,65536")
    parser.add_argument("--routing", type=words, default=list(ROUTING), help=f"default: {','.join(ROUTING)}")
    parser.add_argument("--races", type=words, default=["forward", "training"], help="default: forward,training")
    parser.set_defaults(rounds=timing.MIN_ROUNDS, seconds=1.0)


def labelled(options: Options) -> Iterator[tuple[str, Size, bool]]:
    """Each model at the first number of tokens, with all routings and in training; then the others."""
    for size, trains in _chosen(options):
        kind = "training" if trains else "forward"
        sizes = f"T {size.tokens} x {size.top_k}, E {size.experts}, D {size.d_model}, F {size.d_ff}"
        yield f"{kind} {sizes}, {size.routing} {size.model}".rstrip(), size, trains


def _chosen(options: Options) -> Iterator[tuple[Size, bool]]:
    if options.smoke:
        for size in SMOKE:
            yield size, False
            yield size, True
        return
    asked = options.extra
    tokens = asked.tokens[:1] if options.quick else asked.tokens
    for count in tokens:
        for model in asked.models:
            size = MODELS[model]._replace(tokens=count)
            small = 4.0 * size.experts * size.d_model * size.d_ff < MOST_TRAINED[0] or count <= MOST_TRAINED[1]
            for routing in asked.routing:
                if routing == "balanced" or count in SKEWED:
                    if "forward" in asked.races:
                        yield size._replace(routing=routing), False
                    if "training" in asked.races and count in TRAINED and small:
                        yield size._replace(routing=routing), True


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    for label, size, trains in labelled(options):
        yield label, partial(experts.problem, size, Sparsity(0.9), options, trains)


def compilations(options: Options) -> Iterator[tuple[str, list[Job]]]:
    """What each problem has compiled."""
    for label, size, trains in labelled(options):
        yield label, experts.compilations(size, trains)


def main(argv: list[str] | None = None) -> int:
    return run_bench("experts", problems, __doc__, argv, arguments=arguments, compilations=compilations)
