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

On a GPU each model is in a process of its own, with all of its variants. They build and compile at the same time,
before anything is timed, which is most of what this takes; then one of them works at a time. What torch chooses by
timing small kernels it chooses while others compile.

Verified: the hidden states of one token for each sequence against the model in float32, with at most twice the error of
the dense one; with float8 weights there is a bound.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from bench.cases import workers
from bench.cases.generate_model import MODES, Model, Ways, failed
from bench.cases.model_stacks import Stack
from sparse24.bench import environment, results
from sparse24.bench.options import Options, parse

FFN = ("up_proj", "down_proj")
STACKS = {
    "arcee": Stack("AFM-4.5B", "arcee", 32, 64, 2560, 18432, 20, 4, FFN),
    "nemotron": Stack("Nemotron-Mini-4B", "nemotron", 32, 64, 3072, 9216, 24, 8, FFN),
    "rwkv7": Stack("RWKV-7 FFN", "nemotron", 32, 64, 4096, 16384, 32, 8, FFN),
}
#: Modes and numbers of sequences. All models compile for the first race at once, for a later one when its turn comes.
RACES = "static:1,eager:8,eager:32,eager:1"
#: What a worker may take for anything, at most.
PATIENCE = 300.0


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
        "--processes", action=argparse.BooleanOptionalAction, help="one for each model (default: on a GPU)"
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
    made = {name: (stack, layers, batches, plain) for name, stack in stacks.items()}
    models = workers.begin(Model, made, apart)
    broken: dict[str, str] = {}
    collect(models, broken)
    stamped("built and verified")
    for name, model in models.items():
        if name not in broken:
            model.ask("prepare", *args.races[0])
    collect(models, broken)
    stamped("compiled")
    records: list[results.Record] = []
    for mode, batch in args.races:
        for name, stack in stacks.items():
            if time.perf_counter() - started > args.budget:
                stamped(f"not started, over the budget: {stack.name} {mode} {batch}")
                continue
            if name not in broken:
                models[name].ask("race", mode, batch)
            new = collect({name: models[name]}, broken).get(name) or failed(broken[name])
            facts = {"bench": "generate", "race": mode, "model": stack.name, "layers": layers, "batch": batch}
            facts |= {"tokens": batch, "d_model": stack.d_model, "d_ff": stack.d_ff, "pattern": "iid"}
            records += [facts | record | header for record in new]
            stamped(f"{stack.name} {mode} {batch}")
            print("\n".join(text_of(record) for record in records[-len(new) :]), flush=True)
            if args.out:
                results.write_json(args.out, records)
    for model in models.values():
        model.end()
    wrong = [r for r in records if not r["verified"]]
    print(f"generate: {len(records)} records, {len(wrong)} of them not verified")
    return 1 if wrong or not records else 0


def sized(stack: Stack, options: Options) -> Stack:
    if not options.smoke:
        return stack
    return stack._replace(batch=4, length=48, d_model=64, d_ff=256, heads=4, key_value_heads=4)


def collect(models: Mapping[str, workers.Here | workers.There], broken: dict[str, str]) -> dict[str, Any]:
    """Wait for the answers of those that are not broken; what went wrong is added to these."""
    found = {}
    for name, model in models.items():
        if name not in broken:
            try:
                found[name] = model.answer(PATIENCE)
            except RuntimeError as error:
                broken[name] = str(error)
    return found


def text_of(record: results.Record) -> str:
    time_us = "not verified: " + record["error"] if record["median_us"] is None else f"{record['median_us']:9.1f} us"
    over = f" {record['speedup_vs_best_dense']:.3f}x" if "speedup_vs_best_dense" in record else ""
    return f"{record['model']:<18}{record['race']:<8}batch {record['batch']:<4}{record['variant']:<14}{time_us}{over}"
