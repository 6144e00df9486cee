"""CUDA graphs of networks: captured once, replayed with new data, against eager calls."""

import copy

import pytest
import torch
from compare import assert_same_bits
from composition_models import KINDS, build, inputs
from convert_models import assert_near, gradients


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.filterwarnings("ignore:.*AccumulateGrad.*:UserWarning")  # of another stream
def test_cuda_graph_of_a_training_step(cuda, kind):
    """Forward, backward and optimizer, captured once and replayed with new data."""
    model, static = build(kind, cuda), inputs(cuda)
    by_hand = copy.deepcopy(model)

    def step(module, optimizer, x):
        optimizer.zero_grad(set_to_none=False)
        loss = module(x).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, by_hand)]
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(2):
            step(model, optimizers[0], static)
    torch.cuda.current_stream().wait_stream(warm)
    for _ in range(2):
        step(by_hand, optimizers[1], static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, optimizers[0], static)
    for factor in (1.0, 0.5, 2.0):
        x = factor * inputs(cuda)
        static.copy_(x)
        graph.replay()
        assert_same_bits(loss, step(by_hand, optimizers[1], x))
    for a, e in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert_same_bits(a, e)


@pytest.mark.filterwarnings("ignore:.*AccumulateGrad.*:UserWarning")  # of another stream
def test_graphed_callable(cuda, kind):
    model = build(kind, cuda)
    expected = [gradients(model, model, f * inputs(cuda)) for f in (1.0, 0.5)]
    sample = inputs(cuda).requires_grad_()
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (sample,))
    for factor, e in zip((1.0, 0.5), expected, strict=True):
        for a, b in zip(gradients(graphed, graphed, factor * inputs(cuda)), e, strict=True):
            assert_same_bits(a, b)


@pytest.mark.filterwarnings("ignore")  # of torch's own modules
def test_reduce_overhead(cuda, kind):
    """CUDA graphs of torch.compile: recorded at the second call, replayed at the third."""
    torch._dynamo.reset()
    model = build(kind, cuda)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for factor in (1.0, 0.5, 2.0, 1.0):
        torch.compiler.cudagraph_mark_step_begin()
        x = factor * inputs(cuda)
        actual = [t.clone() for t in gradients(model, compiled, x)]
        assert_near(actual, gradients(model, model, x), 2e-2)
    torch._dynamo.reset()
