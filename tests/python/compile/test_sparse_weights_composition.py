"""2:4 weights together with what else training uses: compilers, checkpoints, autocast, accumulation, CUDA graphs."""

import copy
import pickle

import pytest
import torch
from compare import assert_same_bits
from composition_models import WEIGHT_KINDS, build, checkpointed, inputs
from convert_models import assert_near, gradients
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sparse24

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(params=WEIGHT_KINDS)
def kind(request):
    return request.param


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


def test_sparse_weights_compiled(device, kind, counter):
    """One graph for a step, and one more for the dense phase."""
    model, x = build(kind, device), inputs(device)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for steps in (1, 2):
        for _ in range(2):
            assert_same(gradients(model, compiled, x), gradients(model, model, x))
        assert counter.frame_count == steps
        sparse24.Schedule(2, dense_warmup_steps=1).apply(model, 0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sparse_weights_checkpointed(device, kind, compiled, counter):
    model, x = build(kind, device), inputs(device)
    call = checkpointed(model)
    call = torch.compile(call, backend=counter, fullgraph=True) if compiled else call
    assert_same(gradients(model, call, x), gradients(model, model, x))


@pytest.mark.parametrize("wrapper", ["plain", "checkpointed", "compiled"])
def test_sparse_weights_under_autocast(device, kind, wrapper, counter):
    """float32 masters are pruned, and adapters added, before they are rounded."""
    model, x = build(kind, device, torch.float32, layers=1), inputs(device, torch.float32)
    layer = model.layers[0]
    call = {
        "plain": layer,
        "checkpointed": lambda x: checkpoint(layer, x, use_reentrant=False),
        "compiled": torch.compile(layer, backend=counter, fullgraph=True),
    }[wrapper]

    def under_autocast(x):
        with torch.autocast(device, torch.bfloat16):
            return call(x)

    actual = gradients(layer, under_autocast, x)
    assert actual[0].dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in actual[1:])
    expected = gradients(layer, lambda x: layer(x.bfloat16()), x)
    if wrapper == "compiled":  # a compiler differentiates the product of the adapters under autocast
        assert_near(actual, expected, 1e-2)
    else:
        assert_same(actual, expected)


def test_sparse_weights_accumulate(device, kind):
    model = build(kind, device)
    xs = [inputs(device), 2 * inputs(device)]
    alone = [gradients(model, model, x)[2:] for x in xs]
    model.zero_grad()
    for x in xs:
        out = model(x)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
        (out * weights).sum().backward()
    for p, *parts in zip(model.parameters(), *alone, strict=True):
        torch.testing.assert_close(p.grad, sum(parts))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_sparse_weights_copied(device, kind, copied):
    model, x = build(kind, device), inputs(device)
    other = copied(model)
    assert_same(gradients(other, other, x), gradients(model, model, x))
    assert str(other) == str(model)


def test_cuda_graph_of_a_step_with_sparse_weights(cuda, kind):
    """Masks and parameters are read when the graph is replayed."""
    model, x = build(kind, cuda), inputs(cuda)
    pruning = sparse24.WeightPruning(model, refresh_steps=1, soft=True)
    pruning.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(model, model, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph, stream=stream):
        out = model(x)
        out.square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p.flip(0))
            p.grad.zero_()
    graph.replay()
    replayed = [out.detach().clone(), *(p.grad.clone() for p in model.parameters())]
    del out  # its graph would keep nodes of the other stream
    model.zero_grad(set_to_none=True)
    again = model(x)
    again.square().mean().backward()
    assert_same(replayed, [again.detach(), *(p.grad for p in model.parameters())])
