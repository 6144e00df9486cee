"""A network whose activation has a threshold: forward and backward, on every path, as a module and converted."""

import copy
import math

import pytest
import torch
import training_reference as reference
from compare import assert_same_bits
from convert_models import Inline
from torch import Tensor, nn
from training_reference import NAMES, exact_operands, operands, run

import sparse24
from sparse24 import ConvertConfig, Recipe

THRESHOLD = 2.0  # of exact operands, whose h are integers: some h are on it


def dense(leaves: list[Tensor], grad: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """Output and gradients of plain torch in float64, without pruning."""
    x, w1, w2, b1, b2 = exact = [t.double().requires_grad_() for t in leaves]
    h = x @ w1.t() + b1
    out = torch.where(h > threshold, h, 0.0).square() @ w2.t() + b2
    return out.detach(), *torch.autograd.grad(out, exact, grad.double())


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(residual=True), Recipe(weight_gradients="dense"), Recipe(reuse_mask=False)], ids=str
)
def test_sparse_exactly(device, dtype, recipe, fused, recompute):
    *leaves, grad = exact_operands(133, dtype, device)
    expected = reference.step(*leaves, grad, recipe, threshold=THRESHOLD)
    assert not torch.equal(expected.out, reference.step(*leaves, grad, recipe).out)
    out, *grads = run(leaves, grad, recipe=recipe, fused=fused, recompute=recompute, threshold=THRESHOLD)
    assert_same_bits(out + 0.0, expected.out.to(dtype) + 0.0)
    for name, actual, exact in zip(NAMES, grads, expected.grads, strict=True):
        assert_same_bits(actual + 0.0, exact.float().to(dtype) + 0.0, name)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("features", [160, 20])
def test_dense_exactly(device, dtype, features, fused, recompute):
    """The dense phase; and features that no kernel of the first layer takes."""
    x, w1, w2, b1, b2, grad = exact_operands(65, dtype, device)
    leaves = [x, w1[:features], w2[:, :features], b1[:features], b2]
    expected = dense(leaves, grad, THRESHOLD)
    options = {"sparse": False, "fused": fused, "recompute": recompute}
    actual = run(leaves, grad, threshold=THRESHOLD, **options)
    assert_same_bits(actual[0] + 0.0, expected[0].float().to(dtype) + 0.0)
    for name, a, e in zip(NAMES, actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2 * torch.finfo(dtype).eps, atol=1e-6, msg=name)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_fp8(device, sparse, fused):
    """As with a first layer whose h are exact and above the threshold or far below it, without one."""
    *leaves, grad = operands(80, torch.bfloat16, device)
    x, w1, w2, b1, b2 = leaves
    options = {"precision": "fp8", "sparse": sparse, "fused": fused}
    h = sparse24.mlp.up_projection(x, w1, b1, fp8=True)
    left = torch.where(h.float() > 0.4, h, 0).float().square()
    without, with_threshold = (run(leaves, grad, threshold=t, **options) for t in (0.0, 0.4))
    assert not torch.equal(without[0], with_threshold[0])
    exact = left.double() @ w2.double().t() + b2.double()
    if not sparse:
        error = (with_threshold[0].double() - exact).norm() / exact.norm()
        assert error < 0.06
    # A feature that no token has above the threshold gets no gradient.
    dead = (left == 0).all(0)
    blocked = b1.clone()
    blocked[:8] = -100.0
    grads = run([x, w1, w2, blocked, b2], grad, threshold=0.4, **options)
    assert grads[2][:8].count_nonzero() == 0 and grads[3][:, :8].count_nonzero() == 0
    assert with_threshold[2][dead].count_nonzero() == 0


@pytest.mark.parametrize("options", [{}, {"sparse": False}, {"fused": False}, {"precision": "fp8"}], ids=str)
def test_zero_is_the_default(device, options):
    *leaves, grad = operands(70, torch.bfloat16, device)
    for a, e in zip(run(leaves, grad, threshold=0.0, **options), run(leaves, grad, **options), strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("threshold", [-1.0, math.nan, math.inf])
def test_refusals(threshold):
    x, w1, w2 = torch.zeros(4, 16), torch.zeros(32, 16), torch.zeros(16, 32)
    rule = "expected threshold to be finite and at least 0, got"
    with pytest.raises(RuntimeError, match=f"^sparse24.relu2_mlp: {rule}"):
        sparse24.relu2_mlp(x, w1, w2, threshold=threshold)
    with pytest.raises(RuntimeError, match=f"^sparse24.nn.ReLU2MLP: {rule}"):
        sparse24.nn.ReLU2MLP(16, 32, threshold=threshold)
    with pytest.raises(RuntimeError, match=f"^sparse24.ConvertConfig: {rule}"):
        ConvertConfig(threshold=threshold)


@pytest.mark.parametrize("threshold", [None, "a", [0.5], 1j, 10**400], ids=lambda value: type(value).__name__)
def test_no_number(threshold):
    x, w1, w2 = torch.zeros(4, 16), torch.zeros(32, 16), torch.zeros(16, 32)
    for op, call in (
        ("relu2_mlp", lambda: sparse24.relu2_mlp(x, w1, w2, threshold=threshold)),
        ("nn.ReLU2MLP", lambda: sparse24.nn.ReLU2MLP(16, 32, threshold=threshold)),
        ("ConvertConfig", lambda: ConvertConfig(threshold=threshold)),
    ):
        with pytest.raises(RuntimeError, match=f"^sparse24.{op}: expected threshold to be a number, .*, got "):
            call()


@pytest.mark.parametrize("threshold", [65504.0, 3.5e38, 1e300])
def test_infinity_exceeds_every_threshold(device, dtype, threshold):
    """One beyond float32 too, on every path."""
    x, w1, w2 = (torch.zeros(s, dtype=dtype, device=device) for s in ((8, 64), (64, 64), (16, 64)))
    w2.fill_(1)
    b1 = torch.zeros(64, dtype=dtype, device=device)
    b1[5] = math.inf
    for options in ({}, {"fused": False}, {"sparse": False}, {"sparse": False, "fused": False}):
        for learns in (False, True):
            out = sparse24.relu2_mlp(
                x.clone().requires_grad_(learns), w1, w2, b1, min_tokens=0, threshold=threshold, **options
            )
            assert out.isposinf().all(), options
    assert sparse24.relu2_mlp_few(x, w1, w2.t(), b1, threshold=threshold).isposinf().all()


def module(device: str, dtype: torch.dtype, threshold: float = 0.25) -> sparse24.nn.ReLU2MLP:
    torch.manual_seed(0)
    mlp = sparse24.nn.ReLU2MLP(64, 160, bias=True, min_tokens=0, threshold=threshold)
    return mlp.to(device, dtype)


def function(mlp: sparse24.nn.ReLU2MLP, x: Tensor, **options) -> Tensor:
    up, down = mlp.up_proj, mlp.down_proj
    return sparse24.relu2_mlp(x, up.weight, down.weight, up.bias, down.bias, min_tokens=0, **options)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_module(device, dtype, sparse):
    mlp, x = module(device, dtype), torch.randn(33, 64, device=device, dtype=dtype)
    mlp.sparse = sparse
    assert mlp.threshold == 0.25 and "threshold=0.25" in repr(mlp)
    assert "threshold" not in repr(sparse24.nn.ReLU2MLP(16, 32))
    for m in (mlp, copy.deepcopy(mlp)):
        assert_same_bits(m(x), function(mlp, x, sparse=sparse, threshold=0.25))
    mlp.threshold = 0.0
    assert_same_bits(mlp(x), function(mlp, x, sparse=sparse))


def test_module_that_calls_its_layers(device):
    mlp, x = module(device, torch.bfloat16), torch.randn(33, 64, device=device, dtype=torch.bfloat16)
    expected = function(mlp, x, sparse=False, fused=False, threshold=0.25)
    mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="calls its layers"):
        assert_same_bits(mlp(x), expected)


def test_quantised_module(device):
    mlp, x = module(device, torch.bfloat16, 0.5).quantize_(), torch.randn(33, 64, device=device, dtype=torch.bfloat16)
    out = mlp(x)
    mlp.threshold = 0.0
    assert not torch.equal(out, mlp(x))


def test_converted(device, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(Inline(d=64, hidden=160)).to(device, dtype)
    up, down = model[0].children()
    x = torch.randn(33, 64, device=device, dtype=dtype)
    report = sparse24.convert(model, ConvertConfig(threshold=0.25, min_tokens=0), quiet=True)
    assert len(report.converted) == 1 and "threshold=0.25" in repr(model)
    expected = sparse24.relu2_mlp(x, up.weight, down.weight, up.bias, down.bias, min_tokens=0, threshold=0.25)
    assert_same_bits(model(x), expected)
    sparse24.revert(model)
    assert not torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_compiled(device, dynamic, sparse):
    """One graph for all sizes, and for a module that has another threshold another one."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    mlp = module(device, torch.bfloat16)
    mlp.sparse = sparse
    compiled = torch.compile(mlp, backend=counter, fullgraph=True, dynamic=dynamic)
    for tokens in (33, 80, 127) if dynamic else (33, 33):
        x = torch.randn(tokens, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        compiled(x).sum().backward()
        mlp(y).sum().backward()
        assert_same_bits(x.grad, y.grad)
    assert counter.frame_count == 1
    for threshold in (0.0, 0.5, 0.75):
        mlp.threshold = threshold
        assert_same_bits(compiled(x), mlp(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_checkpointed(device, dtype, sparse):
    from torch.utils.checkpoint import checkpoint

    mlp = module(device, dtype)
    mlp.sparse = sparse
    x = torch.randn(33, 64, device=device, dtype=dtype)
    results = []
    for call in (mlp, lambda t: checkpoint(mlp, t, use_reentrant=False)):
        mlp.zero_grad()
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        out.backward(torch.ones_like(out))
        results.append([out, leaf.grad, *(p.grad for p in mlp.parameters())])
    for a, e in zip(*results, strict=True):
        assert_same_bits(a, e)
