"""The memory-bound kernels: compress, compress_fp8, quantize_fp8, decompress, against the machine's copy bandwidth.

    python -m bench compress --out bench/results/<gpu>/compress.json

GB/s count the fewest bytes: each input read once, each output written once. compress_fp8 along tokens needs the maxima
of columns before it can write, so it reads twice and is charged for once. Each sample is several calls that rotate over
copies of the input larger together than three L2 caches: a call pays for what its predecessor left dirty there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import sparse24
from sparse24.bench import reference
from sparse24.bench.harness import Case, Options, Problem, attempt, compiled, run_bench
from sparse24.bench.inputs import Sparsity, preactivations, recorded, zero_share

# tokens x features: the two that the targets name, then users': nanochat d26, Nemotron-H 8B, Nemotron-Nano-9B-v2 (odd).
SIZES = [(8192, 16384), (16384, 4096), (32768, 6656), (16384, 21504), (8191, 15680)]
SMOKE_SIZES = [(40, 64), (33, 96)]
CALLS_PER_SAMPLE = 4
ROOF_BYTES = 2 << 30  # read and written by the copy that is the roof


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    sizes = SMOKE_SIZES if options.smoke else SIZES[:2] if options.quick else SIZES
    cases = [(size, Sparsity()) for size in sizes] + [(sizes[0], s) for s in recorded(options.patterns)]
    for (tokens, features), sparsity in cases:
        yield f"{tokens} x {features} {sparsity.name}", partial(problem, tokens, features, sparsity, options)


def problem(tokens: int, features: int, sparsity: Sparsity, options: Options) -> Problem:
    x = preactivations(tokens, features, sparsity, device=options.device, seed=options.seed)
    buffers = rotation(x)
    cases = [roof(options), copy(buffers), compiled_relu2(buffers, options)]
    for dim in (-1, -2):
        cases += ours(partial(compress, buffers, dim), f"compress relu2 dim={dim}", "bf16", f"compress{dim}")
        cases += ours(partial(compress_fp8, buffers, dim), f"compress_fp8 relu2 row dim={dim}", "fp8", f"compress{dim}")
    cases += ours(partial(quantize, buffers), "quantize_fp8 row", "fp8", "quantize")
    cases += ours(partial(decompress, x, len(buffers)), "decompress dim=-1", "bf16", "decompress")
    cases += ours(partial(gather, x, len(buffers)), "gather_features of 5 %", "bf16", "gather")
    facts = {"calls_per_sample": CALLS_PER_SAMPLE, "buffer_sets": len(buffers)}
    share = zero_share(x)
    return Problem(tokens, 0, features, share, cases, sparsity.name, CALLS_PER_SAMPLE, evict=False, facts=facts)


def ours(build: Callable[..., Case], variant: str, dtype: str, race: str) -> list[Case]:
    """The case under its names; if it cannot even be built, that is a failure of this case alone."""
    names = {"variant": variant, "dtype": dtype, "race": race, "role": "sparse24"}
    return attempt(partial(build, **names), **names)


def rotation(x: torch.Tensor) -> list[torch.Tensor]:
    """x and copies of it: all but one together exceed three L2 caches."""
    if x.device.type != "cuda":
        return [x, x.clone()]
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    copies = max(1, -(-3 * cache // size(x)))
    return [x, *(x.clone() for _ in range(copies))]


def size(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def roof(options: Options) -> Case:
    """A large device-to-device copy: the bandwidth that everything else is held against."""
    count = 4096 if options.smoke else ROOF_BYTES // 2
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)

    def check(output: torch.Tensor) -> None:
        reference.expect_equal("the copy", output, source)

    return Case("copy", "uint8", lambda _: target.copy_(source), check, "roof", "roof", bytes=2 * count)


def copy(buffers: list[torch.Tensor]) -> Case:
    """A copy of the input's own size."""

    def check(output: torch.Tensor) -> None:
        reference.expect_equal("the copy", output, buffers[0])

    return Case(
        "clone of x", "bf16", lambda i: turn(buffers, i).clone(), check, "part", "copy", bytes=2 * size(buffers[0])
    )


def compiled_relu2(buffers: list[torch.Tensor], options: Options) -> Case:
    """What the dense FFN pays between its GEMMs."""
    run = compiled(lambda x: x.relu().square(), options)

    def check(output: torch.Tensor) -> None:
        reference.expect_equal("relu(x)^2", output, reference.relu2(buffers[0]).bfloat16())

    return Case(
        "torch.compile relu().square()",
        "bf16",
        lambda i: run(turn(buffers, i)),
        check,
        "part",
        "relu2",
        bytes=2 * size(buffers[0]),
    )


def compress(buffers: list[torch.Tensor], dim: int, **names: str) -> Case:
    x = buffers[0]
    moved = size(x, *sparse24.compress(x, "relu2", dim))

    def check(output: tuple[torch.Tensor, torch.Tensor]) -> None:
        dense = sparse24.decompress(*output, *x.shape, dim)
        reference.expect_equal("the kept entries", dense, reference.prune24(reference.relu2(x), dim).bfloat16())

    def run(i: int) -> tuple[torch.Tensor, ...]:
        return sparse24.compress(turn(buffers, i), "relu2", dim)

    return Case(**names, run=run, check=check, bytes=moved)


def compress_fp8(buffers: list[torch.Tensor], dim: int, **names: str) -> Case:
    x = buffers[0]
    moved = size(x, *sparse24.compress_fp8(x, None, "relu2", dim, "row"))

    def check(output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        values, meta, scale = output
        y = reference.prune24(reference.relu2(x), dim)
        expected = reference.fp8_scale(y.amax(dim=dim, keepdim=True))
        reference.expect_equal("the scale", scale, expected.view(-1, 1))
        dense = sparse24.decompress(values, meta, *x.shape, dim)
        reference.expect_equal("the kept entries", dense, reference.quantize(y, expected))

    def run(i: int) -> tuple[torch.Tensor, ...]:
        return sparse24.compress_fp8(turn(buffers, i), None, "relu2", dim, "row")

    return Case(**names, run=run, check=check, bytes=moved)


def quantize(buffers: list[torch.Tensor], **names: str) -> Case:
    x = buffers[0]
    moved = size(x, *sparse24.quantize_fp8(x, None, "row"))

    def check(output: tuple[torch.Tensor, torch.Tensor]) -> None:
        expected = reference.fp8_scale(x.abs().amax(dim=-1, keepdim=True).float())
        reference.expect_equal("the scale", output[1], expected)
        reference.expect_equal("the values", output[0], reference.quantize(x.float(), expected))

    def run(i: int) -> tuple[torch.Tensor, ...]:
        return sparse24.quantize_fp8(turn(buffers, i), None, "row")

    return Case(**names, run=run, check=check, bytes=moved)


def decompress(x: torch.Tensor, sets: int, **names: str) -> Case:
    values, meta = sparse24.compress(x, "relu2", -1)
    compressed = copies_of(values, meta, sets)

    def check(output: torch.Tensor) -> None:
        reference.expect_equal("X", output, reference.prune24(reference.relu2(x), -1).bfloat16())

    def run(i: int) -> torch.Tensor:
        return sparse24.decompress(*turn(compressed, i), *x.shape, -1)

    return Case(**names, run=run, check=check, bytes=size(values, meta, x))


def gather(x: torch.Tensor, sets: int, **names: str) -> Case:
    """As many features as the default recipe calls dense, anywhere: so close that nearly every sector is read."""
    values, meta = sparse24.compress(x, "relu2", -1)
    compressed = copies_of(values, meta, sets)
    count = sparse24.Recipe().hot_features(x.shape[1])
    features = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))[:count].to(x.device)

    def check(output: torch.Tensor) -> None:
        expected = reference.prune24(reference.relu2(x), -1).bfloat16()
        reference.expect_equal("the columns", output, expected[:, features])

    def run(i: int) -> torch.Tensor:
        return sparse24.gather_features(*turn(compressed, i), features)

    return Case(**names, run=run, check=check, bytes=size(values, meta) + 2 * x.shape[0] * count)


def copies_of(values: torch.Tensor, meta: torch.Tensor, sets: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As many as move the bytes of `sets` copies of X."""
    return [(values, meta), *((values.clone(), meta.clone()) for _ in range(2 * sets - 1))]


def turn(sets: list, i: int):
    return sets[i % len(sets)]


def main(argv: list[str] | None = None) -> int:
    return run_bench("compress", problems, __doc__, argv)
