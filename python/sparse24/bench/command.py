"""The command `sparse24 bench`: whether 2:4 pays for a network of some sizes on this GPU."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sparse24 import env
from sparse24.bench import environment, harness, precompile, results, verdict
from sparse24.bench.ffn import forward, training
from sparse24.bench.harness import Problem
from sparse24.bench.inputs import Sparsity
from sparse24.bench.options import Options
from sparse24.bench.results import Record
from sparse24.bench.sizes import PRESETS, Size, preset
from sparse24.bench.timing import MIN_ROUNDS
from sparse24.mlp import pays
from sparse24.terminal import drawing_file, output_file

PRECISIONS = ("bf16", "fp8")
#: What the kernels take of tokens, d_model and d_ff; other sizes run dense.
MULTIPLES = (1, 16, 32)
#: Numbers of tokens at which it is seen where 2:4 loses.
FEW_TOKENS = (128, 512, 2048)
#: What is compared; the benches of the repository have the rest.
FORWARD = {
    "bf16": {"eager", "torch_compile", "fused_dense", "sparse24"},
    "fp8": {"scaled_mm_row", "scaled_mm_tensor", "fused_dense", "sparse24", "sparse24_fused"},
}
#: Beside it where relu2_mlp runs dense by itself.
BY_DEFAULT = "sparse24_fallback"
TRAINING = {
    *("torch_compile", "scaled_mm_tensor", "fused_dense", "fused_dense_fp8"),
    *("sparse24", "sparse24_compiled", "sparse24_fp8"),
}
#: Seconds of timing for one problem, before samples are cut to the fewest.
SECONDS = 2.0

Build = Callable[[], Problem]


@dataclass(frozen=True)
class Plan:
    """What is measured: sizes, passes and precisions, at this share of zeros."""

    sizes: tuple[Size, ...]
    precisions: tuple[str, ...] = PRECISIONS
    training: bool = False
    zeros: float = 0.9
    few_tokens: tuple[int, ...] = FEW_TOKENS

    def problems(self, options: Options) -> Iterator[tuple[str, str, Build]]:
        """Name of the bench, label and problem of each measurement."""
        for size in self.sizes:
            label = f"{size.tokens:,} tokens, {size.d_model} -> {size.d_ff} -> {size.d_model}"
            yield "ffn_forward", label, partial(self._forward, size, options)
            if self.training:
                yield "ffn_training", f"{label}, training", partial(self._training, size, options)
        if len(self.sizes) == 1:
            for tokens in self.few_tokens:
                if tokens < self.sizes[0].tokens:
                    size = self.sizes[0]._replace(tokens=tokens)
                    yield "ffn_forward", f"{tokens:,} tokens", partial(self._forward, size, options)

    def _forward(self, size: Size, options: Options) -> Problem:
        problem = forward.problem(size, self.zeros, options, precisions=self.precisions)
        wanted = {
            dtype: names if pays(size.tokens, size.d_ff, size.d_model, fp8=dtype == "fp8") else {*names, BY_DEFAULT}
            for dtype, names in FORWARD.items()
        }
        kept = [case for case in problem.cases if case.race == "forward" and case.variant in wanted[case.dtype]]
        return replace(problem, cases=kept)

    def _training(self, size: Size, options: Options) -> Problem:
        problem = training.problem(*size[:3], Sparsity(self.zeros), options, variants=training.NO_ABLATIONS)
        kept = [case for case in problem.cases if case.race == "training" and case.variant in TRAINING]
        return replace(problem, cases=[case for case in kept if case.dtype in self.precisions])


def measure(plan: Plan, device: torch.device, smoke: bool = False) -> list[Record]:
    """Verify and time everything; records as the benches write them.

    `smoke` compiles nothing and takes few samples: times mean nothing then.
    """
    rounds = argparse.Namespace(rounds=3 if smoke else MIN_ROUNDS, seconds=SECONDS)
    options = Options(device, smoke, False, None, 0, rounds)
    header = environment.facts(device)
    records: list[Record] = []
    for bench, label, build in plan.problems(options):
        print(label, flush=True)
        new = harness.run_problem(bench, label, build, options, rounds, header)
        results.add_comparisons(new)
        records += new
        precompile.release()
    return records


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="time a feed-forward network of given sizes on this GPU, dense and 2:4",
        description="Times the squared-ReLU feed-forward network of the given sizes on this GPU: sparse24 against "
        "torch.compile, float8 in torch and a dense network with the activation in its first GEMM. Every output is "
        "verified before it is timed. Exit status 0: all outputs of sparse24 were verified; 1: one was wrong; 2: it "
        "could not run.",
    )
    parser.add_argument("--tokens", type=int, metavar="T", help="of one call")
    parser.add_argument("--d-model", type=int, metavar="D")
    parser.add_argument("--d-ff", type=int, metavar="F")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="sizes of these models; --tokens replaces theirs")
    parser.add_argument("--training", action="store_true", help="forward and backward too")
    parser.add_argument("--precision", choices=(*PRECISIONS, "all"), default="all", help="default: all")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the records")
    parser.add_argument("--plot", type=drawing_file, metavar="FILE", help="draw the speed-ups (needs matplotlib)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    plan = planned(args)
    if problem := env.cuda_problem():
        raise RuntimeError(f"sparse24.bench: expected a device that runs the kernels, got none: {problem}")
    if args.plot:
        _drawing()  # before anything is measured
    return report(plan, measure(plan, torch.device("cuda")), args.json, args.plot)


def planned(args: argparse.Namespace) -> Plan:
    """What the options ask for; refuses sizes that the kernels do not take."""
    sizes = (args.tokens, args.d_model, args.d_ff)
    if args.preset:
        if args.d_model or args.d_ff:
            raise RuntimeError("sparse24.bench: expected --preset or --d-model and --d-ff, got both")
        chosen = [size._replace(tokens=args.tokens or size.tokens) for size in preset(args.preset)]
    elif None in sizes:
        raise RuntimeError("sparse24.bench: expected --tokens, --d-model and --d-ff, or --preset, got not all of them")
    else:
        chosen = [Size(*sizes)]
    for size in chosen:
        for name, value, multiple in zip(("tokens", "d-model", "d-ff"), size, MULTIPLES, strict=False):
            if value <= 0 or value % multiple:
                rule = f"a positive multiple of {multiple}" if multiple > 1 else "positive"
                raise RuntimeError(f"sparse24.bench: expected --{name} to be {rule}, got {value}")
    precisions = PRECISIONS if args.precision == "all" else (args.precision,)
    return Plan(tuple(chosen), precisions, args.training)


def report(plan: Plan, records: list[Record], json: Path | None, plot: Path | None) -> int:
    """Print tables and what they mean, write the files; 0 if everything of ours was verified."""
    verdict.show(plan.sizes, records)
    if json:
        results.write_json(json, records)
    if plot:
        drawing = _drawing()
        figure = drawing.speedups(records)
        if figure is not None:
            plot.parent.mkdir(parents=True, exist_ok=True)
            drawing.save(figure, plot)
    ours = [r for r in records if r["role"] == "sparse24"]
    return 0 if ours and all(r["verified"] for r in ours) else 1


def _drawing():
    try:
        from sparse24.bench import drawing
    except ImportError as error:
        raise RuntimeError(f"sparse24.bench: expected matplotlib for --plot, got none: {error}") from error
    return drawing
