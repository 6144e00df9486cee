"""Two processes that run the same function, with a process group between them, and the functions they run.

With gloo they run on the CPU in float32, with NCCL on a GPU each in bfloat16.
"""

import contextlib
import functools
import importlib
import pickle
import socket
import traceback
import types
import warnings
from datetime import timedelta
from unittest import mock

import megatron_like
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from composition_models import build, dtype_of, inputs, layer_names
from convert_models import HIDDEN, CountOps, D, assert_near, gradients, randomize
from data import generator
from mixture_models import Mixture
from recipes import execute, sections
from shared_files import FilePeers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import sparse24

WORLD = 2
#: Of a rank's models and batches.
DEVICE = "cpu"
EXACT = {"min_tokens": 0, "recipe": sparse24.Recipe(weight_gradients="dense")}


class Ranks:
    """The processes. Calling it runs a function of a file in both, and returns what they return, on `device`.

    Attributes
    ----------
    device : {"cpu", "cuda"}
        Where their models and batches are, and what the caller computes to compare with.
    """

    def __init__(self, folder, backend="gloo"):
        self.folder, self.backend, self.starts = folder, backend, 0
        self.device = "cuda" if backend == "nccl" else "cpu"
        self._start()

    def _start(self):
        context = torch.multiprocessing.get_context("spawn")
        store = self.folder / f"store{self.starts}"
        self.starts += 1
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, str(store), self.backend, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function, *args, **kwargs):
        try:
            for pipe in self.pipes:
                pipe.send((function.__module__, function.__name__, args, kwargs))
            results = [pickle.loads(pipe.recv_bytes()) for pipe in self.pipes]
        except (EOFError, OSError):  # where one waits for another in vain, NCCL ends the process
            for process in self.processes:
                process.kill()
            self._start()
            raise
        failed = [message for ok, message in results if not ok]
        assert not failed, "\n".join(failed)
        return tree_map_only(torch.Tensor, lambda t: t.to(self.device), [result for _, result in results])

    def tolerance(self, of_float32):
        """What a result may differ by: of sums over ranks on the CPU as given, on a GPU what bfloat16 costs."""
        return max(of_float32, 1e-2) if self.device == "cuda" else of_float32

    def close(self):
        for pipe in self.pipes:  # all before the first is waited for: with NCCL they leave the group together
            pipe.send(None)
        for process in self.processes:
            process.join(60)


def _work(rank, store, backend, pipe):
    global DEVICE
    torch.set_num_threads(1)
    device = None
    if backend == "nccl":
        DEVICE, device = "cuda", torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
        device_id=device,
    )
    while (job := pipe.recv()) is not None:
        module, name, args, kwargs = job
        try:
            result = (
                True,
                tree_map_only(
                    torch.Tensor,
                    torch.Tensor.cpu,
                    getattr(importlib.import_module(module), name)(rank, *args, **kwargs),
                ),
            )
        except Exception:
            result = False, f"rank {rank}:\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def batch(rank: int | None = None, device: str | None = None) -> torch.Tensor:
    """Every rank's share of the tokens, or all of them."""
    x = inputs(DEVICE if device is None else device, batch=4)
    return x if rank is None else x.chunk(WORLD)[rank]


def averaged(model, call=None):
    """What each rank has after the reduction: its own output and gradient of x, and mean gradients of the weights."""
    device = next(model.parameters()).device.type
    shares = [[t.clone() for t in gradients(model, call or model, batch(rank, device))] for rank in range(WORLD)]
    means = [sum(tensors) / WORLD for tensors in zip(*(s[2:] for s in shares), strict=True)]
    return [[*share[:2], *means] for share in shares]


def assert_ranks_near(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, tolerance)


@functools.cache
def mesh():
    return dist.init_device_mesh(DEVICE, (WORLD,))


def whole(tensors):
    """DTensors as plain tensors, gathered."""
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def shard(model, **options):
    for layer in model.layers:
        fully_shard(layer, mesh=mesh(), **options)
    fully_shard(model, mesh=mesh(), **options)
    return model


def sharded(rank, kind, wrap):
    """FSDP2: gradients of this rank's share, and how many sparse products it took."""
    model = build(kind, DEVICE)
    for i, layer in enumerate(model.layers):
        if wrap == "checkpointed":
            model.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        elif wrap == "compiled":
            layer.compile(backend="aot_eager", fullgraph=True)
    shard(model)
    with contextlib.nullcontext() if wrap == "compiled" else CountOps() as ops:
        results = gradients(model, model, batch(rank))
    return whole(results), ops and ops.sparse


def sharded_alone(rank, kind):
    """The network itself is what FSDP2 wraps, and warnings are errors; its output may be written to."""
    network = build(kind, DEVICE).layers[0]
    fully_shard(network, mesh=mesh())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return whole(gradients(network, lambda x: network(x).mul_(2), batch(rank)))


def sharded_experts(rank, kind, compiled):
    """FSDP2 of a router and experts: gradients of this rank's share, and what a step of both ranks leaves."""
    model = Mixture(kind, DEVICE, dtype_of(DEVICE))
    fully_shard(model.experts, mesh=mesh())
    fully_shard(model, mesh=mesh())
    if compiled:
        model.compile(backend="aot_eager")
    results = whole(gradients(model, model, batch(rank)))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return results, whole(model.parameters())


def sharded_with_mixed_precision(rank, kind):
    model = build(kind, DEVICE, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh(), mp_policy=policy)
    return whole(gradients(model, model, batch(rank).bfloat16()))


def sharded_training(rank, kind, steps):
    """Dense, then sparse steps; the weights after them, which are float32 also where products are in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=dtype_of(DEVICE), reduce_dtype=torch.float32)
    model = shard(build(kind, DEVICE, torch.float32), mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = sparse24.Schedule(steps, dense_warmup_steps=1)
    for step in range(steps):
        schedule.apply(model, step)
        optimizer.zero_grad()
        model(batch(rank)).square().mean().backward()
        optimizer.step()
    return whole(p.detach() for p in model.parameters())


def sharded_weight_pruning(rank, steps):
    """2:4 weights with masks that stay and a decay of the others; the same batch on both ranks: as without FSDP2."""
    model = shard(build("weights", DEVICE, torch.float32))
    return whole(weight_pruning(model, steps)), None


def weight_pruning(model, steps):
    """Train, and return the weights, also as a dense end would start with them, and the flip rates."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruning = sparse24.WeightPruning(model, refresh_steps=2, decay=0.5)
    flips = []
    for _ in range(steps):
        pruning.step()
        optimizer.zero_grad()
        model(batch(0, next(model.parameters()).device.type)).square().mean().backward()
        pruning.decay_()
        optimizer.step()
        flips.append(torch.tensor(pruning.flip_rate()))
    trained = [p.detach().clone() for p in model.parameters()]
    pruning.settle_()
    return [*trained, *(p.detach() for p in model.parameters()), *flips]


def sharded_by_copy_engines(rank, kind, folder, *, other_group=False, sent=None):
    """FSDP2, and the same with copy engines: what two steps give, and whether ranks agreed on reading memory."""
    with contextlib.ExitStack() as patches:
        if DEVICE == "cpu":
            patches.enter_context(mock.patch.object(sparse24.distributed, "Peers", FilePeers))
            patches.enter_context(mock.patch.object(FilePeers, "folder", folder))
        if other_group:
            patches.enter_context(mock.patch.object(sparse24.distributed.Peers, "are", lambda peers, group: False))
        results = []
        for engines in (False, True):
            model = build(kind, DEVICE, torch.float32)
            larger = torch.nn.Linear(D, 16 * D), torch.nn.Linear(16 * D, D)
            model.layers.insert(1, randomize(torch.nn.Sequential(*larger)).to(DEVICE))
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            shard(model, mp_policy=policy)
            if engines:
                assert sparse24.distributed.use_copy_engines(model, sent=sent) is model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                model(batch(rank).bfloat16()).float().square().mean().backward()
                optimizer.step()
            results.append(whole(p.grad for p in model.parameters()))
        group = model.layers[0]._get_fsdp_state()._fsdp_param_group
        return *results, [comm.peers.agreements for comm in (group._all_gather_comm, group._reduce_scatter_comm)]


def copy_engines_of_two_machines(rank):
    """What is refused; no rank waits for the other."""
    with mock.patch.object(socket, "gethostname", lambda: f"host {rank}"):
        try:
            sparse24.distributed.use_copy_engines(shard(build("module", DEVICE)))
        except RuntimeError as error:
            return str(error)


def sharded_children(rank, kind):
    """What happens if the layers of a network are wrapped one by one."""
    network = build(kind, DEVICE).layers[0]
    for child in network.children():
        fully_shard(child, mesh=mesh())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return network(batch()).detach().clone(), [str(w.message) for w in caught]


def data_parallel(rank, kind, steps=1):
    """DDP: gradients of this rank's share, `steps` times as large with accumulation."""
    model = build(kind, DEVICE)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)

    def call(x):
        for _ in range(steps - 1):
            with wrapped.no_sync():
                out = wrapped(x)
                (out * torch.randn(out.shape, generator=generator(7)).to(out)).sum().backward()
        return wrapped(x)

    return gradients(model, call, batch(rank))


def steps_in_float8(rank, wrap):
    """Two steps of this rank's share, then a forward pass: its output, and the scales that it used."""
    model = build("fp8_step", DEVICE)
    if wrap == "fsdp2":
        run = shard(model)
    else:
        run = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=wrap == "ddp")
    return scales_of_steps(run, model, share_of(rank, DEVICE))


def share_of(rank, device):
    """Magnitudes differ by rank, within the room that scales have."""
    return batch(rank, device) * (1 + 0.1 * rank)


def scales_of_steps(run, model, x):
    for _ in range(2):
        run(x).square().mean().backward()
    return run(x).detach(), torch.stack([layer.delayed_scales for layer in model.layers])


def input_of_a_collective(rank, kind):
    """x is a tensor that waits for its values, as sequence parallelism gathers it."""
    network = build(kind, DEVICE).layers[0]
    x = functional_collectives.all_gather_tensor(batch(rank), 0, mesh().get_group())
    assert type(x) is functional_collectives.AsyncCollectiveTensor
    with CountOps() as ops:
        out = network(x).detach().clone()
    return out, ops.sparse


def tensor_parallel(rank, wrap, kind="module", *, sequence=False):
    """The network of the recipe, with the plan that torch has for its layers: every rank sees all tokens.

    With `sequence`, a rank has a part of them between the networks.
    """
    parallel = execute(sections()["Tensor parallelism"][:1], {})["TensorParallelMLP"]
    network = build(kind, DEVICE).layers[0]
    network.__class__ = parallel
    parallelize_module(network, mesh(), {"up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()})
    assert network.up_proj.weight.to_local().shape == (HIDDEN // WORLD, D)
    call = {
        "plain": network,
        "checkpointed": lambda x: checkpoint(network, x, use_reentrant=False),
        "compiled": torch.compile(network, backend="aot_eager", fullgraph=True),
    }[wrap]
    if not sequence:
        return whole(gradients(network, call, batch()))
    network.tokens = Shard(-2)
    tokens = batch().flatten(0, 1)
    weights = torch.randn(tokens.shape, generator=generator(7)).to(tokens).chunk(WORLD)[rank]
    x = tokens.chunk(WORLD)[rank].clone().requires_grad_()
    out = call(x)
    (out * weights).sum().backward()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    before = whole(p.detach().clone() for p in network.parameters())
    optimizer.step()
    after = whole(p.detach() for p in network.parameters())
    return [out.detach(), x.grad, *(b - a for a, b in zip(after, before, strict=True))]


def tensor_parallel_plan(rank, kind):
    """The same plan for a network that does not know of it."""
    network = build(kind, DEVICE).layers[0]
    up, down = layer_names(kind)
    parallelize_module(network, mesh(), {up: ColwiseParallel(), down: RowwiseParallel()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return network(batch()).detach().clone(), [str(w.message) for w in caught]


def megatron(rank, sequence_parallel, bias):
    """Output, gradients and output bias of the page's class; the dense output, and that of the class it is made of."""
    megatron_like.install()
    kind = execute(sections()["Megatron"], {})["SparseMLP"]
    x, w1, w2, b1, b2 = megatron_like.network(bias, DEVICE)
    config = types.SimpleNamespace(sequence_parallel=sequence_parallel, gated_linear_unit=False)
    mlp = kind(config, w1, b1, w2, b2)
    x = (x.chunk(WORLD)[rank] if sequence_parallel else x).clone().requires_grad_()
    with CountOps() as ops, mock.patch.object(sparse24, "relu2_mlp", functools.partial(sparse24.relu2_mlp, **EXACT)):
        out, output_bias = mlp(x)
        out.square().sum().backward()
    weights = [mlp.linear_fc1.weight, mlp.linear_fc2.weight, *([mlp.linear_fc1.bias] if bias else [])]
    mlp.sparse = False
    dense, theirs = mlp(x)[0].detach(), super(kind, mlp).forward(x)[0].detach()
    actual = [out.detach(), x.grad, *(w.grad for w in weights)]
    return actual, None if output_bias is None else output_bias.detach(), dense, theirs, ops.sparse
