"""torch.compile: one graph without breaks, one for all sizes with dynamic shapes, and the results of eager mode."""

import pytest
import torch
from compare import assert_same_bits
from data import k_major, normal, relu2_like
from torch._dynamo.testing import CompileCounterWithBackend

import sparse24

TOKENS = (64, 127, 193, 8)


def forward(x, w, dim):
    values, meta = sparse24.compress(x, "relu2", dim)
    out = sparse24.mm(values, meta, w if dim == -2 else w.t(), dim=dim)
    return out, sparse24.decompress(values, meta, x.shape[0], x.shape[1], dim), sparse24.compress_like(x, meta, dim)


def forward_fp8(x, w, dim):
    values, meta, scale = sparse24.compress_fp8(x, None, "relu2", dim)
    if dim == -2:
        w = w.t().contiguous()  # [N, tokens]: K is the tokens
        w = torch.nn.functional.pad(w, (0, -w.shape[1] % 16))
    q, w_scale = sparse24.quantize_fp8(w)
    b = q.t()[: x.shape[0]] if dim == -2 else q.t()
    out = sparse24.mm(values, meta, b, scale, w_scale, dim=dim, transpose_out=True)
    return out, sparse24.decompress(values, meta, x.shape[0], x.shape[1], dim)


def weight(tokens, dim, dtype, device):
    """w [N, F] for dim=-1, g [tokens, N] for dim=-2."""
    return normal(*((40, 96) if dim == -1 else (tokens, 48)), dtype=dtype, seed=1).to(device)


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("function", [forward, forward_fp8], ids=["sixteen_bit", "fp8"])
def test_one_dynamic_graph_for_all_sizes(device, dim, function, counter):
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for tokens in TOKENS:
        x = relu2_like(tokens, 96, torch.bfloat16, seed=tokens).to(device)
        w = weight(tokens, dim, torch.bfloat16, device)
        for actual, expected in zip(compiled(x, w, dim), function(x, w, dim), strict=True):
            assert_same_bits(actual, expected)
            assert actual.stride() == expected.stride()
    assert counter.frame_count == 1


@pytest.mark.parametrize("function", [forward, forward_fp8], ids=["sixteen_bit", "fp8"])
def test_one_static_graph_for_each_size(device, dim, function, counter):
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=False)
    for tokens in (64, 127, 64):
        x = relu2_like(tokens, 96, torch.bfloat16, seed=tokens).to(device)
        w = weight(tokens, dim, torch.bfloat16, device)
        for actual, expected in zip(compiled(x, w, dim), function(x, w, dim), strict=True):
            assert_same_bits(actual, expected)
    assert counter.frame_count == 2


def test_one_dynamic_graph_with_backward(device, dim, counter):
    def loss(x, w):
        values, meta = sparse24.compress(x, "relu2", dim)
        return sparse24.mm(values, meta, w if dim == -2 else w.t(), dim=dim).square().sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for tokens in TOKENS:
        gradients = []
        for function in (compiled, loss):
            x = relu2_like(tokens, 96, torch.bfloat16, seed=tokens).to(device).requires_grad_()
            w = weight(tokens, dim, torch.bfloat16, device).requires_grad_()
            function(x, w).backward()
            gradients.append((x.grad, w.grad))
        for actual, expected in zip(*gradients, strict=True):
            assert_same_bits(actual, expected)
    assert counter.frame_count == 1


def test_any_number_of_features_is_one_graph(device, counter):
    """A symbolic number of columns becomes a guard on its alignment, not a graph for each size."""
    compiled = torch.compile(lambda x: sparse24.compress(x, "relu"), backend=counter, fullgraph=True, dynamic=True)
    for tokens, features in ((64, 96), (127, 1856), (193, 160)):
        x = relu2_like(tokens, features, torch.bfloat16).to(device)
        for actual, expected in zip(compiled(x), sparse24.compress(x, "relu"), strict=True):
            assert_same_bits(actual, expected)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore")  # of torch's own modules
def test_inductor(device):
    """The default backend: what is around the ops is compiled, the ops are called."""
    torch._dynamo.reset()

    def function(x, w):
        values, meta = sparse24.compress(x * 2, "relu2")
        return sparse24.mm(values, meta, w.t()) + 1

    x = relu2_like(127, 96, torch.bfloat16).to(device)
    w = normal(40, 96, dtype=torch.bfloat16).to(device)
    assert_same_bits(torch.compile(function, fullgraph=True, dynamic=True)(x, w), function(x, w))
    torch._dynamo.reset()


def test_wrong_arguments_fail_while_tracing(device, counter):
    x = relu2_like(64, 96, torch.bfloat16).to(device)
    values, meta = sparse24.compress(x)
    b = k_major(normal(80, 16, dtype=torch.bfloat16).to(device))
    with pytest.raises(Exception, match=r"sparse24.mm: expected b to have 96 rows .*got 80"):
        torch.compile(sparse24.mm, backend=counter, fullgraph=True)(values, meta, b)
