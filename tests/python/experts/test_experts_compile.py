"""relu2_experts in compiled graphs: one for all sizes, sizes that nobody knows, no waiting for the device."""

import pytest
import torch
from compare import assert_same_bits
from data import normal
from mixture import COUNTS, OUT, float8, rows, together, weights
from synchronisation import no_synchronisation
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import sparse24
from sparse24.experts.arguments import Arguments, Needed
from sparse24.experts.backward import gradients
from sparse24.experts.forward import activation, output
from sparse24.experts.reference import options_of, relu2_experts_reference
from sparse24.mlp.arguments import Plan
from sparse24.ops.activation import RELU2

BF16 = torch.bfloat16

# Dynamo makes an instance of each autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_one_dynamic_graph_for_all_sizes(device, counter, precision):
    def step(x, w1, w2, offsets, row_scale):
        return sparse24.relu2_experts(x, w1, w2, offsets, row_scale=row_scale, precision=precision)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for counts in (COUNTS, (9, 9, 9, 0, 5), (0, 40, 2, 3, 4)):
        x, offsets = rows(BF16, device, counts, beyond=4)
        inputs = x, *weights(BF16, device), normal(len(x), dtype=torch.float32, seed=4).to(device)
        grad = normal(len(x), OUT, dtype=BF16, seed=5).to(device)
        results = []
        for function in (compiled, step):
            x, w1, w2, row_scale = own = [t.clone().requires_grad_() for t in inputs]
            out = function(x, w1, w2, offsets, row_scale)
            results.append((out, *torch.autograd.grad(out, own, grad)))
        for actual, expected in zip(*results, strict=True):
            assert_same_bits(actual, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_what_cuda_runs_is_compiled_with_its_gradients(device, counter, sparse):
    """Dynamo of torch 2.11 loses gradients of what is written to, or returned twice."""
    compiled = torch.compile(together, backend=counter, fullgraph=True)
    x, offsets = rows(BF16, device, beyond=4)
    inputs = x, *weights(BF16, device), normal(len(x), dtype=torch.float32, seed=4).to(device)
    results = []
    for run in (compiled, together):
        own = [t.clone().requires_grad_() for t in inputs]
        out = run(*own[:3], offsets, own[3], sparse=sparse)
        results.append((out, *torch.autograd.grad(out, own, torch.ones_like(out))))
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)


def test_sizes_that_depend_on_data(device, counter):
    """Rows that are selected by a mask, in one graph."""
    w1, w2 = weights(BF16, device)

    def dispatch(x, expert):
        chosen = expert >= 0
        x, expert = x[chosen], expert[chosen]
        order = expert.argsort(stable=True)
        offsets = (expert[None] <= torch.arange(len(w1), device=x.device)[:, None]).sum(1).int()
        return sparse24.relu2_experts(x[order], w1, w2, offsets)

    x = normal(60, w1.shape[2], dtype=BF16, seed=6).to(device)
    expert = torch.arange(60, device=device) % 7 - 1
    expert = torch.where(expert >= len(w1), -1, expert)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(dispatch, backend=counter, fullgraph=True)
        assert_same_bits(compiled(x, expert), dispatch(x, expert))


@pytest.mark.filterwarnings("ignore")  # of torch's own modules
def test_inductor(device):
    torch._dynamo.reset()
    x, offsets = rows(BF16, device, beyond=4)
    w1, w2 = weights(BF16, device)
    row_scale = normal(len(x), dtype=torch.float32, seed=4).to(device)
    compiled = torch.compile(sparse24.relu2_experts, fullgraph=True)(x, w1, w2, offsets, row_scale=row_scale)
    eager = sparse24.relu2_experts(x, w1, w2, offsets, row_scale=row_scale)
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)
    torch._dynamo.reset()


@pytest.mark.parametrize("fp8", [False, True], ids=["sixteen_bit", "fp8"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_on_cuda_nothing_asks_for_values(fp8, sparse, monkeypatch):
    """Without a GPU, on fake tensors, of which no value can be read; the number of rows is not known either."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        count = mode.shape_env.create_unbacked_symint()
        torch._check(count >= 0)
        x, w1, w2 = (torch.empty(*s, dtype=BF16, device="cuda") for s in ((count, 64), (5, 128, 64), (5, 64, 128)))
        offsets = torch.empty(5, dtype=torch.int32, device="cuda")
        a = Arguments(x, w1, w2, torch.empty(count, device="cuda"), offsets, None, None, Plan(RELU2, fp8, sparse))
        activated = activation(a)
        out = output(a, activated)
        grads = gradients(a, activated, Needed(True, True, True, True), torch.empty_like(out))
    assert out.shape[1] == 64 and out.dtype == BF16
    assert [g.dim() for g in grads] == [2, 3, 3, 1]


@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
def test_the_host_does_not_wait(cuda, learns):
    x, offsets = rows(BF16, cuda)
    w1, w2 = (w.requires_grad_(learns) for w in weights(BF16, cuda))
    sparse24.relu2_experts(x, w1, w2, offsets).sum()
    with no_synchronisation():
        out = sparse24.relu2_experts(x, w1, w2, offsets)
        if learns:
            torch.autograd.grad(out, (w1, w2), torch.ones_like(out))


@pytest.mark.parametrize("fp8", [False, True], ids=["sixteen_bit", "fp8"])
def test_one_cuda_graph_for_all_offsets(cuda, fp8):
    x, offsets = rows(BF16, cuda)
    w1, w2 = weights(BF16, cuda)
    scales = {}
    if fp8:
        w1, w2, scales["w1_scale"], scales["w2_scale"] = float8(w1, w2)
    run = lambda: sparse24.relu2_experts(x, w1, w2, offsets, **scales)  # noqa: E731
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for counts in (COUNTS, (0, 50, 0, 0, 0), (10, 10, 10, 10, 10), (1, 2, 3, 4, 5)):
        offsets.copy_(torch.tensor(counts, device=cuda).cumsum(0))
        graph.replay()
        assert_same_bits(out, run())


@pytest.mark.parametrize("differentiable", [False, True], ids=["plain", "differentiable"])
@pytest.mark.parametrize("fp8", [False, True], ids=["sixteen_bit", "fp8"])
def test_opcheck_of_the_reference(fp8, differentiable):
    dtype = BF16 if fp8 else torch.float32
    x, offsets = rows(dtype, "cpu", beyond=3)
    x = x.nan_to_num().requires_grad_(differentiable)
    w1, w2 = (w.requires_grad_(differentiable) for w in weights(dtype, "cpu"))
    row_scale = normal(len(x), dtype=torch.float32, seed=4).requires_grad_(differentiable)
    options = options_of(sparse24.Recipe())
    torch.library.opcheck(
        relu2_experts_reference,
        (x, w1, w2, row_scale, offsets, None, None, fp8, True, *options, [differentiable] * 4),
    )
