"""The ways in which the layers are spread over GPUs, and the step that each of them takes.

A way is a class with `name`, and whose instances `run` a step of one rank's tokens and tell the gradients of its own
part of the weights. `Alone` is one GPU: what every other way is verified against, and scales from. Another way is one
more class in `WAYS`.
"""

from __future__ import annotations

import copy
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import sparse24
from bench.distributed import model
from bench.distributed.exchange import Gather, Scatter, Swap
from bench.distributed.experts import Experts
from bench.distributed.model import Size, Variant

Weights = dict[str, torch.Tensor]


class Alone:
    """Each GPU by itself: no communication."""

    name = "alone"
    #: Whether a rank computes products of tokens that are not its own.
    mixes = False
    #: Of which networks it is.
    dtypes: tuple[str, ...] = ("bf16", "fp8")

    def __init__(self, size: Size, variant: Variant, weights: Weights) -> None:
        self.model: nn.Module = self.wrapped(size, variant, weights)

    def wrapped(self, size: Size, variant: Variant, weights: Weights) -> nn.Module:
        return model.load(model.build(size, variant), weights)

    @staticmethod
    def fits(size: Size, ranks: int) -> bool:
        """Whether layers of this size can be spread so."""
        return not size.experts

    def sums(self, name: str) -> bool:
        """Whether a weight's gradient is the sum over the tokens of all ranks, not the mean of what ranks have."""
        return False

    def run(self, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        """A forward and a backward pass, whose gradients are there until the next one."""
        self.model.zero_grad(set_to_none=True)
        out = self.model(x)
        out.backward(dy)
        return out.detach()

    def gradients(self) -> Weights:
        """By the name of the weight in the layers alone: this rank's part."""
        return {name: p.grad for name, p in self.model.named_parameters()}

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What this rank has of something as large as a weight."""
        return whole


class FSDP2(Alone):
    """Layers are sharded: float32 weights, gathered in bfloat16, whose gradients are summed in float32."""

    name = "fsdp2"
    #: Whether the networks are sharded by themselves, apart from the rest of their layers.
    apart = False

    def wrapped(self, size: Size, variant: Variant, weights: Weights) -> nn.Module:
        layers = model.load(model.build(size, variant), {name: w.float() for name, w in weights.items()})
        mesh = dist.init_device_mesh(next(iter(weights.values())).device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in layers:
            if self.apart:
                fully_shard(layer.mlp, mesh=mesh, mp_policy=policy)
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(layers, mesh=mesh, mp_policy=policy)

    def gradients(self) -> Weights:
        return {name: p.grad.to_local() for name, p in self.model.named_parameters()}

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        parts = whole.chunk(dist.get_world_size())  # as FSDP2 shares out rows
        return parts[dist.get_rank()] if dist.get_rank() < len(parts) else whole[:0]


class CopyEngines(FSDP2):
    """FSDP2 by copy engines of GPUs of one machine. Gradients travel in bfloat16, which they are, to the same sums."""

    name = "fsdp2_engines"

    def wrapped(self, size: Size, variant: Variant, weights: Weights) -> nn.Module:
        return sparse24.distributed.use_copy_engines(super().wrapped(size, variant, weights), sent=torch.bfloat16)

    @staticmethod
    def fits(size: Size, ranks: int) -> bool:
        return dist.get_backend() == "nccl" and FSDP2.fits(size, ranks)


class Float8(FSDP2):
    """FSDP2 that gathers the networks' weights as float8 codes, in both passes."""

    name = "fsdp2_float8"
    dtypes = ("fp8",)

    def wrapped(self, size: Size, variant: Variant, weights: Weights) -> nn.Module:
        return sparse24.distributed.gather_float8(super().wrapped(size, variant, weights), once=self.apart)


class Float8Once(Float8):
    """The same for the forward pass alone."""

    name = "fsdp2_float8_once"
    apart = True


class Float8OnceEngines(Float8Once):
    """The same by copy engines."""

    name = "fsdp2_float8_engines"
    fits = CopyEngines.fits

    def wrapped(self, size: Size, variant: Variant, weights: Weights) -> nn.Module:
        return sparse24.distributed.use_copy_engines(super().wrapped(size, variant, weights), sent=torch.bfloat16)


class DDP(Alone):
    """Every rank has all weights in bfloat16, and their gradients are summed in buckets."""

    name = "ddp"

    def wrapped(self, size: Size, variant: Variant, weights: Weights) -> nn.Module:
        return self.replicated(super().wrapped(size, variant, copy.deepcopy(weights)))

    @staticmethod
    def replicated(layers: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 calls the option otherwise
            return nn.parallel.DistributedDataParallel(layers, broadcast_buffers=False, gradient_as_bucket_view=True)

    def gradients(self) -> Weights:
        return {name.removeprefix("module."): p.grad for name, p in self.model.named_parameters()}


class TensorParallel(Alone):
    """Each rank has a part of the heads and of the features, and between layers a part of the tokens.

    All tokens are gathered before attention and before the network, and their outputs are summed and scattered after.
    """

    name = "tensor"
    mixes = True

    def wrapped(self, size: Size, variant: Variant, weights: Weights) -> nn.Module:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        layers = model.build(size, variant, self.ranks, Gather.apply, Scatter.apply)
        parts = {name: model.part_of(name, w, self.rank, self.ranks).clone() for name, w in weights.items()}
        return model.load(layers, parts)

    @staticmethod
    def fits(size: Size, ranks: int) -> bool:
        return not size.experts and size.divides_by(ranks)

    def sums(self, name: str) -> bool:
        return True

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return model.part_of(name, whole, self.rank, self.ranks)


class ExpertParallel(DDP):
    """Each rank has a part of the experts, and gets the rows of all ranks for them; the rest as with DDP."""

    name = "expert"
    mixes = True

    def wrapped(self, size: Size, variant: Variant, weights: Weights) -> nn.Module:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        layers = model.build(size, variant)
        for layer in layers:
            with torch.device("meta"):
                layer.mlp = Experts(size, variant, self.ranks, Swap.apply).bfloat16()
        own = {name: self.part(name, w).clone() for name, w in weights.items()}
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            layers, [name for name in own if self.sums(name)]
        )
        return self.replicated(model.load(layers, own))

    @staticmethod
    def fits(size: Size, ranks: int) -> bool:
        return size.experts > 0 and size.experts % ranks == 0

    def sums(self, name: str) -> bool:
        return ".mlp.own." in name

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(self.ranks)[self.rank] if self.sums(name) else whole


_WAYS = FSDP2, CopyEngines, Float8, Float8Once, Float8OnceEngines, TensorParallel, DDP, ExpertParallel
WAYS: dict[str, type[Alone]] = {way.name: way for way in _WAYS}
