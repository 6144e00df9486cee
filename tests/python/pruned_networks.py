"""Small networks with 2:4 weights, and weights that change."""

import torch

import sparse24
from sparse24 import Recipe

BOTH = Recipe(sparse_weights="both")


def network(recipe=BOTH, **options):
    torch.manual_seed(0)
    return sparse24.nn.ReLU2MLP(32, 64, recipe=recipe, min_tokens=0, **options)


def change(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
