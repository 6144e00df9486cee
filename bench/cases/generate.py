"""Generation with models of transformers before and after `sparse24.convert(decode=True)`, eager and compiled.

    python -m bench generate --out bench/results/<gpu>/generate.json --budget 300
    python -m bench generate --out generate.json --models nemotron --races static:1,eager:8

Layers of Nemotron-Mini-4B, AFM-4.5B and a model with the FFN of RWKV-7 (4096 -> 16384), with attention and norms, and
a head of eight words: bfloat16, random weights, 90 % zeros (model_stacks.py). Sixteen of each: with a static cache a
step of `generate` takes the host a millisecond beside them, which deep models hide. `generate` runs as users call it,
with so many sequences: `eager` with its own cache, `static` with a static cache, which it compiles. Variants: `dense`
(the model as it is), `sparse24` (converted) and `sparse24_fp8` (with float8 copies of the FFNs' weights). Times are of
one token: of a long call less a short one, over their difference, so that the prompt does not count. A host's speed may
change by a third within seconds, so variants take turns every few tokens, and times are compared within a round: a
record's is the median of the model as it is, by the median of the ratios to that.

On a GPU each variant of each model is in a process of its own. They build and compile at the same time, before
anything is timed, which is most of what this takes; then one of them works at a time, in each round all on the same
core of the host, whose cores differ. What torch chooses by timing small kernels it chooses while others compile.

Verified: the hidden states of one token for each sequence against the model in float32, with at most twice the error of
the dense one; with float8 weights there is a bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

from bench.cases import workers
from bench.cases.generate_variant import CONFIGS, MODES, ZEROS, Variant
from bench.cases.model_stacks import Stack
from sparse24.bench import environment, results
from sparse24.bench.options import Options, parse

FFN = ("up_proj", "down_proj")
STACKS = {
    "arcee": Stack("AFM-4.5B", "arcee", 32, 64, 2560, 18432, 20, 4, FFN),
    "nemotron": Stack("Nemotron-Mini-4B", "nemotron", 32, 64, 3072, 9216, 24, 8, FFN),
    "rwkv7": Stack("RWKV-7 FFN", "nemotron", 32, 64, 4096, 16384, 32, 8, FFN),
}
#: Modes and numbers of sequences. What is compiled comes first: it is compiled before anything is timed.
RACES = "static:1,eager:8,eager:32,eager:1"
#: How often each variant takes its turn: an eager token takes the host five times as long.
ROUNDS = {"eager": 9, "static": 15}
#: What a worker may take for anything, at most.
PATIENCE = 300.0

Ways = list[tuple[str, int]]
Workers = Mapping[str, workers.Here | workers.There]


def races_of(text: str) -> Ways:
    found = []
    for race in text.split(","):
        mode, _, batch = race.partition(":")
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(MODES)}, got {mode}")
        found.append((mode, int(batch)))
    return found


def arguments(parser: argparse.ArgumentParser) -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--models", type=names, default=list(STACKS), help=f"default: {','.join(STACKS)}")
    parser.add_argument(
        "--races", type=races_of, default=races_of(RACES), help=f"modes and sequences (default: {RACES})"
    )
    parser.add_argument("--layers", type=int, default=16, help="of each model (default: 16)")
    parser.add_argument(
        "--processes", action=argparse.BooleanOptionalAction, help="one for each variant (default: on a GPU)"
    )


def main(argv: list[str] | None = None) -> int:
    options, args = parse(__doc__, argv, arguments)
    started, header = time.perf_counter(), environment.facts(options.device)

    def stamped(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {text}", flush=True)

    layers = 2 if options.smoke else args.layers
    batches = sorted({batch for _, batch in args.races})
    stacks = {name: sized(STACKS[name], options) for name in args.models}
    apart = options.device.type == "cuda" if args.processes is None else args.processes
    plain = Options(options.device, options.smoke, options.quick, None, options.seed, argparse.Namespace())
    made = {(name, v): (stacks[name], layers, v, batches, plain) for name in args.models for v in CONFIGS}
    all_workers = workers.begin(Variant, made, apart)
    broken = answers(all_workers)
    stamped("built and verified")
    ask(all_workers, broken, "prepare", [way for way in args.races if way[0] == "static"])
    broken |= answers(all_workers, broken)
    stamped("compiled")
    records: list[results.Record] = []
    for mode, batch in args.races:
        for name, stack in stacks.items():
            if time.perf_counter() - started > args.budget:
                stamped(f"not started, over the budget: {stack.name} {mode} {batch}")
                continue
            mine = {v: all_workers[name, v] for v in CONFIGS}
            new = race(mine, {v: broken[name, v] for v in CONFIGS if (name, v) in broken}, mode, batch, options.smoke)
            facts = {"bench": "generate", "race": mode, "model": stack.name, "layers": layers, "batch": batch}
            facts |= {"tokens": batch, "d_model": stack.d_model, "d_ff": stack.d_ff, "pattern": "iid"}
            records += [facts | record | header for record in new]
            stamped(f"{stack.name} {mode} {batch}")
            print("\n".join(text_of(record) for record in records[-len(new) :]), flush=True)
            if args.out:
                results.write_json(args.out, records)
    for worker in all_workers.values():
        worker.end()
    failed = [r for r in records if not r["verified"]]
    print(f"generate: {len(records)} records, {len(failed)} of them not verified")
    return 1 if failed or not records else 0


def sized(stack: Stack, options: Options) -> Stack:
    if not options.smoke:
        return stack
    return stack._replace(batch=4, length=48, d_model=64, d_ff=256, heads=4, key_value_heads=4)


def ask(asked: Mapping[Any, Any], broken: Mapping[Any, str], method: str, *what: Any) -> None:
    for key, worker in asked.items():
        if key not in broken:
            worker.ask(method, *what)


def answers(asked: Mapping[Any, Any], broken: Mapping[Any, str] | None = None) -> dict[Any, str]:
    """Wait for all; what went wrong, by worker."""
    found = {}
    for key, worker in asked.items():
        if key not in (broken or {}):
            try:
                worker.answer(PATIENCE)
            except RuntimeError as error:
                found[key] = str(error)
    return found


def text_of(record: results.Record) -> str:
    time_us = "not verified: " + record["error"] if record["median_us"] is None else f"{record['median_us']:9.1f} us"
    over = f" {record['speedup_vs_best_dense']:.3f}x" if "speedup_vs_best_dense" in record else ""
    return f"{record['model']:<18}{record['race']:<8}batch {record['batch']:<4}{record['variant']:<14}{time_us}{over}"


def race(mine: Workers, broken: Mapping[str, str], mode: str, batch: int, smoke: bool) -> list[results.Record]:
    """A record of each variant, by those that were verified taking turns."""
    apart = any(isinstance(worker, workers.There) for worker in mine.values())
    named: dict[str, results.Record] = {}
    for name, worker in mine.items():
        named[name] = {"variant": name, "role": "dense" if name == "dense" else "sparse24", "median_us": None}
        named[name] |= {"dtype": "fp8" if name.endswith("fp8") else "bf16"}
        if name in broken:
            named[name] |= {"zeros": ZEROS, "verified": False, "error": broken[name]}
        else:
            worker.ask("facts", batch)
            named[name] |= worker.answer(PATIENCE)
    cores = sorted(os.sched_getaffinity(0)) if apart else [None]
    rounds: list[dict[str, float]] = []
    for count in range(1 + (1 if smoke else ROUNDS[mode])):
        times = {}
        for name, worker in turns(mine, count):
            if named[name]["verified"]:
                worker.ask("time", mode, batch, cores[count % len(cores)])
                try:
                    times[name] = worker.answer(PATIENCE)
                except RuntimeError as error:
                    named[name] |= {"verified": False, "error": f"timing: {error}"}
        rounds += [times] if count else []  # the first one warms up
    return [r | by_rounds(rounds, name) if r["verified"] else r for name, r in named.items()]


def turns(calls: Mapping[str, Any], count: int) -> list[tuple[str, Any]]:
    """The calls in the order of a round: each begins with another one."""
    first = count % len(calls)
    return [*calls.items()][first:] + [*calls.items()][:first]


def by_rounds(rounds: list[dict[str, float]], name: str) -> dict[str, float]:
    """A variant's time, and its speed-up over the dense one: of times in the same round."""
    if any("dense" not in times for times in rounds):
        return {"median_us": round(statistics.median(times[name] for times in rounds), 1)}
    dense = statistics.median(times["dense"] for times in rounds)
    ratio = statistics.median(times["dense"] / times[name] for times in rounds)
    found = {"median_us": round(dense / ratio, 1)}
    return found if name == "dense" else found | {"speedup_vs_best_dense": round(ratio, 3)}
