"""Classes that behave as those of Megatron-Core do: layers return tuples and own the collectives. No code of theirs."""

import sys
import types

import torch
import torch.distributed as dist
import torch.nn.functional as F
from composition_models import dtype_of
from convert_models import HIDDEN, D
from data import normal
from torch import nn


def _summed(x):
    dist.all_reduce(x.contiguous())  # in place, as theirs
    return x


def _gathered(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _scattered(x):
    x = x.clone()
    dist.all_reduce(x)
    return x.chunk(dist.get_world_size())[dist.get_rank()].contiguous()


def _region(forward, backward):
    class Region(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return forward(x)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad)

    def region(input_, group=None):
        assert group is None or group is dist.group.WORLD
        return Region.apply(input_)

    return region


REGIONS = {
    "copy_to_tensor_model_parallel_region": _region(lambda x: x, _summed),
    "reduce_from_tensor_model_parallel_region": _region(_summed, lambda x: x),
    "gather_from_sequence_parallel_region": _region(_gathered, _scattered),
    "reduce_scatter_to_sequence_parallel_region": _region(_scattered, _gathered),
}


class ParallelLinear(nn.Module):
    """A shard of a weight, and the collective of its layer; the bias is returned, not added."""

    def __init__(self, rows, columns, region, bias, first):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.region, self.first = region, first

    def forward(self, x):
        out = F.linear(REGIONS[self.region](x) if self.first else x, self.weight)
        return (out if self.first else REGIONS[self.region](out)), self.bias


class MLP(nn.Module):
    """Weights are shards of those of the whole network."""

    def __init__(self, config, w1, b1, w2, b2):
        super().__init__()
        self.config, self.tp_group = config, dist.group.WORLD
        self.activation_func = lambda h: torch.pow(F.relu(h), 2)
        regions = list(REGIONS)[2:] if config.sequence_parallel else list(REGIONS)[:2]
        rank, world = dist.get_rank(), dist.get_world_size()
        self.linear_fc1 = ParallelLinear(w1.shape[0] // world, w1.shape[1], regions[0], b1 is not None, True)
        self.linear_fc2 = ParallelLinear(w2.shape[0], w2.shape[1] // world, regions[1], b2 is not None, False)
        self.to(w1)
        with torch.no_grad():
            self.linear_fc1.weight.copy_(w1.chunk(world, 0)[rank])
            self.linear_fc2.weight.copy_(w2.chunk(world, 1)[rank])
            if b1 is not None:
                self.linear_fc1.bias.copy_(b1.chunk(world)[rank])
                self.linear_fc2.bias.copy_(b2)

    def forward(self, hidden_states, per_token_scale=None, **kwargs):
        h, bias = self.linear_fc1(hidden_states)
        h = self.activation_func(h if bias is None else h + bias)
        if per_token_scale is not None:
            h = h * per_token_scale.unsqueeze(-1)
        return self.linear_fc2(h)


def network(bias, device="cpu"):
    """Input and weights of the whole network: x, w1, w2, b1, b2."""
    shapes = ((32, 2, D), (HIDDEN, D), (D, HIDDEN), (HIDDEN,), (D,))
    x, w1, w2, b1, b2 = (normal(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes))
    tensors = (t.to(device, dtype_of(device)) for t in (x, w1 / 8, w2 / 12, b1, b2))
    return [*tensors] if bias else [*tensors][:3] + [None, None]


def install():
    """Make the modules that the page imports."""
    for name, contents in (
        ("megatron", {}),
        ("megatron.core", {}),
        ("megatron.core.tensor_parallel", REGIONS),
        ("megatron.core.transformer", {}),
        ("megatron.core.transformer.mlp", {"MLP": MLP}),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(contents, __path__=[])
        sys.modules[name] = module
