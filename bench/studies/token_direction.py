"""What pruning along tokens drops on top of the mask along features, on recorded zero patterns.

    python -m bench token_direction --patterns DIR --out FILE

Random positive values at each recorded pattern, then the forward's 2:4 along features; from there each setting of the
weight-gradient products: tokens as they come or interleaved, and the features that are active for the most tokens in a
dense product. Printed and written as JSON: the share of non-zeros and of energy (sum of squares) dropped along tokens,
and the relative error of ``y.T @ dy`` against the product without pruning along tokens, dy normal. A residual operand
drops nothing; then the columns say what share of its groups and of its 128 x 64 tiles (tokens x features, the features
sorted by density) is not empty, which is what it costs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import sparse24
from sparse24.bench.environment import facts
from sparse24.bench.inputs import generator, recorded, tiled_pattern
from sparse24.ops.token_order import interleave

CPU = torch.device("cpu")
SHARES = (0.0, 0.01, 0.02, 0.05, 0.10)
TILE_TOKENS, TILE_FEATURES = 128, 64


def activation(pattern: Path, tokens: int, features: int) -> torch.Tensor:
    """Squares of normals where the pattern is active, 2:4 along features, float32."""
    active = tiled_pattern(pattern, tokens, features, CPU)
    y = torch.randn(tokens, features, generator=generator(CPU, 0)).square() * active
    values, meta = sparse24.compress(y)
    return sparse24.decompress(values, meta, tokens, features)


def share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return (part.sum(dtype=torch.float64) / whole.sum(dtype=torch.float64)).item()


def tiles(left: torch.Tensor, order: torch.Tensor) -> float:
    """Share of tiles that hold something, the features in `order`."""
    blocks = (left != 0).index_select(1, order)[: left.shape[0] // TILE_TOKENS * TILE_TOKENS]
    blocks = blocks[:, : len(order) // TILE_FEATURES * TILE_FEATURES].unflatten(0, (-1, TILE_TOKENS))
    return blocks.unflatten(2, (-1, TILE_FEATURES)).amax((1, 3)).float().mean().item()


def settings(y: torch.Tensor, dy: torch.Tensor) -> list[dict[str, Any]]:
    exact = y.t() @ dy
    records = []
    by_density = y.count_nonzero(0).sort(descending=True, stable=True).indices
    for permuted in (False, True):
        rows, other = (interleave(y), interleave(dy)) if permuted else (y, dy)
        values, meta = sparse24.compress(rows, dim=-2)
        dropped = rows - sparse24.decompress(values, meta, *rows.shape, -2)
        for dense_features in SHARES:
            recipe = sparse24.Recipe(dense_features=dense_features)
            hot = by_density[: recipe.hot_features(y.shape[1])]
            left = dropped.index_fill(1, hot, 0)
            groups = left.unflatten(0, (-1, 4)).any(1)
            records.append(
                {
                    "permute_tokens": permuted,
                    "dense_features": dense_features,
                    "hot": len(hot),
                    "nonzeros_dropped": share(left != 0, rows != 0),
                    "energy_dropped": share(left.square(), rows.square()),
                    "dw2_error": ((left.t() @ other).norm() / exact.norm()).item(),
                    "residual_groups": groups.float().mean().item(),
                    "residual_tiles": tiles(left, by_density),
                }
            )
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--patterns", type=Path, required=True, help="folder with pattern_layer*.npy")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--features", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=256, help="of dy")
    args = parser.parse_args(argv)

    records = []
    dy = torch.randn(args.tokens, args.columns, generator=generator(CPU, 1))
    print("layer                density  tokens   dense   non-zeros    energy   dW2 error   residual groups   tiles")
    for sparsity in recorded(args.patterns):
        y = activation(sparsity.pattern, args.tokens, args.features)
        density = share(y != 0, torch.ones(()).expand_as(y))
        for r in settings(y, dy):
            records.append({"layer": sparsity.name, "density": density, **r})
            print(
                f"{sparsity.name:<20} {density:7.1%}  {'permuted' if r['permute_tokens'] else 'natural':<8}"
                f"{r['dense_features']:6.0%} {r['nonzeros_dropped']:11.2%} {r['energy_dropped']:9.3%}"
                f" {r['dw2_error']:11.2%} {r['residual_groups']:17.2%} {r['residual_tiles']:7.1%}"
            )
    if args.out:
        args.out.write_text(json.dumps({"environment": facts(CPU), "records": records}, indent=1) + "\n")
    return 0
