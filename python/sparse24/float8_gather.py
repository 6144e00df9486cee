"""FSDP2 that gathers the weights of float8 networks as codes: half the bytes, and nothing to quantise after it.

A step multiplies codes of each weight with one scale for all of it. Each rank can make those of its own part, given the
largest magnitude of the whole: one all-reduce for all weights, once a step of the optimizer. They are the codes that
quantising after the gather makes, bit for bit.

FSDP2 asks the local tensor of a sharded parameter what to gather, and what the whole parameter is then: by
``fsdp_pre_all_gather`` and ``fsdp_post_all_gather``, here attributes of a tensor that stays a plain one. States,
checkpoints and optimizers see the masters as before.
"""

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse24._optimizer_steps import after_each_step
from sparse24._options import boolean, check_model
from sparse24.errors import dtype_name, fail
from sparse24.format import FP8, LARGEST_FP8
from sparse24.mlp.gathered_weight import GatheredWeight
from sparse24.mlp.step_fp8 import has_products
from sparse24.nn import ReLU2MLP
from sparse24.ops import quantize_fp8, transpose_fp8
from sparse24.recipe import Recipe
from sparse24.schedule import feed_forwards

NAME = "distributed.gather_float8"


def gather_float8(model: nn.Module, *, once: bool = False) -> nn.Module:
    r"""Have FSDP2 gather float8 codes of the weights of networks whose steps are float8 throughout.

    These are networks with ``precision="fp8"`` and `Recipe.fp8_weight_gradients`, without 2:4 weights. It is called by
    all ranks after ``fully_shard``, when weights have memory; and again after what replaces parameters
    (``load_state_dict(assign=True)``). Results are the same, bit for bit. Half the bytes are gathered, and between the
    passes no codes are kept, which otherwise take a byte for each entry of the whole weights.

    Parameters
    ----------
    model : torch.nn.Module
        With `sparse24.nn.ReLU2MLP` modules or converted ones, in modules that ``fully_shard`` wrapped.
    once : bool
        Gather for the forward pass alone: a quarter of the bytes. The codes that the backward pass takes are kept as
        without this function. ``fully_shard`` has wrapped each of these networks by itself, and nothing computes them
        again in the backward pass, which is refused there: neither activation checkpointing nor `recompute`.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    RuntimeError
        If the model has no such network; if a weight is not in equal parts of rows on the ranks, or has no memory on
        the device of the ranks; if `once` does not fit a network. A backward pass, if it computes a network again whose
        codes are gathered once.

    Notes
    -----
    The part of a rank takes a byte an entry more. What else reads a gathered weight, as evaluation does, gets the
    numbers that codes stand for.

    Examples
    --------
    ::

        for block in model.layers:
            fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        fully_shard(model)
        sparse24.distributed.gather_float8(model)
    """
    from torch.distributed.fsdp import FSDPModule

    check_model(NAME, model)
    boolean(NAME, "once", once)
    meshes: dict[Any, list[Any]] = {}
    networks = list(_networks(model))
    for module, weights in networks:
        if once and not isinstance(module, FSDPModule):
            fail(NAME, "fully_shard to have wrapped each network by itself with once=True", type(module).__name__)
        if once and _option(module, "recompute"):
            fail(NAME, "networks without recompute with once=True", "recompute=True")
        for w in weights:
            _check(w)
            meshes.setdefault(w.device_mesh, []).append(w)
    if not meshes:
        what = 'model to have sharded networks with precision="fp8" whose weight gradients are float8 too'
        fail(NAME, what, type(model).__name__)
    for weights in meshes.values():
        parts = Parts(weights, once)
        for index, w in enumerate(weights):
            _attach(w._local_tensor, parts, index)
    for module, _ in networks:
        if isinstance(module, FSDPModule):
            module.set_unshard_in_backward(not once)
    return model


def _networks(model: nn.Module) -> Iterator[tuple[nn.Module, list[Any]]]:
    """Find the networks whose steps are float8 throughout, and their sharded weights."""
    from torch.distributed.tensor import DTensor

    for module in feed_forwards(model):
        conversion = module.__dict__.get("_sparse24")  # not what a wrapper finds in the module that it wraps
        if not isinstance(module, ReLU2MLP) and (conversion is None or conversion.experts):
            continue
        recipe = _option(module, "recipe") or Recipe()
        stored = module._stored_weights()  # type: ignore[operator]
        weights = [s.parameter for s in stored if not s.transposed and isinstance(s.parameter, DTensor)]
        if len(weights) < len(stored) or not all(w.requires_grad for w in weights):
            continue
        float8 = _option(module, "precision") == "fp8" and recipe.has_fp8_weight_gradients(weights[0].shape[1])
        if float8 and has_products(recipe) and recipe.sparse_weights == "none":
            yield module, weights


def _option(module: Any, name: str) -> Any:
    """Return an option of a network, converted or not."""
    conversion = module.__dict__.get("_sparse24")
    if conversion is None:
        return getattr(module, name)
    return conversion.precision if name == "precision" else conversion.options.get(name)


def _check(w: Any) -> None:
    from torch.distributed.tensor import Shard

    sharded = [dim for dim, placement in enumerate(w.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or w.placements[sharded[0]] != Shard(0):
        fail(NAME, "weights to be sharded by rows, and by nothing else", list(w.placements))
    ranks = w.device_mesh.size(sharded[0])
    if w.shape[0] % ranks != 0:
        fail(NAME, f"weights to have a multiple of {ranks} rows (ranks)", w.shape[0])
    if w._local_tensor.device.type != w.device_mesh.device_type:
        fail(NAME, f"weights to have memory on {w.device_mesh.device_type}", w._local_tensor.device)


class Parts:
    """The parts of weights that this rank has, and their codes, made anew where a weight has changed.

    A step of any optimizer of torch drops the codes, since fused ones write without a new version of a tensor. All
    ranks see the same changes, so that they meet in the all-reduce.
    """

    def __init__(self, weights: list[Any], once: bool) -> None:
        self.weights, self.once = weights, once
        self.states: list[Any] = []
        self.codes: list[Tensor] = []
        self.scales: list[Tensor] = []
        _all.add(self)
        after_each_step(_drop_codes)

    def of(self, index: int, group: dist.ProcessGroup, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return codes and scale of one of the weights, as it is in a dtype."""
        if not self.states or self.states[index] != _state(self.weights[index], dtype):
            self.make(group, dtype)
        return self.codes[index], self.scales[index]

    def make(self, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        """Make all of them."""
        parts = [w._local_tensor for w in self.weights]
        largest = torch.stack(torch._foreach_norm(parts, float("inf"))).float()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        largest = largest.to(dtype).float()  # that of rounded numbers: rounding keeps their order
        # By a tensor: CUDA multiplies with the inverse of a number, which rounds otherwise than the ops do.
        scales = largest / torch.full_like(largest, LARGEST_FP8)
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
        scales = torch.where(largest > 0, scales, 1.0)
        # Addresses are multiples of 16 bytes, as cuBLAS wants them.
        self.scales = [row[:1] for row in nn.functional.pad(scales.unsqueeze(1), (0, 3))]
        self.codes.clear()
        for part, scale in zip(parts, self.scales, strict=True):
            self.codes.append(quantize_fp8(part.to(dtype), scale, "tensor")[0])
        self.states = [_state(w, dtype) for w in self.weights]


_all: WeakSet[Parts] = WeakSet()


def _drop_codes(_optimizer: torch.optim.Optimizer) -> None:
    for parts in list(_all):
        parts.states.clear()


def _state(w: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    part = w._local_tensor  # whose version writes to the DTensor do not change
    return w._version, part._version, part.data_ptr(), dtype


def _attach(part: Any, parts: Parts, index: int) -> None:
    """Tell FSDP2 what it is to gather of a local tensor, and what it makes of that."""

    def before(mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any) -> Any:
        dtype = mp_policy.param_dtype or parts.weights[index].dtype
        if part.is_cuda and dtype == torch.float32:
            fail(NAME, "fully_shard with MixedPrecisionPolicy(param_dtype=torch.bfloat16)", dtype_name(dtype))
        codes, scale = parts.of(index, mesh.get_group(), dtype)
        # As numbers of the others' dtype: FSDP2 copies bytes in less time so.
        return (codes.view(dtype),), scale

    def after(outputs: Any, scale: Tensor, dtype: torch.dtype, *, out: Any = None) -> Any:
        codes = outputs[0].view(FP8)
        transposed = transpose_fp8(codes) if parts.once else None
        if out is not None:
            out.scale, out.transposed = scale, transposed
            return None
        return GatheredWeight(codes, scale, transposed, dtype), ()

    part.fsdp_pre_all_gather, part.fsdp_post_all_gather, part.gathered_once = before, after, parts.once
