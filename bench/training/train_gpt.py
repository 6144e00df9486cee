"""Trains the same GPT with dense and with 2:4 FFNs on real text: what sparsity costs in loss, and gains in time.

    python -m bench train_gpt --out bench/results/<gpu>/train_gpt
    python -m bench train_gpt --out DIR --recipe default,no_mask_reuse,no_permutation,no_split --time-limit 570
    python -m bench train_gpt --out DIR --size 1280 --precision bf16,fp8 --corpus corpus.pt --tokens 50003968

12 layers, 768 wide, or 16 layers, 1280 wide, on Python sources: those of the machine, or a file that
`python -m bench corpus` made. Runs of a seed have the same initial weights and see the same tokens in the same order. A
sparse run is dense for its first `--warmup` steps. The seeds run dense and with the first recipe, in each precision;
the further recipes (ablations) run with the first seed only, last.

In fp8 all six products of an FFN are float8, whatever its width; the rest of the model is as in bf16. The dense rival
is that of the bench ffn_training: torch.compile around `torch._scaled_mm`, one scale a matrix, gradients in e5m2.

Each run writes its record, with the loss curve, into --out as it goes. Called again with the same --out, finished runs
are skipped and the others start anew, so several calls of limited time add up. `--time-limit` counts for the whole
process: no run starts that is unlikely to end in time, and one that does not end is recorded as incomplete.

Before its first sparse step each FFN is compared with the masked dense reference in float64 (a dense run: before its
first step, with the dense one), and the loss of the compiled step with that of the modules as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.reporting import train_table
from bench.training import corpus as text
from bench.training.log import Run, Settings
from bench.training.run import RECIPES, train
from sparse24.bench import environment
from sparse24.demo.model import Size

# For imports before the clock starts, and for the end of the process.
RESERVE_SECONDS = 15.0
SIZES = {"768": Size(), "1280": Size(layers=16, dim=1280, heads=10, hidden=5120)}
SMOKE_SIZE = Size(layers=2, dim=32, heads=2, hidden=128, sequence=64)


def main(argv: list[str] | None = None) -> int:
    started = time.perf_counter()
    args = parse(argv)
    settings = configure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    header = environment.facts(device)
    print("train_gpt: " + ", ".join(f"{k} {v}" for k, v in header.items() if v is not None), flush=True)
    torch._dynamo.config.recompile_limit = 64  # all runs share the block's code, two phases each

    held_out = settings.held_out_windows * (settings.size.sequence + 1)
    data = (
        text.load(args.corpus)
        if args.corpus
        else text.read(args.tokens, held_out, args.vocabulary, stdlib_only=args.smoke)
    )
    epochs = args.tokens / data.train.numel()
    print(
        f"[{time.perf_counter() - started:5.1f} s] {data.train.numel():,} tokens of {data.files:,} files, "
        f"{data.bytes_per_token} bytes each; {epochs:.2f} epochs of {settings.steps} steps; digest {data.digest}",
        flush=True,
    )
    facts_of_text = {"corpus": data.digest, "files": data.files, "epochs": round(epochs, 3)}
    config = settings.as_dict() | {"vocabulary": data.vocabulary} | facts_of_text
    deadline = started + args.time_limit - RESERVE_SECONDS
    longest = 0.0
    waiting: list[str] = []
    for run in plan(args):
        path = args.out / f"{run.name}.json"
        if finished(path, config):
            print(f"{run.name}: finished before", flush=True)
            continue
        begin = time.perf_counter()
        if begin + longest > deadline:
            waiting.append(run.name)
            continue
        print(f"\n[{begin - started:5.1f} s] {run.name}", flush=True)
        record = train(run, settings, data, device, deadline, header | {"config": config}, path)
        longest = max(longest, time.perf_counter() - begin)
        if not record["complete"]:
            waiting.append(run.name)
    records = train_table.read(args.out)
    print(f"\n{train_table.table(records)}")
    if waiting:
        print(f"\nnot finished, for want of time: {', '.join(waiting)}")
    failed = [r["variant"] for r in records if r.get("error")]
    print(f"\ntrain_gpt: {len(records)} records, {len(failed)} of them not verified", flush=True)
    return 1 if failed or not records else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for one JSON file per run")
    parser.add_argument("--ffn", default="dense,sparse", help="of dense,sparse")
    parser.add_argument("--precision", default="bf16", help="of bf16,fp8")
    parser.add_argument("--size", choices=tuple(SIZES), default="768", help="width of the model")
    parser.add_argument("--recipe", default="default", help=f"of {','.join(RECIPES)}; the first runs with every seed")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="trained on in one run")
    parser.add_argument("--batch-tokens", type=int, default=32_768, help="in one step")
    parser.add_argument("--every", type=int, default=10, help="steps per logged interval")
    parser.add_argument("--warmup", type=int, default=200, help="dense steps before the first sparse one")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--vocabulary", type=int, default=8192, help="256: bytes, without the package tokenizers")
    parser.add_argument("--corpus", type=Path, help="tokens that python -m bench corpus made")
    parser.add_argument("--time-limit", type=float, default=570.0, help="seconds for the whole process")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="tiny model on bytes: checks the code path")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.smoke:
        parser.error("a CPU would take days: add --smoke to check the code path")
    for name, known in (
        ("ffn", ("dense", "sparse")),
        ("precision", ("bf16", "fp8")),
        ("recipe", tuple(RECIPES)),
    ):
        chosen = getattr(args, name).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"expected --{name} to name some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        setattr(args, name, chosen)
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    if args.smoke:
        args.tokens, args.batch_tokens, args.warmup, args.vocabulary, args.eager = 2560, 256, 4, text.BYTES, True
    return args


def configure(args: argparse.Namespace) -> Settings:
    size = SMOKE_SIZE if args.smoke else SIZES[args.size]
    if args.batch_tokens % size.sequence != 0 or args.tokens < args.batch_tokens:
        raise SystemExit(
            f"expected --batch-tokens to be a multiple of {size.sequence} and at most --tokens, got {args.batch_tokens}"
        )
    return Settings(
        size=size,
        steps=args.tokens // args.batch_tokens,
        batch=args.batch_tokens // size.sequence,
        warmup=args.warmup,
        learning_rate=args.learning_rate,
        compile=not args.eager,
        held_out_windows=8 if args.smoke else 256,
        every=1 if args.smoke else args.every,
    )


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs in order of importance: whole seeds first, ablations last."""
    runs = []
    for seed in args.seeds:
        for precision in args.precision:
            runs += [Run("dense", "", seed, precision)] if "dense" in args.ffn else []
            runs += [Run("sparse", args.recipe[0], seed, precision)] if "sparse" in args.ffn else []
    if "sparse" in args.ffn:
        further = [(recipe, precision) for precision in args.precision for recipe in args.recipe[1:]]
        runs += [Run("sparse", recipe, args.seeds[0], precision) for recipe, precision in further]
    return runs


def finished(path: Path, config: dict[str, Any]) -> bool:
    """Whether `path` holds a complete run of this configuration; another configuration is not overwritten."""
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    expected = json.loads(json.dumps(config))
    if record["config"] != expected:
        differing = [k for k in expected if record["config"].get(k) != expected[k]]
        raise SystemExit(f"{path} is of another configuration ({', '.join(differing)}): choose another --out")
    return record["complete"]
