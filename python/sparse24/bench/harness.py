"""Cases, problems and the loop that verifies, times and records them: nothing is timed unchecked.

A bench file describes problems (one size and its data); a problem holds the cases (variants) that are timed against
each other; `run_bench` does the rest and writes one record per case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse24.bench import compile_cache, environment, precompile, reference, results, text, timing
from sparse24.bench.options import Arguments, Options, parse, resumed
from sparse24.bench.precompile import Job

Output = torch.Tensor | tuple[torch.Tensor, ...]
Check = Callable[[Any], dict[str, Any] | None]

SUSTAINED_SECONDS = 0.2


@dataclass
class Stack:
    """Calls of a variant one after another, each with weights of its own, as the layers of a model.

    `run` takes a counter, enqueues the `calls`, and returns the outputs of the first and of the last one.
    """

    run: Callable[[int], Sequence[torch.Tensor]]
    calls: int


@dataclass
class Case:
    """One variant of one problem: something to run, and the check its output must pass before it is timed.

    Attributes
    ----------
    variant, dtype : str
        Its names in the records.
    run : callable
        Takes a counter, enqueues the work, returns the output.
    check : callable
        Takes the output; raises if it is wrong, else returns facts for the record (its error).
    role : {"sparse24", "dense", "cusparselt", "part", "roof"}
        Ours, a rival, a share of a whole that is timed alone, or a ceiling of the machine.
    race : str
        Cases of one race and dtype compute the same thing and are compared.
    flops : float
        Of one run of the *dense* computation: rates are dense-equivalent.
    bytes : float
        The fewest bytes one run can move: each input read once, each output written once.
    tokens : int
        Of one run, where users count tokens per second.
    stack : Stack, optional
        The same as the layers of a model: verified by the same check, and timed beside.
    """

    variant: str
    dtype: str
    run: Callable[[int], Output]
    check: Check
    role: str = "dense"
    race: str = "forward"
    flops: float = 0.0
    bytes: float = 0.0
    tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    stack: Stack | None = None
    error: str | None = None
    output: Output | None = None

    def verify(self) -> None:
        """Run on poisoned memory and check; an exception means the case must not be timed.

        On a GPU `peak_bytes` is the most that a run allocates, its output included.
        """
        outputs = _tensors(self.run(0))
        sizes = [t.numel() * t.element_size() for t in outputs]
        device = outputs[0].device
        del outputs
        # The allocator hands freed blocks of the same size out again: what the case leaves unwritten is then NaN.
        poison = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for size in sizes]
        del poison
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        self.output = self.run(0)
        if device.type == "cuda":
            self.facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        self.facts.update(self.check(self.output) or {})
        for output in self.stack.run(0) if self.stack else ():
            self.check(output)

    def repeats_itself(self) -> bool:
        """Another run gives the bits that were verified."""
        pairs = zip(_tensors(self.run(0)), _tensors(self.output), strict=True)
        return all(reference.same_bits(now, then) for now, then in pairs)


def attempt(build: Callable[[], Case | list[Case]], **names: str) -> list[Case]:
    """The cases of `build()`, or one unverified case of these names with the reason why there are none."""
    try:
        built = build()
    except Exception as error:
        return [Case(**names, run=_unavailable, check=_unavailable, error=describe(error))]
    return [built] if isinstance(built, Case) else built


def _unavailable(_: Any) -> Any:
    raise RuntimeError("unavailable")


@dataclass
class Problem:
    """Cases on the same data. `repeat` and `evict` as in timing.measure.

    Cases of the races in `sustained` are also timed back to back, each for twice SUSTAINED_SECONDS.
    """

    tokens: int
    d_model: int
    d_ff: int
    zeros: float
    cases: list[Case]
    pattern: str = "iid"
    repeat: int = 1
    evict: bool = True
    sustained: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def run_bench(
    bench: str,
    problems: Callable[[Options], Iterable[tuple[str, Callable[[], Problem]]]],
    description: str | None = None,
    argv: list[str] | None = None,
    top: int | None = None,
    arguments: Arguments | None = None,
    compilations: Callable[[Options], Iterable[tuple[str, list[Job]]]] | None = None,
) -> int:
    """Run all problems of a bench file; 0 if every sparse24 case was verified and timed.

    `top` prints only that many of a problem's cases, fastest first, and ours. `arguments` adds options of the bench
    file to the command line, which it finds in `Options.extra`. `compilations` names what each problem has compiled,
    for `--workers` to do it before; their share of the budget is half.
    """
    options, args = parse(description, argv, arguments)
    started = time.perf_counter()
    header = environment.facts(options.device)
    print(f"{bench}: " + ", ".join(f"{k} {v}" for k, v in header.items() if v is not None), flush=True)
    records = resumed(args.resume, header)
    before = {record["problem"] for record in records}
    if before:
        print(f"{len(records)} records of {len(before)} problems are from before", flush=True)
    compile_cache.load(args.compile_cache)
    if args.workers and compilations and not options.smoke:  # the smoke run compiles nothing
        jobs = [job for label, some in compilations(options) if label not in before for job in some]
        precompile.run(jobs, args.workers, options.device, args.budget / 2)
    skipped = []
    for label, build in problems(options):
        if label in before:
            continue
        elapsed = time.perf_counter() - started
        if elapsed > args.budget:
            skipped.append(label)
            continue
        print(f"\n[{elapsed:5.1f} s] {bench} {label}", flush=True)
        new = run_problem(bench, label, build, options, args, header)
        results.add_comparisons(new)
        print(text.table(_best(new, top) if top else new), flush=True)
        records += new
        if args.out:
            results.write_json(args.out, records)
        precompile.release()
    if args.out:
        results.write_json(args.out, records)
    compile_cache.save(args.compile_cache)
    if args.workers and not options.smoke:
        print(f"\n{precompile.graphs()}", flush=True)
    if skipped:
        print(f"\nnot started, over the budget of {args.budget:.0f} s: {'; '.join(skipped)}", flush=True)
    ours = [r for r in records if r["role"] == "sparse24"]
    failed = [r for r in ours if not r["verified"]]
    print(f"\n{bench}: {len(records)} records, {len(ours)} of sparse24, {len(failed)} of them not verified", flush=True)
    return 1 if failed or not ours else 0


def run_problem(
    bench: str,
    label: str,
    build: Callable[[], Problem],
    options: Options,
    args: argparse.Namespace,
    header: dict[str, Any],
) -> list[dict[str, Any]]:
    """Build the data, verify all cases, time the verified ones, make records of all."""
    marks = [time.perf_counter()]
    try:
        problem = build()
    except Exception as error:
        failed = Case("sparse24", "", _unavailable, _unavailable, role="sparse24", error=describe(error))
        return [_record(bench, label, Problem(0, 0, 0, 0.0, []), failed, None, header)]
    marks.append(time.perf_counter())
    for case in problem.cases:
        if case.error is None:
            try:
                case.verify()
            except Exception as error:
                case.error = describe(error)
    marks.append(time.perf_counter())
    sound = [case for case in problem.cases if case.error is None]
    timings: dict[int, timing.Timing] = {}
    try:
        results = timing.measure(
            [case.run for case in sound],
            options.device,
            rounds=args.rounds,
            seconds=args.seconds,
            repeat=problem.repeat,
            evict=problem.evict,
        )
        for case, result in zip(sound, results, strict=True):
            timings[id(case)] = result
            case.facts["repeatable"] = case.repeats_itself()
            if case.role == "sparse24" and not case.facts["repeatable"]:
                case.error = "another run gave other bits"
        _time_stacks([case for case in sound if case.stack], timings, options, args.rounds)
        if problem.sustained:
            _sustain([case for case in sound if case.race in problem.sustained], timings, options)
    except Exception as error:
        for case in sound:
            case.error = case.error or f"timing: {describe(error)}"
    marks.append(time.perf_counter())
    phases = zip(("build", "verify", "time"), marks, marks[1:], strict=False)
    print(", ".join(f"{name} {end - start:.1f} s" for name, start, end in phases), flush=True)
    # The first GEMM of dense weights is a bench of its own; that of 2:4 ones is not one of its variants.
    names = ["gemm1" if case.race == "gemm1" and bench != "ffn_weights" else bench for case in problem.cases]
    return [
        _record(name, label, problem, case, timings.get(id(case)), header)
        for name, case in zip(names, problem.cases, strict=True)
    ]


def _time_stacks(cases: list[Case], timings: dict[int, timing.Timing], options: Options, rounds: int) -> None:
    """Adds the times of a call in a stack: in the fewest rounds, for a sample is the mean of its calls."""
    stacks = [case.stack for case in cases if case.stack]
    if not stacks:
        return
    rounds = min(rounds, timing.MIN_ROUNDS)
    found = timing.measure([stack.run for stack in stacks], options.device, rounds=rounds, seconds=0.0)
    for case, stack, result in zip(cases, stacks, found, strict=True):
        case.facts["layers"] = stack.calls
        timings[id(case)].stack_us = result.median_us / stack.calls


def _sustain(cases: list[Case], timings: dict[int, timing.Timing], options: Options) -> None:
    """Adds the times back to back."""
    known = [timings[id(case)] for case in cases]
    seconds = 0.0 if options.smoke else SUSTAINED_SECONDS
    times = timing.sustain([case.run for case in cases], options.device, known, seconds=seconds)
    for one, time_us in zip(known, times, strict=True):
        one.sustained_us = time_us


def compiled(
    function: Callable[..., torch.Tensor], options: Options, dynamic: bool = False
) -> Callable[..., torch.Tensor]:
    """torch.compile with static shapes; the function itself in the smoke run, which must not need a compiler.

    `dynamic` is for elementwise functions, which lose nothing by it: the next size finds their kernel in the cache.
    """
    return function if options.smoke else precompile.compiled(function, dynamic)


def describe(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def _best(records: list[dict[str, Any]], top: int) -> list[dict[str, Any]]:
    ranked = sorted(records, key=lambda r: r["median_us"] or float("inf"))
    return [r for i, r in enumerate(ranked) if i < top or r["role"] == "sparse24" or not r["verified"]]


def _tensors(output: Output) -> tuple[torch.Tensor, ...]:
    return (output,) if isinstance(output, torch.Tensor) else tuple(output)


def _record(
    bench: str, label: str, problem: Problem, case: Case, result: timing.Timing | None, header: dict[str, Any]
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "bench": bench,
        "problem": label,
        "variant": case.variant,
        "dtype": case.dtype,
        "tokens": problem.tokens,
        "d_model": problem.d_model,
        "d_ff": problem.d_ff,
        "zeros": round(problem.zeros, 4),
        "pattern": problem.pattern,
        "race": case.race,
        "role": case.role,
        "verified": case.error is None,
        "median_us": None,
    }
    if case.error is not None:
        record["error"] = case.error
    record |= {k: float(f"{v:.3e}") if isinstance(v, float) else v for k, v in (problem.facts | case.facts).items()}
    if result is not None and case.error is None:
        seconds = result.median_us * 1e-6
        record["median_us"] = round(result.median_us, 2)
        record["iqr_us"] = round(result.iqr_us, 2)
        record["min_us"] = round(result.min_us, 2)
        record["rounds"] = result.rounds
        record["host_us"] = round(result.host_us, 1)
        record["pause_us"] = result.pause_us
        if result.sustained_us is not None:
            record["sustained_us"] = round(result.sustained_us, 2)
        if result.stack_us is not None:
            record["stack_us"] = round(result.stack_us, 2)
        if case.flops:
            record["tflops_dense_equivalent"] = round(case.flops / seconds / 1e12, 1)
        if case.bytes:
            record["gb_per_s"] = round(case.bytes / seconds / 1e9, 1)
        if case.tokens:
            record["tokens_per_s"] = round(case.tokens / seconds, 1)
        record |= result.clocks
    return record | header
