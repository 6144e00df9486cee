"""Stacks of transformer layers at the widths of real models, whole or as one rank's part of tensor parallelism.

A layer is attention (causal, without rotary embeddings) and the squared-ReLU network, each after an RMSNorm without
weights. Attention is bfloat16 in all variants: they differ in the network alone, dense or 2:4, in 16 bits or with all
six products in float8. Nothing is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import sparse24
from bench.cases.model_stacks import give_zeros
from bench.distributed import experts
from bench.distributed.exchange import Exchange, same
from sparse24.bench import inputs
from sparse24.bench.ffn.training_baselines import FusedDense

ZEROS = 0.9


class Variant(NamedTuple):
    """How the networks run: whose side it is on, in which precision, 2:4 or dense."""

    dtype: str
    role: str
    sparse: bool


#: The dense ones are rivals of ffn_training: activation, derivative and, in float8, transposes in epilogues.
VARIANTS = {
    "fused_dense": Variant("bf16", "dense", False),
    "sparse24": Variant("bf16", "sparse24", True),
    "fused_dense_fp8": Variant("fp8", "dense", False),
    "sparse24_fp8": Variant("fp8", "sparse24", True),
}


class Size(NamedTuple):
    """`layers` layers of a model, and what each GPU gets: `batch` sequences of `length` tokens."""

    name: str
    d_model: int
    d_ff: int
    heads: int
    key_value_heads: int
    layers: int
    batch: int
    length: int = 2048
    experts: int = 0
    top_k: int = 1

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def divides_by(self, ranks: int) -> bool:
        """Whether each rank of tensor parallelism has whole heads, and features in multiples of what kernels take."""
        return not (self.heads % ranks or self.key_value_heads % ranks or self.d_ff % (32 * ranks))


SIZES = {
    "nemotron": Size("Nemotron-H-8B", 4096, 21504, 32, 8, layers=3, batch=8),
    "nanochat26": Size("nanochat d26", 1664, 6656, 13, 13, layers=6, batch=16),
    "afm": Size("AFM-4.5B", 2560, 18432, 20, 4, layers=4, batch=8),
    "nanochat32": Size("nanochat d32", 2048, 8192, 16, 16, layers=6, batch=16),
    "nemotron3": Size("Nemotron-3 Nano", 2688, 1856, 21, 1, layers=2, batch=8, experts=128, top_k=6),
}
SMOKE = {
    "smoke": Size("smoke", 64, 256, 4, 4, layers=2, batch=2, length=32),
    "experts": Size("smoke, experts", 64, 128, 4, 4, layers=1, batch=2, length=32, experts=4, top_k=2),
}


class Layer(nn.Module):
    """One of the `ranks` parts of a layer. `gather` makes a rank's tokens those of all, `scatter` sums and shares."""

    def __init__(self, size: Size, variant: Variant, ranks: int, gather: Exchange, scatter: Exchange) -> None:
        super().__init__()
        d, head = size.d_model, size.d_model // size.heads
        self.head, self.length, self.gather, self.scatter = head, size.length, gather, scatter
        self.queries = nn.Linear(d, size.heads * head // ranks, bias=False)
        self.keys = nn.Linear(d, size.key_value_heads * head // ranks, bias=False)
        self.values = nn.Linear(d, size.key_value_heads * head // ranks, bias=False)
        self.out = nn.Linear(size.heads * head // ranks, d, bias=False)
        self.mlp = experts.Experts(size, variant, 1) if size.experts else network(size, variant, ranks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.scatter(self.attention(self.gather(F.rms_norm(x, x.shape[-1:]))))
        return x + self.scatter(self.mlp(self.gather(F.rms_norm(x, x.shape[-1:]))))

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).view(-1, self.length, layer.out_features // self.head, self.head).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2).flatten(0, 1))


class FusedDenseMLP(sparse24.nn.ReLU2MLP):
    """Dense in 16 bits. In float8 the module's own dense step is such a one."""

    def forward(self, x: torch.Tensor, scale_y: torch.Tensor | None = None) -> torch.Tensor:
        return FusedDense.apply(x, self.up_proj.weight, self.down_proj.weight)


def network(size: Size, variant: Variant, ranks: int) -> sparse24.nn.ReLU2MLP:
    """One of the `ranks` parts of the network."""
    kind = FusedDenseMLP if (variant.dtype, variant.sparse) == ("bf16", False) else sparse24.nn.ReLU2MLP
    mlp = kind(
        size.d_model,
        size.d_ff // ranks,
        precision="fp8" if variant.dtype == "fp8" else "16bit",
        min_tokens=0,
        recipe=sparse24.Recipe(fp8_weight_gradients=variant.dtype == "fp8"),
    )
    mlp.sparse = variant.sparse
    return mlp


#: The dimension of each weight that tensor parallelism shares out.
PARTS = {"queries": 0, "keys": 0, "values": 0, "out": 1, "up_proj": 0, "down_proj": 1}


def part_of(name: str, weight: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """What one rank has of a weight of that name."""
    return weight.chunk(ranks, PARTS[name.split(".")[-2]])[rank]


def build(
    size: Size, variant: Variant, ranks: int = 1, gather: Exchange = same, scatter: Exchange = same
) -> nn.Sequential:
    """The layers on the meta device: `load` gives them weights."""
    with torch.device("meta"):
        return nn.Sequential(*(Layer(size, variant, ranks, gather, scatter) for _ in range(size.layers))).bfloat16()


def load(model: nn.Sequential, weights: dict[str, torch.Tensor]) -> nn.Sequential:
    """Make these tensors the model's weights, and give it memory for its scales."""
    model.load_state_dict(weights, strict=False, assign=True)
    device = next(iter(weights.values())).device
    for layer in model:
        if getattr(layer.mlp, "delayed_scales", None) is not None:
            layer.mlp.delayed_scales = torch.zeros(4, device=device)
    return model


@torch.no_grad()
def weights_with_zeros(size: Size, device: torch.device, seed: int) -> tuple[dict[str, torch.Tensor], float]:
    """Weights of all layers, and the share of zeros that they give the activations of `tokens`."""
    model = build(size._replace(experts=0), VARIANTS["fused_dense"])
    made = {
        name: inputs.weights(*p.shape, device=device, seed=seed + i)
        for i, (name, p) in enumerate(model.named_parameters())
    }
    load(model, made)
    networks = [(layer.mlp, layer.mlp.up_proj, layer.mlp.down_proj) for layer in model]
    x = tokens(size, device, seed)
    zeros = give_zeros(networks, lambda: model(x), columns_of_ones(size), ZEROS, seed)
    return experts.of_network(made, size.experts) if size.experts else made, zeros


def columns_of_ones(size: Size) -> int:
    return max(8, size.d_model // 64)


def tokens(size: Size, device: torch.device, seed: int) -> torch.Tensor:
    """Hidden states [tokens, d_model] of one GPU's sequences."""
    gen = inputs.generator(device, seed)
    x = torch.randn(size.tokens, size.d_model, dtype=torch.bfloat16, device=device, generator=gen)
    x[:, : columns_of_ones(size)] = 1
    return x
