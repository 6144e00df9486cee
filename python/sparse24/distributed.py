"""Collectives of FSDP2 that take no multiprocessors: GPUs of one machine read each other's memory by copy engines.

A GEMM of ours has a CTA on each multiprocessor from its first tile to its last. A collective that is a kernel holds
some of them, and the CTAs that wait for their place begin when the others are done: what was to be hidden is added. A
copy engine needs none.
"""

import contextlib
import ctypes
import functools
import math
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sparse24._options import check_model
from sparse24.errors import fail, refusal
from sparse24.float8_gather import gather_float8 as gather_float8

NAME = "distributed.use_copy_engines"


def use_copy_engines(
    model: nn.Module, group: dist.ProcessGroup | None = None, *, sent: torch.dtype | None = None
) -> nn.Module:
    r"""Have copy engines gather the weights of FSDP2 and bring gradients together, in place of NCCL's kernels.

    It is for GPUs of one machine that reach each other's memory, and is called by all ranks after ``fully_shard``.
    Weights and gradients are those that NCCL brings, up to the order of sums. A rank's part of the gathered weights,
    and the gradients that it sends, lie in memory that stays allocated: what the largest of the modules needs. A sum
    takes as much as is sent while it is made. Where a rank fails, the others wait until they are ended, as ``torchrun``
    ends them: there is no timeout.

    Parameters
    ----------
    model : torch.nn.Module
        All modules in it that ``fully_shard`` wrapped.
    group : torch.distributed.ProcessGroup, optional
        Over which weights are sharded: that of the dimension of the mesh which shards. Default: all ranks. Collectives
        of other groups stay NCCL's.
    sent : torch.dtype, optional
        What gradients travel in; they are summed in ``reduce_dtype`` of FSDP2's ``MixedPrecisionPolicy`` all the same.
        With ``param_dtype=torch.bfloat16`` they are bfloat16 before they leave: sending that loses nothing and takes
        half the bytes of float32. Default: ``reduce_dtype``.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    RuntimeError
        If the model has no module that ``fully_shard`` wrapped, or its ranks do not share a machine.

    Examples
    --------
    ::

        for block in model.layers:
            fully_shard(block)
        fully_shard(model)
        sparse24.distributed.use_copy_engines(model)
    """
    from torch.distributed.fsdp import FSDPModule

    check_model(NAME, model)
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        fail(NAME, "model to have modules that fully_shard wrapped", type(model).__name__)
    if not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        fail(NAME, "a version of torch with FSDPModule.set_custom_reduce_scatter", torch.__version__)
    group = dist.group.WORLD if group is None else group
    if group.size() == 1:
        return model  # FSDP2 calls no collective
    machines: list[str] = [""] * group.size()
    dist.all_gather_object(machines, socket.gethostname(), group)
    if len(set(machines)) > 1:
        fail(NAME, "group to be of one machine", f"{len(set(machines))} of them")
    gather, scatter = Gather(group), Scatter(group, sent)
    for module in sharded:
        module.set_custom_all_gather(gather)
        module.set_custom_reduce_scatter(scatter)
    return model


class Peers:
    """Memory of this rank that the others read, and a stream on which all of them agree.

    Attributes
    ----------
    rank, size : int
        In the group.
    shared : torch.Tensor
        Bytes that the others read.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        if not torch.cuda.is_available():
            fail(NAME, "CUDA devices", "none")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(priority=-1)
        self.agreements = 0
        self._flags = self._symmetric(self.size, torch.int32)
        self._flags[0].zero_()
        self.shared, self._memory = torch.empty(0, dtype=torch.uint8, device=self.device), None
        torch.cuda.synchronize()
        dist.barrier(group)

    def are(self, group: dist.ProcessGroup) -> bool:
        """Whether they are the ranks of a group."""
        return dist.get_process_group_ranks(group) == dist.get_process_group_ranks(self.group)

    def _symmetric(self, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
        from torch.distributed import _symmetric_memory

        memory = _symmetric_memory.empty(count, dtype=dtype, device=self.device)
        try:
            return memory, _symmetric_memory.rendezvous(memory, self.group)
        except RuntimeError as error:
            what = "group to be of GPUs of one machine that reach each other's memory"
            raise refusal(NAME, what, str(error).partition("\n")[0]) from error

    def share(self, count: int) -> torch.Tensor:
        """Return `count` bytes of this rank that the others read; all ranks ask for as many."""
        if self.shared.numel() < count:
            torch.cuda.synchronize()  # no rank reads what is given up: they wait for each other
            self.shared, self._memory = self._symmetric(count, torch.uint8)
        return self.shared[:count]

    def read(self, rank: int, begin: int, count: int) -> torch.Tensor:
        """Return `count` bytes from `begin` on of what another rank shares."""
        return self._memory.get_buffer(rank, (count,), torch.uint8, begin)

    def agree(self) -> None:
        """Have the stream wait until those of all ranks are here. No kernel: it would need a multiprocessor."""
        self.agreements += 1
        pointers = self._flags[1].buffer_ptrs
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            _stream_value("cuStreamWriteValue32_v2", self.stream, pointers[rank] + 4 * self.rank, self.agreements)
        for rank in others:
            _stream_value("cuStreamWaitValue32_v2", self.stream, pointers[self.rank] + 4 * rank, self.agreements)

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        """Use the stream of the agreements: what follows it in the current one waits for it."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def wait(self) -> None:
        """Have the current stream wait until the others have read what was shared last."""
        torch.cuda.current_stream().wait_stream(self.stream)

    def bring(self, sent: torch.Tensor, begin: int, received: Sequence[torch.Tensor]) -> None:
        """Share bytes, and get those of each other rank from `begin` on."""
        shared = self.share(sent.numel())
        if shared.data_ptr() != sent.data_ptr():
            shared.copy_(sent)
        self.agree()
        for step in range(1, self.size):  # each from another one at a time
            rank = (self.rank + step) % self.size
            received[rank].copy_(self.read(rank, begin, received[rank].numel()))
        self.agree()


class Gather:
    """What FSDP2 calls to gather weights (``torch.distributed.fsdp``: AllGather)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.peers = Peers(group)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return memory for the gathered weights."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather; `input_tensor` is this rank's part of `output_tensor`."""
        peers = self.peers
        if not peers.are(group):
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        with peers.in_order():
            peers.bring(input_tensor.view(torch.uint8), 0, output_tensor.view(torch.uint8).chunk(peers.size))
        return None


class Scatter:
    """What FSDP2 calls to sum gradients over the ranks (``torch.distributed.fsdp``: ReduceScatter).

    It first asks for memory for what is sent, which is shared if it is large enough, then for the sum.
    """

    def __init__(self, group: dist.ProcessGroup, sent: torch.dtype | None = None) -> None:
        self.peers, self.sent = Peers(group), sent
        self.asked = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return memory for what is sent, or for the sum."""
        self.asked, for_the_sum = True, self.asked
        dtype = dtype if for_the_sum or self.sent is None else self.sent
        count = math.prod(size) * dtype.itemsize
        if for_the_sum or self.peers.shared.numel() < count:
            return torch.empty(*size, dtype=dtype, device=device)
        self.peers.wait()
        return self.peers.share(count).view(dtype).view(*size)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Sum or average, in float32 whatever is sent."""
        self.asked = False
        peers = self.peers
        if not peers.are(group) or op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            sent = input_tensor.to(output_tensor.dtype)
            return dist.reduce_scatter_tensor(output_tensor, sent, op=op, group=group, async_op=async_op)
        with peers.in_order():
            parts = input_tensor.new_empty(peers.size, output_tensor.numel())
            parts[peers.rank] = input_tensor.chunk(peers.size)[peers.rank]
            received = parts.view(torch.uint8)
            peers.bring(input_tensor.view(torch.uint8), peers.rank * received.shape[1], received.unbind())
            add = torch.mean if op == dist.ReduceOp.AVG else torch.sum
            add(parts, 0, dtype=output_tensor.dtype, out=output_tensor)
        return None


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _stream_value(function: str, stream: torch.cuda.Stream, pointer: int, value: int) -> None:
    """Write a value, or wait until one is at least so large, in the order of a stream."""
    call = getattr(_driver(), function)
    status = call(
        ctypes.c_void_p(stream.cuda_stream), ctypes.c_uint64(pointer), ctypes.c_uint32(value), ctypes.c_uint(0)
    )
    if status != 0:
        raise RuntimeError(f"sparse24: {function} failed with status {status}")
