"""Generation with models of transformers before and after `sparse24.convert(decode=True)`, eager and compiled.

    python -m bench generate --out bench/results/<gpu>/generate.json --budget 160
    python -m bench generate --out generate.json --models nemotron --races static:1,eager:8 --layers 16

Nemotron-Mini-4B, AFM-4.5B and a model with the FFN of RWKV-7 (4096 -> 16384), with as many layers and words as they
have (RWKV-7's of 7 billion parameters): bfloat16, random weights, 90 % zeros (model_stacks.py). `generate` runs as
users call it, with so many sequences: `eager` with its own cache, `static` with a static cache, which it compiles.
Variants: `dense` (the model as it is), `sparse24` (converted) and `sparse24_fp8` (with float8 copies of the FFNs'
weights). Times are from one token to the next: the median of a call, without the first tokens. A host's speed may
change by a third within seconds, so variants take turns call by call, and times are compared within a round: a record's
is the median of the model as it is, by the median of the ratios to that. What follows a prompt is a text of random
words, to which the layers' zeros are calibrated, whatever the model would say: left to itself it repeats one, with
which half of the neurons are active.

On a GPU each variant of each model is in a process of its own. They build and compile at the same time, before anything
is timed, which is most of what this takes; then one of them works at a time, and those that are compared on the same
core, since cores differ too. What torch chooses by timing small kernels it chooses while others compile. All three
models take 120 GB.

Verified: the hidden states of one token for each sequence against the model in float32, with at most twice the error of
the dense one. With float8 weights each network is compared with its own weights in float32, and has a bound.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from bench.cases import workers
from bench.cases.generate_model import CONFIGS, MODES, Variant, Ways, Whole, begun, by_rounds, turns
from bench.cases.model_stacks import Stack
from sparse24.bench import environment, results
from sparse24.bench.options import Options, parse

FFN = ("up_proj", "down_proj")
MODELS = {
    "arcee": Whole(Stack("AFM-4.5B", "arcee", 32, 64, 2560, 18432, 20, 4, FFN, "o_proj"), 36, 128_004),
    "nemotron": Whole(Stack("Nemotron-Mini-4B", "nemotron", 32, 64, 3072, 9216, 24, 8, FFN, "o_proj"), 32, 256_000),
    "rwkv7": Whole(Stack("RWKV-7 FFN", "nemotron", 32, 64, 4096, 16384, 32, 8, FFN, "o_proj"), 32, 65_536),
}
#: Modes and numbers of sequences. All variants compile for the first race at once, for a later one when its turn comes.
RACES = "static:1,eager:8,eager:32,eager:1"
#: What a worker may take for anything once the budget is spent.
PATIENCE = 20.0

#: A variant of a model.
Key = tuple[str, str]
Workers = Mapping[Key, "workers.Here | workers.There"]


def races_of(text: str) -> Ways:
    found = []
    for race in text.split(","):
        mode, _, batch = race.partition(":")
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(MODES)}, got {mode}")
        if int(batch) < 1:
            raise argparse.ArgumentTypeError(f"expected at least one sequence, got {batch}")
        found.append((mode, int(batch)))
    return found


def arguments(parser: argparse.ArgumentParser) -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--models", type=names, default=list(MODELS), help=f"default: {','.join(MODELS)}")
    parser.add_argument(
        "--races", type=races_of, default=races_of(RACES), help=f"modes and sequences (default: {RACES})"
    )
    parser.add_argument("--layers", type=int, help="of each model (default: as many as it has)")
    parser.add_argument(
        "--processes", action=argparse.BooleanOptionalAction, help="one for each variant (default: on a GPU)"
    )


def main(argv: list[str] | None = None) -> int:
    options, args = parse(__doc__, argv, arguments)
    started, header = time.perf_counter(), environment.facts(options.device)

    def stamped(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {text}", flush=True)

    batches = sorted({batch for _, batch in args.races})
    models = {name: sized(MODELS[name], options, args.layers, max(batches)) for name in args.models}
    apart = options.device.type == "cuda" if args.processes is None else args.processes
    plain = Options(options.device, options.smoke, options.quick, None, options.seed, argparse.Namespace())
    made = {(name, one): (one, model, batches, plain) for name, model in models.items() for one in CONFIGS}
    team = Team(workers.begin(Variant, made, apart), started + args.budget)
    stamped("built and verified")
    team.all_of(made, dict(team.broken), "prepare", *args.races[0])
    stamped("compiled")
    records: list[results.Record] = []
    core = max(os.sched_getaffinity(0)) if apart and options.device.type == "cuda" else None
    for mode, batch in args.races:
        for name, (stack, layers, _) in models.items():
            if time.perf_counter() - started > args.budget:
                stamped(f"not started, over the budget: {stack.name} {mode} {batch}")
                continue
            rounds = 1 if options.smoke else MODES[mode].rounds
            new = race(team, [(name, one) for one in CONFIGS], mode, batch, rounds, core)
            facts = {"bench": "generate", "race": mode, "model": stack.name, "layers": layers, "batch": batch}
            facts |= {"tokens": batch, "d_model": stack.d_model, "d_ff": stack.d_ff, "pattern": "iid"}
            records += [facts | record | header for record in new]
            stamped(f"{stack.name} {mode} {batch}")
            print("\n".join(text_of(record) for record in records[-len(new) :]), flush=True)
            if args.out:
                results.write_json(args.out, records)
    team.end()
    wrong = [r for r in records if not r["verified"]]
    print(f"generate: {len(records)} records, {len(wrong)} of them not verified")
    return 1 if wrong or not records else 0


def sized(model: Whole, options: Options, layers: int | None, sequences: int) -> Whole:
    """The model as it is asked for, with a text of as many sequences as any race has."""
    if not options.smoke:
        stack = model.stack._replace(batch=max(model.stack.batch, sequences))
        return model._replace(stack=stack, layers=layers or model.layers)
    stack = model.stack._replace(batch=max(4, sequences), length=48, d_model=64, d_ff=256, heads=4, key_value_heads=4)
    return Whole(stack, 2, 100)


class Team:
    """The variants of all models, which are waited for until `end`, a time of `perf_counter`."""

    def __init__(self, workers: Workers, end: float) -> None:
        self.workers, self.patient_until = workers, end + PATIENCE
        self.broken: dict[Key, str] = {}
        """Those that were not built, and why."""
        self.answers(workers, self.broken)

    def answers(self, keys: Iterable[Key], errors: dict[Key, str]) -> dict[Key, Any]:
        """What they answer; what went wrong is added to the errors."""
        found = {}
        for key in keys:
            try:
                found[key] = self.workers[key].answer(max(PATIENCE, self.patient_until - time.perf_counter()))
            except RuntimeError as error:
                errors[key] = str(error)
        return found

    def all_of(self, keys: Iterable[Key], errors: dict[Key, str], method: str, *arguments: Any) -> dict[Key, Any]:
        """Ask all without an error at the same time, and give their answers."""
        keys = [key for key in keys if key not in errors]
        for key in keys:
            self.workers[key].ask(method, *arguments)
        return self.answers(keys, errors)

    def end(self) -> None:
        for worker in self.workers.values():
            worker.end()


def race(team: Team, keys: list[Key], mode: str, batch: int, rounds: int, core: int | None) -> list[results.Record]:
    """A record of each variant: those that are right take turns, in rounds, all of them on one core."""
    errors = {key: team.broken[key] for key in keys if key in team.broken}
    team.all_of(keys, errors, "prepare", mode, batch)
    found = team.all_of(keys, errors, "record", batch)
    right = [key for key, record in found.items() if record["verified"]]
    if core is not None:
        team.all_of(right, errors, "stay", core)
    times: list[dict[str, float]] = []
    for count in range(1 + rounds):
        new = {}
        for key in turns(right, count):
            new |= {variant: us for (_, variant), us in team.all_of([key], errors, "token_us", mode, batch).items()}
        times += [new] if count else []  # the first one warms up
    if core is not None:
        team.all_of(right, errors, "stay", None)
    records = []
    for key in keys:
        record = found.get(key, begun(key[1]))
        if key in errors:
            record = record | {"verified": False, "error": errors[key]}
        records.append(record | by_rounds(times, key[1]) if record["verified"] else record)
    return records


def text_of(record: results.Record) -> str:
    time_us = "not verified: " + record["error"] if record["median_us"] is None else f"{record['median_us']:9.1f} us"
    over = f" {record['speedup_vs_best_dense']:.3f}x" if "speedup_vs_best_dense" in record else ""
    return f"{record['model']:<18}{record['race']:<8}batch {record['batch']:<4}{record['variant']:<14}{time_us}{over}"
