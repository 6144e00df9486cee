"""Training steps on several GPUs: sharded, data-parallel and tensor-parallel, dense and 2:4.

    python -m bench distributed --gpus 4 --out bench/results/<gpu>/distributed.json --budget 200
    torchrun --nproc-per-node=8 -m bench distributed --out FILE          # also on several machines
    python -m bench distributed --gpus 2 --sizes nemotron --ways fsdp2,tensor --variants fused_dense,sparse24

Without torchrun it starts a process for each GPU. Sizes: two to six layers (model.py) of the widths of Nemotron-H-8B,
nanochat d26 and d32, AFM-4.5B and, with experts, Nemotron-3 Nano. Ways (parallel.py): `fsdp2` (float32 weights,
gathered in bfloat16, gradients summed in float32), `fsdp2_engines` (the same by copy engines), in float8
`fsdp2_float8`, `fsdp2_float8_once` and `fsdp2_float8_engines` (codes of the networks' weights gathered in both passes,
in one, and so by copy engines), `tensor` (with sequence parallelism), `ddp`, and for experts `expert`; `alone` is each
GPU by itself at the same time. Variants: dense and 2:4 networks, in bfloat16 and with all six products in float8; the
rest of a layer is the same.

A step is a forward and a backward pass without an optimizer, until all gradients have their sums; every GPU brings its
own tokens. `scaling` is the time of one GPU over that of the way, `gain_kept` the speed-up of 2:4 over dense beside
that on one GPU; profile.py tells what the GPU does meanwhile. Verified against one GPU: output, gradients of x and of
all weights.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bench.distributed import model
from bench.distributed.model import VARIANTS
from bench.distributed.parallel import WAYS
from bench.distributed.race import race
from sparse24.bench import environment, precompile, results, text
from sparse24.bench.options import parse

TIMEOUT = timedelta(seconds=90)
#: What says how kernels and collectives share a GPU, and where a record says it.
ENVIRONMENT = {"SPARSE24_SM_MARGIN": "sm_margin", "NCCL_MAX_CTAS": "nccl_max_ctas"}


def arguments(parser: argparse.ArgumentParser) -> None:
    def some_of(known: dict[str, object]):
        def names(value: str) -> list[str]:
            if unknown := set(value.split(",")) - set(known):
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")
            return value.split(",")

        return names

    def add(option: str, known: dict, help: str) -> None:
        parser.add_argument(option, type=some_of(known), default=list(known), help=f"{help}: {','.join(known)}")

    parser.add_argument("--gpus", type=int, help="processes, one for each GPU (default: all; with torchrun: its own)")
    add("--sizes", model.SIZES, "in this order")
    add("--ways", WAYS, "how layers are spread")
    add("--variants", VARIANTS, "of their networks")
    parser.add_argument("--layers", type=int, help="of every size, in place of its own")
    parser.set_defaults(rounds=5, budget=200.0)


def main(argv: list[str] | None = None) -> int:
    options, args = parse(__doc__, argv, arguments)
    if "RANK" in os.environ:  # torchrun
        return work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None, args)
    gpus = args.gpus or (2 if options.device.type == "cpu" else torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        if gpus == 1:
            return work(0, 1, store, args)
        torch.multiprocessing.spawn(_process, (gpus, store, args), nprocs=gpus)
    return _status(results.read_json([args.out])) if args.out else 0


def _process(rank: int, ranks: int, store: Path, args: argparse.Namespace) -> None:
    work(rank, ranks, store, args)


def work(rank: int, ranks: int, store: Path | None, args: argparse.Namespace) -> int:
    """One rank's part of everything."""
    started = time.perf_counter()
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{store}" if store else "env://",
        rank=rank,
        world_size=ranks,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    header = environment.facts(device)
    if device.type == "cuda":
        header["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    header |= {field: int(os.environ[name]) for name, field in ENVIRONMENT.items() if os.environ.get(name)}
    records: list[results.Record] = []
    sizes = model.SMOKE if args.smoke else {name: model.SIZES[name] for name in args.sizes}
    ways = [WAYS[name] for name in args.ways]
    for name, size in sizes.items():
        size = size._replace(layers=args.layers or size.layers)
        elapsed = time.perf_counter() - started
        over = torch.tensor(float(elapsed > args.budget), device=device)
        dist.broadcast(over, 0)  # all ranks stop at the same size
        if over:
            _say(rank, f"not started, over the budget of {args.budget:.0f} s: {name}")
            continue
        _say(rank, f"\n[{elapsed:5.1f} s] distributed {size.name}, {ranks} GPUs")
        new = [r | header for r in race(size, ways, args.variants, device, args.seed, args.rounds)]
        _say(rank, text.table(new))
        records += new
        if rank == 0 and args.out:
            results.write_json(args.out, records)
        precompile.release()
    dist.barrier()
    dist.destroy_process_group()
    return _status(records)


def _status(records: list[results.Record]) -> int:
    ours = [r for r in records if r["role"] == "sparse24"]
    failed = [r for r in ours if not r["verified"]]
    return 1 if failed or not ours else 0


def _say(rank: int, words: str) -> None:
    if rank == 0:
        print(words, flush=True)
