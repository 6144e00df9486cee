"""The call that `stalls` has profiled: one of the network, of which a profiler sees the last only."""

from __future__ import annotations

import argparse

import torch

import sparse24
from sparse24.bench.inputs import generator

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
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    return 0


def network(options: argparse.Namespace, device: torch.device):
    """Make the call, with about `ZEROS` of the activation zero."""
    tokens, d_model, d_ff = options.size
    gen = generator(device, 0)

    def normal(rows: int, columns: int, deviation: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=gen, device=device) * deviation

    x, w1, w2, grad = (
        normal(tokens, d_model),
        normal(d_ff, d_model, d_model**-0.5),
        normal(d_model, d_ff, d_ff**-0.5),
        normal(tokens, d_model),
    )
    # A column of x is constant, and its weights are the bias that makes so many zeros.
    x[:, 0], w1[:, 0] = 2.0, 0.0
    w1[:, 0] = -(x[:256] @ w1.t()).flatten()[:1_000_000].quantile(ZEROS) / 2
    leaves = [t.bfloat16().requires_grad_(not options.forward) for t in (x, w1, w2)]
    recipe = sparse24.Recipe(sparse_weights=options.sparse_weights)

    def call() -> None:
        out = sparse24.relu2_mlp(*leaves, min_tokens=0, precision=options.precision, recipe=recipe)
        if not options.forward:
            torch.autograd.grad(out, leaves, grad.bfloat16())

    return call


if __name__ == "__main__":
    raise SystemExit(main())
