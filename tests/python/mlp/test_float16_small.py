"""Gradients in float16 where pre-activations are small, so that their squares underflow: twice torch's own error."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from data import normal
from oracle import Pattern
from torch import Tensor, nn

import sparse24
from sparse24 import Recipe

T, D, HIDDEN, OUT = 128, 48, 160, 40
HALF = torch.float16
NAMES = ("x", "w1", "w2", "b1")
#: Deviations of the pre-activation. Squares have all their digits at the first, hardly any at the last.
SIZES = pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3, 3e-4])


def operands(size: float, device: str, dtype: torch.dtype = HALF) -> list[Tensor]:
    """x, w1, w2, b1, and a gradient of the output."""
    shapes = ((T, D), (HIDDEN, D), (OUT, HIDDEN), (HIDDEN,), (T, OUT))
    factors = 1, size / D**0.5, HIDDEN**-0.5, size / 4, 1
    return [
        normal(*s, dtype=torch.float32, seed=i).mul(f).to(device, dtype)
        for i, (s, f) in enumerate(zip(shapes, factors, strict=True))
    ]


def network(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    return F.linear((torch.relu(F.linear(x, w1, b1)) * mask).square(), w2)


def gradients(function, inputs, grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))


def check(actual, plain, inputs, grad: Tensor, names=NAMES) -> None:
    """`actual` is nearer to `plain` in float64 than twice `plain` in float16 is, in the norm of each gradient."""
    torchs, exact = (gradients(plain, inputs, grad, dtype) for dtype in (HALF, torch.float64))
    for name, a, t, e in zip(names, actual, torchs, exact, strict=True):
        error, torch_error = ((g.double() - e).norm() for g in (a, t))
        assert error <= 2 * torch_error, f"{name}: error {error / e.norm():.2e}, torch has {torch_error / e.norm():.2e}"


def mask_of(x: Tensor, w1: Tensor, b1: Tensor, fused: bool = True) -> Tensor:
    if fused:
        meta = sparse24.linear_compress(x, w1, bias=b1)[1]
    else:
        meta = sparse24.compress(F.linear(x, w1, b1), "relu2")[1]
    return Pattern.of_meta(meta, T, w1.shape[0], HALF, -1).mask().to(x.device)


@SIZES
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize(
    "recipe", [Recipe(weight_gradients="dense"), Recipe(residual=True), Recipe(dense_features=1.0)], ids=str
)
def test_sparse(device, size, recipe, fused, recompute):
    """Recipes that drop nothing along tokens: by separate products, twice, and by linear_gradient."""
    *inputs, grad = operands(size, device)
    x, w1, _, b1 = inputs
    mask = mask_of(x, w1, b1, fused)

    def ours(x, w1, w2, b1):
        return sparse24.relu2_mlp(x, w1, w2, b1, min_tokens=0, fused=fused, recompute=recompute, recipe=recipe)

    check(gradients(ours, inputs, grad, HALF), lambda *t: network(*t, mask), inputs, grad)


@SIZES
def test_sparse_with_the_default_recipe(device, size):
    """dx and db1, which nothing is dropped of; and that the others are as near to what they prune as in float32."""
    *inputs, grad = operands(size, device)
    x, w1, w2, b1 = inputs
    mask = mask_of(x, w1, b1)
    actual = gradients(lambda *t: sparse24.relu2_mlp(*t, min_tokens=0), inputs, grad, HALF)
    check((actual[0], actual[3]), lambda x, b1: network(x, w1.to(x), w2.to(x), b1, mask), (x, b1), grad, ("x", "b1"))
    wide = [t.cpu().float() for t in inputs]
    same = gradients(lambda *t: sparse24.relu2_mlp(*t, min_tokens=0), wide, grad.cpu(), torch.float32)
    error = (actual[1].cpu().float() - same[1]).norm() / same[1].norm()
    assert error < 0.03, f"w1: {error:.3f}"  # of near equals the two may keep one and the other


@SIZES
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("features", [HIDDEN, 20])
def test_dense(device, size, fused, features, recompute):
    """Also where no kernel takes such a number of features."""
    x, w1, w2, b1, grad = operands(size, device)
    inputs = x, w1[:features], w2[:, :features].contiguous(), b1[:features]

    def ours(x, w1, w2, b1):
        return sparse24.relu2_mlp(x, w1, w2, b1, sparse=False, fused=fused, recompute=recompute)

    check(gradients(ours, inputs, grad, HALF), network, inputs, grad)


@SIZES
@pytest.mark.parametrize("op", ["linear_relu2", "linear_compress", "compress"])
def test_raw_ops(device, size, op):
    """Autograd of the ops that square."""
    x, w1, w2, b1, grad = operands(size, device)
    mask = 1.0 if op == "linear_relu2" else mask_of(x, w1, b1, fused=op == "linear_compress")

    def ours(x, w1, w2, b1):
        if op == "linear_relu2":
            return F.linear(sparse24.linear_relu2(x, w1, bias=b1)[0], w2)
        if op == "linear_compress":
            values, meta, *_ = sparse24.linear_compress(x, w1, bias=b1)
        else:
            values, meta = sparse24.compress(F.linear(x, w1, b1), "relu2")
        return sparse24.mm(values, meta, w2.t())

    check(gradients(ours, (x, w1, w2, b1), grad, HALF), lambda *t: network(*t, mask), (x, w1, w2, b1), grad)


@pytest.mark.parametrize("op", ["linear_relu2", "linear_compress"])
def test_raw_ops_of_roots(device, root_dtype, op):
    """Squared by torch they are the network, with its second derivatives."""
    *inputs, grad = operands(0.5, device, root_dtype)
    x, w1, _, b1 = inputs
    meta = sparse24.linear_compress(x, w1, bias=b1)[1]
    mask = 1.0 if op == "linear_relu2" else Pattern.of_meta(meta, T, HIDDEN, root_dtype, -1).mask().to(device)

    def ours(x, w1, w2, b1):
        if op == "linear_relu2":
            return F.linear(sparse24.linear_relu2(x, w1, bias=b1, activation="relu")[0].square(), w2)
        values, meta, *_ = sparse24.linear_compress(x, w1, bias=b1, activation="relu")
        return sparse24.mm(values.square(), meta, w2.t())

    tolerance = {"rtol": 0.0, "atol": 8 * torch.finfo(root_dtype).eps}
    for a, e in zip(
        gradients(ours, inputs, grad, root_dtype),
        gradients(lambda *t: network(*t, mask), inputs, grad, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(a.double() / e.abs().max(), e / e.abs().max(), **tolerance)


@SIZES
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("how", ["module", "converted", "autocast"])
def test_modules_and_autocast(device, size, sparse, how):
    """The bits of relu2_mlp, whose gradients are right; float32 weights get them in float32."""
    x, w1, w2, b1, grad = operands(size, device)
    recipe = Recipe(weight_gradients="dense")
    expected = gradients(
        lambda *t: sparse24.relu2_mlp(*t, min_tokens=0, sparse=sparse, recipe=recipe), (x, w1, w2, b1), grad, HALF
    )
    module = sparse24.nn.ReLU2MLP(D, HIDDEN, OUT, bias=True, min_tokens=0, recipe=recipe, device=device, dtype=HALF)
    if how == "converted":
        module = Plain().to(device, HALF)
    with torch.no_grad():
        module.up_proj.weight.copy_(w1), module.up_proj.bias.copy_(b1)
        module.down_proj.weight.copy_(w2), module.down_proj.bias.zero_()
    if how == "converted":
        sparse24.convert(module, sparse24.ConvertConfig(min_tokens=0, recipe=recipe))
    module.sparse = sparse
    autocast = how == "autocast"
    module = module.float() if autocast else module
    x = x.clone().to(torch.float32 if autocast else HALF).requires_grad_()
    with torch.autocast(device, HALF, enabled=autocast):
        out = module(x)
    out.backward(grad.to(out.dtype))
    actual = x.grad, module.up_proj.weight.grad, module.down_proj.weight.grad, module.up_proj.bias.grad
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_same_bits(a, e.to(a.dtype), name)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(D, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)).square())


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_training_and_inference_have_the_same_bits(device, sparse):
    """Squares of stored roots are what inference stores."""
    for size in (100.0, 1e-3):
        *inputs, _ = operands(size, device)
        with torch.no_grad():
            expected = sparse24.relu2_mlp(*inputs, min_tokens=0, sparse=sparse)
        actual = sparse24.relu2_mlp(*(t.requires_grad_() for t in inputs), min_tokens=0, sparse=sparse)
        assert_same_bits(actual, expected)


def test_squares_that_overflow_have_derivatives(device):
    """h = 300, y infinite, dh = 600."""
    x = torch.ones(1, 8, dtype=HALF, device=device)
    w = torch.zeros(16, 8, dtype=HALF, device=device)
    w[2, 0] = 300
    w.requires_grad_()
    for op in (sparse24.linear_relu2, sparse24.linear_compress):
        y = op(x, w)[0]
        assert y.max() == torch.inf
        (grad,) = torch.autograd.grad(y.sum(), w)
        assert grad[:, 0].tolist() == [0, 0, 600, *[0] * 13]
