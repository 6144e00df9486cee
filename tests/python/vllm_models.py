"""Feed-forward networks of two layers of vLLM, and what only looks like them."""

import torch
from torch import nn
from vllm_classes import ColumnParallelLinear, ReLUSquaredActivation, RowParallelLinear

D, F = 64, 256


class MLP(nn.Module):
    """As vLLM's NemotronMLP: layers return tuples."""

    def __init__(
        self, bias=False, return_bias=True, dtype=torch.bfloat16, layers=(ColumnParallelLinear, RowParallelLinear)
    ):
        super().__init__()
        options = {"bias": bias, "dtype": dtype, "return_bias": return_bias}
        self.up_proj = layers[0](F, D, prefix="model.mlp.up_proj", **options)
        self.down_proj = layers[1](D, F, prefix="model.mlp.down_proj", **options)
        self.act_fn = ReLUSquaredActivation()

    def forward(self, x):
        up, _ = self.up_proj(x)
        x, _ = self.down_proj(self.act_fn(up))
        return x


class PlainMLP(MLP):
    """As transformers' ArceeMLP inside of vLLM: layers return tensors."""

    def __init__(self, **options):
        super().__init__(return_bias=False, **options)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)))


class Residual(PlainMLP):
    def forward(self, x):
        return x + super().forward(x)


class Twice(PlainMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.act_fn(self.up_proj(x))))


class Halved(PlainMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x) / 2))


class Gated(PlainMLP):
    def __init__(self):
        super().__init__()
        self.gate_proj = ColumnParallelLinear(F, D, return_bias=False)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Gelu(PlainMLP):
    def __init__(self):
        super().__init__()
        self.act_fn = nn.GELU()


def quantized(expose, static=True, bias=False):
    mlp = MLP(bias=bias)
    mlp.up_proj.quantize(4 / 448 if static else None, expose)
    mlp.down_proj.quantize(8 / 448 if static else None, expose)
    return mlp


def spoil(mlp, name, value):
    for layer in (mlp.up_proj, mlp.down_proj):
        setattr(layer, name, value)
    return mlp


def odd_sizes():
    mlp = MLP()
    mlp.up_proj, mlp.down_proj = ColumnParallelLinear(F + 8, D), RowParallelLinear(D, F + 8)
    return mlp
