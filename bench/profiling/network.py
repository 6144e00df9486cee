"""The call that `stalls` has profiled: one of the network, of which a profiler sees the last only."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch

import sparse24
from sparse24.bench.ffn import weights
from sparse24.bench.inputs import mlp_inputs
from sparse24.bench.sizes import Size

ZEROS = 0.9


def parser(description: str | None) -> argparse.ArgumentParser:
    """Say which call of the network."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(8192, 4096, 16384), metavar=("TOKENS", "D_MODEL", "D_FF"))
    parser.add_argument("--precision", choices=("16bit", "fp8"), default="16bit")
    parser.add_argument("--sparse-weights", choices=("none", "up", "both"), default="none")
    parser.add_argument("--forward", action="store_true", help="without the backward pass")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__).parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    call = network(options, device)
    call()
    with torch.cuda.profiler.profile() if device.type == "cuda" else nullcontext():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return 0


def network(options: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """Make the call, with about `ZEROS` of the activation zero."""
    if options.sparse_weights == "none":
        tensors = mlp_inputs(*options.size, ZEROS, device=device, seed=0)
    else:
        tensors = weights.operands(Size(*options.size), ZEROS, device, 0)
    leaves = [t.requires_grad_(not options.forward) for t in tensors]
    grad = torch.randn_like(tensors[0])
    recipe = sparse24.Recipe(sparse_weights=options.sparse_weights)

    def call() -> None:
        out = sparse24.relu2_mlp(*leaves, min_tokens=0, precision=options.precision, recipe=recipe)
        if not options.forward:
            torch.autograd.grad(out, leaves, grad)

    return call


if __name__ == "__main__":
    raise SystemExit(main())
