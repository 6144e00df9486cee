"""linear_relu2_gradient: bit for bit the separate steps, wherever the sums of the product are exact."""

from dataclasses import dataclass

import oracle
import pytest
import torch
from compare import assert_accurate, assert_same_bits
from data import LAYOUTS, activations, integers, normal, relayout, relu2_like
from roots import round_to, times_root
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import sparse24

#: Tokens, D, F: no tokens, tails of the tiles in both directions and of a quad's 32 features, no D at all, no features.
SHAPES = [
    (0, 64, 96),
    (1, 64, 8),
    (2, 8, 24),
    (127, 80, 160),
    (129, 64, 1888),
    (7, 208, 40),
    (300, 0, 64),
    (33, 16, 0),
]
ODD_DEPTHS = [(9, 1, 64), (130, 36, 96), (3, 99, 8)]


@dataclass
class Problem:
    """Operands whose products and sums are exact in float32."""

    grad: Tensor
    w: Tensor
    y: Tensor
    roots: bool = False

    def run(self, op=sparse24.linear_relu2_gradient) -> Tensor:
        return op(self.grad, self.w, self.y, self.roots)

    def expected(self) -> Tensor:
        """From the definition, on the CPU."""
        product = self.grad.cpu().double() @ self.w.cpu().double() + 0.0  # no negative zeros: sums begin with zero
        return times_root(round_to(product.float(), self.grad.dtype), self.y.cpu(), self.roots)

    def check(self) -> None:
        dh = self.run()
        assert_same_bits(dh, self.expected())
        assert dh.device == self.grad.device and dh.is_contiguous()


def problem(tokens, depth, features, dtype, device, *, seed=0, specials=False, roots=False) -> Problem:
    grad = integers(tokens, depth, dtype=dtype, limit=2, seed=seed)
    w = integers(depth, features, dtype=dtype, limit=2, seed=seed + 1)
    h = activations(tokens, features, dtype, seed=seed + 2, specials=specials)
    y = round_to(oracle.activate(h, "relu" if roots else "relu2"), dtype)
    return Problem(grad.to(device), w.to(device), y.to(device), roots)


@pytest.mark.parametrize("specials", [False, True], ids=["finite", "specials"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(poisoned_memory, device, dtype, shape, specials):
    problem(*shape, dtype, device, specials=specials).check()


@pytest.mark.parametrize("specials", [False, True], ids=["finite", "specials"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_roots(poisoned_memory, device, root_dtype, shape, specials):
    problem(*shape, root_dtype, device, seed=6, specials=specials, roots=True).check()


@pytest.mark.parametrize("shape", ODD_DEPTHS, ids=str)
def test_any_depth(poisoned_memory, device, dtype, shape):
    problem(*shape, dtype, device, seed=5).check()


def test_any_number_of_tokens(poisoned_memory, device):
    for tokens in (*range(1, 10), 15, 16, 17, 63, 64, 65):
        problem(tokens, 16, 48, torch.bfloat16, device, seed=tokens).check()


def test_any_multiple_of_eight_features(poisoned_memory, device):
    for features in range(8, 280, 8):
        problem(19, 16, features, torch.float16, device, seed=features).check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout):
    p = problem(37, 64, 96, dtype, device, seed=7)
    Problem(*(relayout(t, layout) for t in (p.grad, p.w, p.y))).check()


def test_nan_of_a_token_stays_there(device, dtype):
    p = problem(40, 64, 96, dtype, device, seed=9)
    p.grad[3, 5] = torch.nan
    p.check()
    assert p.run()[3].isnan().all() and not p.run()[4:].isnan().any()


def test_overflow(device):
    """dy and dh beyond float16 are infinite; infinity times the root of zero is NaN."""
    p = problem(5, 16, 32, torch.float16, device, seed=10)
    p.grad.fill_(128)
    p.w.fill_(128)
    p.check()
    assert p.run().isnan().any() and p.run().isinf().any()


@pytest.mark.parametrize("roots", [False, True], ids=["squares", "roots"])
def test_every_root_is_rounded_to_nearest(device, dtype, roots):
    """All numbers that y can be, subnormals and infinity among them; or all that are given instead of roots."""
    if dtype == torch.float32 or (roots and dtype != torch.float16):
        pytest.skip("too many, or no roots")
    largest = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
    y = oracle.from_bits(torch.arange(2**15), dtype)[: largest + 1]
    y = torch.nn.functional.pad(y, (0, -len(y) % 128)).reshape(-1, 32)
    grad = torch.ones(y.shape[0], 8, dtype=dtype)
    w = torch.zeros(8, 32, dtype=dtype)
    w[0] = 1.25
    Problem(grad.to(device), w.to(device), y.to(device), roots).check()


def test_small_example(device):
    """y = 0, 1, 4, 9 and dy = 8, 4, -1, 2, so dh = 0, 8, -4, 12."""
    y, w = torch.zeros(2, 1, 8, device=device, dtype=torch.bfloat16)
    y[0, :4] = torch.tensor([0.0, 1, 4, 9])
    w[0, :4] = torch.tensor([8.0, 4, -1, 2])
    dh = sparse24.linear_relu2_gradient(torch.ones_like(y[:, :1]), w, y)
    assert dh[0].tolist() == [0, 8, -4, 12, 0, 0, 0, 0]


def test_is_the_sparse_one_where_nothing_is_dropped(device, dtype):
    """Activations with two of four already: dh of linear_gradient is this one's at what is kept."""
    p = problem(70, 48, 160, dtype, device, seed=11)
    values, meta = sparse24.compress(p.y)
    p.y = sparse24.decompress(values, meta, *p.y.shape)
    kept = sparse24.linear_gradient(p.grad, p.w, values, meta, tokens=False)[0]
    assert_same_bits(sparse24.compress_like(p.run(), meta), kept)


def test_is_the_derivative_of_linear_relu2(device):
    """The gradients of x and w1 from its result, against autograd in float64."""
    x = normal(64, 32, dtype=torch.bfloat16, seed=1).to(device)
    w1 = normal(96, 32, dtype=torch.bfloat16, seed=2).div(4).to(device)
    w2 = normal(32, 96, dtype=torch.bfloat16, seed=3).div(4).to(device)
    grad = normal(64, 32, dtype=torch.bfloat16, seed=4).to(device)
    dh = sparse24.linear_relu2_gradient(grad, w2, sparse24.linear_relu2(x, w1)[0])
    leaves = [t.double().requires_grad_() for t in (x, w1)]
    torch.relu(leaves[0] @ leaves[1].t()).square().matmul(w2.double().t()).backward(grad.double())
    for actual, exact in ((dh @ w1, leaves[0].grad), (dh.t() @ x, leaves[1].grad)):
        torch.testing.assert_close(actual.double(), exact, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("depth", [64, 1000])
def test_accuracy(device, dtype, depth):
    """Real numbers: as near to float64 as twice torch's error in the same precision."""
    grad = normal(129, depth, dtype=dtype, seed=14).to(device)
    w = normal(depth, 96, dtype=torch.float32, seed=15).div(depth**0.5).to(dtype).to(device)
    y = torch.relu(relu2_like(129, 96, dtype, seed=16)).square().to(device)
    root = 2 * y.double().sqrt()
    torchs = ((grad @ w).float() * root.float()).to(dtype)
    exact, magnitude = grad.double() @ w.double() * root, grad.double().abs() @ w.double().abs() * root
    assert_accurate(sparse24.linear_relu2_gradient(grad, w, y), torchs, exact, magnitude)


def test_one_dynamic_graph_for_all_sizes(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sparse24.linear_relu2_gradient, backend=counter, fullgraph=True, dynamic=True)
    for tokens, depth, features in ((64, 40, 96), (127, 24, 168), (193, 48, 1856)):
        p = problem(tokens, depth, features, torch.bfloat16, device)
        actual, expected = p.run(compiled), p.run()
        assert_same_bits(actual, expected)
        assert actual.stride() == expected.stride()
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_there_is_no_backward_pass(device):
    p = problem(4, 8, 16, torch.bfloat16, device)
    dh = sparse24.linear_relu2_gradient(p.grad.requires_grad_(), p.w, p.y)
    with pytest.raises(RuntimeError, match=r"sparse24.linear_relu2_gradient: expected no backward pass .*, got one"):
        dh.sum().backward()


@pytest.mark.parametrize(
    "w, y, rule",
    [
        ((6, 16), (4, 16), "w to have 8 rows .*got 6"),
        ((8, 20), (4, 20), "w to have a multiple of 8 columns.*got 20"),
        ((8, 16), (5, 16), "y to have 4 rows .*got 5"),
        ((8, 16), (4, 8), "y to have 16 columns .*got 8"),
    ],
)
def test_wrong_shapes_fail_while_tracing(device, w, y, rule):
    compiled = torch.compile(sparse24.linear_relu2_gradient, backend="eager", fullgraph=True)
    tensors = [torch.ones(shape, dtype=torch.bfloat16, device=device) for shape in ((4, 8), w, y)]
    with pytest.raises(Exception, match=rf"sparse24.linear_relu2_gradient: expected {rule}"):
        compiled(*tensors)
    torch._dynamo.reset()
