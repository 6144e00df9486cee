"""The table of docs/guide/compatibility.md: classes of networks, what each runs under. A tick there is a test here."""

from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from compare import assert_same_bits
from composition_models import assert_close, build, checkpointed, inputs, masked_gradients
from convert_models import CountOps, assert_near, gradients
from distributed_worker import WORLD, assert_ranks_near, averaged, batch
from model_classes import CLASSES
from torch._dynamo.testing import CompileCounterWithBackend

import sparse24

PAGE = Path(__file__).parents[3] / "docs" / "guide" / "compatibility.md"

pytestmark = [
    # Dynamo's, which makes an instance of every autograd function that it traces, and torch's own
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

#: Columns of the table, and the tests that are named after them.
COLUMNS = {
    "eager": "eager",
    "`torch.compile`": "compile",
    "checkpointing": "checkpointing",
    "FSDP2": "fsdp2",
    "TP": "tensor_parallel",
    "export": "export",
}
all_classes = pytest.mark.parametrize("name", CLASSES)
#: A plan for tensor parallelism is one for layers.
with_layers = pytest.mark.parametrize("name", [n for n in CLASSES if n not in ("ReLU2MLP", "modded-nanogpt MLP")])


@all_classes
def test_eager(device, name):
    """Output and all gradients are those of the dense network with the 2:4 mask."""
    model, x = build(name, device), inputs(device)
    with CountOps() as ops:
        actual = gradients(model, model, x)
    assert ops.sparse == 4  # of each of two networks the forward's, and the gradient of x
    assert_close(actual, masked_gradients(name, x))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@all_classes
def test_compile(device, name, dynamic):
    """Training is one graph without breaks, which dynamic shapes share."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = build(name, device)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for tokens in (21, 64, 127) if dynamic else (21, 21):
        x = inputs(device, tokens=tokens)
        for a, e in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
            assert_same_bits(a, e)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@all_classes
def test_checkpointing(device, name):
    model, x = build(name, device), inputs(device)
    expected = gradients(model, model, x)
    with CountOps() as ops:
        actual = gradients(model, checkpointed(model), x)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    assert ops.sparse == 6  # the forward runs twice


@all_classes
def test_fsdp2(ranks, name):
    """Blocks are sharded over two processes, and networks read gathered weights."""
    expected = averaged(build(name, ranks.device))
    actual = ranks(worker.sharded, name, "plain")
    assert_ranks_near([a for a, _ in actual], expected, ranks.tolerance(1e-5))
    assert [sparse for _, sparse in actual] == [4] * WORLD


@pytest.mark.parametrize("name", ["ReLU2MLP"])
def test_tensor_parallel(ranks, name):
    """As docs/guide/distributed.md has it."""
    network = build(name, ranks.device).layers[0]
    expected = gradients(network, network, batch(device=ranks.device))
    actual = ranks(worker.tensor_parallel, "plain", name)
    assert_ranks_near(actual, [expected] * WORLD, ranks.tolerance(1e-5))


@with_layers
def test_tensor_parallel_dense(ranks, name):
    """A converted network under the plan for its layers runs as before conversion, and says so."""
    with sparse24.disabled():
        expected = build(name, ranks.device).layers[0](batch(device=ranks.device)).detach()
    for out, messages in ranks(worker.tensor_parallel_plan, name):
        assert_near([out], [expected], ranks.tolerance(1e-5))
        assert any("runs as before conversion" in m for m in messages)


@all_classes
def test_export(device, name):
    """The program holds the sparse products, and takes any number of tokens."""
    model = build(name, device).requires_grad_(False).eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(model, (inputs(device),), dynamic_shapes=({1: tokens},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("sparse24.mm.default") == 2
    for size in (2, 21, 64):
        x = inputs(device, tokens=size)
        assert_same_bits(program.module()(x), model(x))


def classes_of(test: str) -> set[str]:
    """The classes for which there is a test of that name."""
    marks = getattr(globals().get(f"test_{test}"), "pytestmark", [])
    return {name for mark in marks if mark.name == "parametrize" and mark.args[0] == "name" for name in mark.args[1]}


def test_the_table_of_classes():
    """Every class is a row, and a cell is what a test shows: nothing more, nothing less."""
    table = PAGE.read_text().partition("| class |")[2].partition("\n\n")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert head == list(COLUMNS)
    assert [row[0].partition("`")[0].strip() or row[0].split("`")[1] for row in rows] == list(CLASSES)
    for name, row in zip(CLASSES, rows, strict=True):
        for column, cell in zip(COLUMNS.values(), row[1:], strict=True):
            otherwise = "dense" if name in classes_of(f"{column}_dense") else ""
            assert cell == ("✓" if name in classes_of(column) else otherwise), (name, column)
