"""Converted modules under FSDP2, DDP and tensor parallelism: one process is enough for what the wrappers change.

With gloo on the CPU in float32, and where there is a GPU with NCCL in bfloat16.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from compare import assert_same_bits
from composition_models import assert_close, dtype_of
from convert_models import EXACT, CountOps, D, Inline, Stack, WithModule, gradients, randomize
from data import normal
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparse24

pytestmark = pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning")

TENSOR_PARALLEL = {"c_fc": ColwiseParallel(), "c_proj": RowwiseParallel()}


@pytest.fixture(scope="module", autouse=True)
def process_group(alone):
    if alone == "nccl":
        torch.cuda.init()  # a mesh warns of a process that has chosen no device, and chooses one
    dist.init_process_group(alone, store=dist.HashStore(), rank=0, world_size=1)
    yield alone
    dist.destroy_process_group()


@pytest.fixture
def device(process_group):
    return "cuda" if process_group == "nccl" else "cpu"


@pytest.fixture
def mesh(device):
    return dist.init_device_mesh(device, (1,))


@pytest.fixture
def model(device):
    return on(device, randomize(Stack(Inline(), WithModule(bias=True))))


@pytest.fixture
def x(device):
    return normal(21, D, dtype=dtype_of(device)).to(device)


def on(device, module):
    return module.to(device, dtype_of(device))


def test_sharded_after_conversion(device, mesh, x):
    """A block gathers its weights before its forward, which then reads whole ones."""
    model = on(device, randomize(Stack(Stack(Inline()), Stack(WithModule(bias=True)))))
    dense = model(x)
    sparse24.convert(model, EXACT, quiet=True)
    expected = gradients(model, model, x)
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with CountOps() as ops:
        actual = gradients(model, model, x)
    assert ops.sparse == 4
    # The gathered weights lie at other addresses, which changes the order of sums in torch's own products.
    assert_close([a.to_local() if isinstance(a, DTensor) else a for a in actual], expected)
    sparse24.revert(model)
    assert_close([model(x)], [dense])


def test_revert_knows_what_sharding_made_of_the_class(model, mesh):
    sparse24.convert(model, quiet=True)
    fully_shard(model.layers[1], mesh=mesh)
    with pytest.raises(
        RuntimeError, match="revert: expected layers.1 to have the class .*, got FSDPSparse24WithModule"
    ):
        sparse24.revert(model)
    assert type(model.layers[0]) is not Inline  # all or nothing


def test_sharded_before_conversion(model, mesh):
    fully_shard(model, mesh=mesh)
    assert sparse24.convert(model, quiet=True).skipped == {
        "layers.0": "the weight of c_fc is a DTensor",
        "layers.1": "the weight of up_proj is a DTensor",
    }


def test_sharded_children(model, mesh, x):
    """Each child gathers its own weight in a hook, so the children have to be called."""
    model = model.layers[0]
    expected = model(x)
    sparse24.convert(model, EXACT, quiet=True)
    for child in model.children():
        fully_shard(child, mesh=mesh)
    with pytest.warns(UserWarning, match="Inline runs as before conversion: c_fc is not a Linear any more"):
        assert_same_bits(model(x), expected)


@pytest.mark.parametrize("before", [False, True])
def test_tensor_parallel(device, mesh, x, before):
    """The children own the collectives."""
    module = on(device, randomize(Inline()))
    expected = copy.deepcopy(module)(x)
    if before:
        parallelize_module(module, mesh, TENSOR_PARALLEL)
        assert sparse24.convert(module, quiet=True).skipped == {"": "the weight of c_fc is a DTensor"}
        return
    sparse24.convert(module, EXACT, quiet=True)
    parallelize_module(module, mesh, TENSOR_PARALLEL)
    with pytest.warns(UserWarning, match="Inline runs as before conversion: c_fc has hooks"):
        assert_same_bits(module(x), expected)


def test_data_parallel(model, x):
    sparse24.convert(model, EXACT, quiet=True)
    expected = gradients(model, model, x)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    with CountOps() as ops:
        actual = gradients(model, wrapped, x)
    assert ops.sparse == 4
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    assert sparse24.revert(wrapped) == ["module.layers.0", "module.layers.1"]


@torch.no_grad()
def test_no_copies_are_kept_of_gathered_weights(device, mesh, x):
    """FSDP2 gathers into memory that it has used before, without a new version: nothing tells what changed."""
    network = on(device, randomize(Inline()))
    sparse24.convert(network, sparse24.ConvertConfig(dtype="fp8", min_tokens=0), quiet=True)
    fully_shard(network, mesh=mesh)
    first = network.eval()(x).clone()
    for p in network.parameters():
        p.mul_(2)
    assert_same_bits(network(x), first * 8)
    assert network._copies is None
