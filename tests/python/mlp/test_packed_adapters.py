"""Adapters beside packed 2:4 weights: further columns of the weight and of x, in training and for inference."""

import re

import packed_calls
import pytest
import torch
from compare import assert_same_bits
from data import integers
from packed_calls import OUT, D, F, operands

import sparse24
from sparse24 import Recipe, prune24
from sparse24.mlp import kept_weights, packed_weights
from sparse24.nn import sparse_weights

# Dynamo makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def always(monkeypatch):
    packed_calls.always(monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    return packed_calls.spied(monkeypatch)


@pytest.fixture
def beside(monkeypatch):
    """Let steps pack adapters on the CPU too, where their sum with the weight is multiplied otherwise."""

    def choose(packs):
        monkeypatch.setattr(packed_weights, "packed_adapters_pay", lambda *_: packs)

    return choose


def adapted(leaves, adapters, grad, recipe, dtype, **options):
    """A step with adapters: the output, and the gradients of everything."""
    leaves = [t.detach().clone().requires_grad_() for t in (*leaves, *adapters)]
    x, w1, w2, b1, b2, *pair = leaves
    out = sparse24.relu2_mlp(x.to(dtype), w1, w2, b1, b2, adapters=tuple(pair), recipe=recipe, min_tokens=0, **options)
    out.backward(grad)
    return out.detach(), *(t.grad for t in leaves)


@pytest.mark.parametrize("which", ["up", "both"])
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"threshold": 1.0}], ids=str)
def test_steps_have_adapters_beside_what_is_packed(device, dtype, calls, beside, which, masters, options):
    """Of numbers whose sums are exact: the bits of a dense product with the sum of the weight and its adapters."""
    *leaves, grad = operands(133, dtype, device)
    adapters = [integers(*s, dtype=dtype, limit=1, seed=7).to(device) for s in ((F, 3), (3, D))]
    if masters:
        leaves, adapters = [t.float() for t in leaves], [t.float() for t in adapters]
    recipe = Recipe(sparse_weights=which)
    beside(True)
    actual = adapted(leaves, adapters, grad, recipe, dtype, **options)
    assert calls.count("linear_compress_packed") == (2 if "recompute" in options else 1)
    assert ("linear_gradient_packed" in calls) == (which == "both")
    beside(False)
    calls.clear()
    expected = adapted(leaves, adapters, grad, recipe, dtype, **options)
    assert "linear_compress_packed" not in calls
    for a, e in zip(actual[:-2], expected[:-2], strict=True):
        assert_same_bits(a + 0.0, e + 0.0)
    for a, e in zip(actual[-2:], expected[-2:], strict=True):  # those of masters are rounded to the step's dtype
        assert (a.double() - e.double()).norm() <= (1e-2 if masters else 0) * e.double().norm()


@pytest.mark.parametrize("learning", [False, True])
def test_steps_with_adapters_against_float64(device, dtype, calls, beside, learning):
    """At most twice the error of a product with the sum, in the forward and for each gradient."""
    beside(True)
    torch.manual_seed(0)
    mlp = sparse24.nn.ReLU2MLP(D, F, OUT, device=device, dtype=dtype, min_tokens=0, recipe=Recipe(sparse_weights="up"))
    mlp.add_adapters_(8)
    torch.nn.init.normal_(mlp.up_left, std=0.05)
    x = torch.randn(133, D).to(device, dtype)
    with torch.set_grad_enabled(learning):
        out = mlp(x)
    assert calls.count("linear_compress_packed") == learning  # what is packed for inference, `prune_weights_` keeps
    beside(False)
    rival = mlp(x)
    w1 = prune24(mlp.up_proj.weight.double()) + mlp.up_left.double() @ mlp.up_right.double()
    exact = sparse24.prune24((x.double() @ w1.t()).relu().square()) @ mlp.down_proj.weight.double().t()
    error, of_rival = ((t.double() - exact).norm() for t in (out, rival))
    assert error <= 2 * of_rival + 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "masters"])
def test_packed_once_a_step(device, calls, beside, dtype):
    """From the step after the first that accumulated, with the bits of a training that keeps nothing."""
    beside(True)

    def train(keeps):
        torch.manual_seed(0)
        recipe = Recipe(sparse_weights="up")
        mlp = sparse24.nn.ReLU2MLP(D, F, OUT, device=device, dtype=dtype, recipe=recipe, min_tokens=0)
        mlp.add_adapters_(3)
        optimizer = torch.optim.SGD(mlp.parameters(), lr=1e-2)
        packings, outs = [], []
        for step in range(3):
            for batch in range(3):
                calls.clear()
                x = integers(64, D, dtype=torch.bfloat16, seed=3 * step + batch).to(device)
                outs.append(mlp(x))
                outs[-1].sum().backward()
                packings.append(calls.count("prune_pack24"))
                if not keeps:
                    kept_weights._kept.clear()
            optimizer.step()
            optimizer.zero_grad()
        return packings, [t.detach() for t in (*outs, *mlp.parameters())]

    packings, results = train(True)
    assert packings == [1, 1, 0, 1, 0, 0, 1, 0, 0]
    packings, expected = train(False)
    assert packings == [1] * 9
    for a, e in zip(results, expected, strict=True):
        assert_same_bits(a, e)


def test_changed_adapters_are_packed_again(device, calls, beside):
    """Written to, or another parameter in their place."""
    beside(True)
    recipe = Recipe(sparse_weights="up")
    mlp = sparse24.nn.ReLU2MLP(D, F, OUT, device=device, dtype=torch.bfloat16, recipe=recipe, min_tokens=0)
    mlp.add_adapters_(3)
    x = integers(64, D, dtype=torch.bfloat16).to(device)

    def replace():
        mlp.up_left = torch.nn.Parameter(mlp.up_left.detach() * 2)

    def write():
        with torch.no_grad():
            mlp.up_left.normal_()

    for change in (write, replace):
        for _ in range(3):
            mlp(x).sum().backward()
        calls.clear()
        change()
        out = mlp(x)
        assert calls.count("prune_pack24") == 1
        kept_weights._kept.clear()
        assert_same_bits(out, mlp(x))


def test_float8_steps_multiply_the_sum(device, calls, beside):
    beside(True)
    *leaves, grad = operands(128, torch.bfloat16, device)
    adapters = [integers(*s, dtype=torch.bfloat16, limit=1, seed=7).to(device) for s in ((F, 3), (3, D))]
    options = {"precision": "fp8"}
    actual = adapted(
        leaves, adapters, grad, Recipe(sparse_weights="up", fp8_weight_gradients=True), torch.bfloat16, **options
    )
    assert "linear_compress_packed" not in calls
    w1 = torch.addmm(prune24(leaves[1]), *adapters)
    summed = [t.detach().clone().requires_grad_() for t in (leaves[0], w1, *leaves[2:])]
    out = sparse24.relu2_mlp(*summed, recipe=Recipe(fp8_weight_gradients=True), min_tokens=0, **options)
    out.backward(grad)
    for a, e in zip(actual, (out.detach(), *(t.grad for t in summed)), strict=False):
        assert_same_bits(a, e)


def test_adapters_of_steps_are_compiled(device, beside):
    torch._dynamo.reset()
    beside(True)
    *leaves, grad = operands(96, torch.bfloat16, device)
    adapters = [integers(*s, dtype=torch.bfloat16, limit=1, seed=7).to(device) for s in ((F, 3), (3, D))]
    leaves = [t.requires_grad_() for t in (*leaves, *adapters)]
    recipe = Recipe(sparse_weights="both")

    def step(x, w1, w2, b1, b2, left, right):
        return sparse24.relu2_mlp(x, w1, w2, b1, b2, adapters=(left, right), recipe=recipe, min_tokens=0)

    found = []
    for run_step in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out = run_step(*leaves)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    for a, e in zip(*found, strict=True):
        assert_same_bits(a, e)
    torch._dynamo.reset()


def test_adapters_that_are_refused():
    *leaves, _ = operands(16, torch.bfloat16, "cpu")
    left, right = torch.zeros(F, 3, dtype=torch.bfloat16), torch.zeros(3, D, dtype=torch.bfloat16)
    for adapters, words in (
        (left, "adapters to be a tuple of 2 tensors, got Tensor"),
        ((left, None), "the right adapter to be a Tensor, got None"),
        ((left.float(), right), "the left adapter to be bfloat16 as w1 is, got float32"),
        ((left[1:], right), f"the left adapter to have shape [{F}, rank], got [{F - 1}, 3]"),
        ((left, right[1:]), f"the right adapter to have shape [3, {D}], got [2, {D}]"),
        ((left.to("meta"), right), "the left adapter to be on cpu as w1 is, got meta"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"sparse24.relu2_mlp: expected {words}")):
            sparse24.relu2_mlp(*leaves, adapters=adapters)
    packed = sparse24.pack24(prune24(leaves[1]))
    with pytest.raises(RuntimeError, match="w1_packed to be None with adapters, or to have them packed, got adapters"):
        sparse24.relu2_mlp(*leaves, adapters=(left, right), weights_pruned=True, w1_packed=packed)
    codes = [leaves[1].to(torch.float8_e4m3fn), leaves[2].to(torch.float8_e4m3fn)]
    scales = {"w1_scale": torch.ones(1), "w2_scale": torch.ones(1)}
    with pytest.raises(RuntimeError, match="w1 to be of 16 or 32 bits with adapters, got float8_e4m3fn"):
        sparse24.relu2_mlp(leaves[0], *codes, adapters=(left, right), **scales)


@pytest.mark.parametrize("rank", [4, 8, 9])
def test_adapters_are_columns_beside_what_is_packed(device, dtype, calls, monkeypatch, rank):
    """At most twice the error of a dense product with the sum, against float64; calls follow the adapters."""
    for module in (sparse24.mlp, sparse_weights):
        monkeypatch.setattr(module, "packed_pays", lambda packed, x: packed is not None)
    torch.manual_seed(0)
    mlp = sparse24.nn.ReLU2MLP(64, F, OUT, device=device, dtype=dtype, min_tokens=0)
    x = torch.randn(133, 64).to(device, dtype)
    mlp.prune_weights_("up").add_adapters_(rank)
    with torch.no_grad():
        for _ in range(2):
            mlp.up_left.normal_(std=0.05)
            summed = prune24(mlp.up_proj.weight).double() + mlp.up_left.double() @ mlp.up_right.double()
            rival = sparse24.relu2_mlp(x, summed.to(dtype), mlp.down_proj.weight, min_tokens=0)
            calls.clear()
            out = mlp(x)
            assert calls.count("linear_compress_packed") == 1
            assert (out.double() - rival.double()).norm() < 0.05 * rival.double().norm()
            columns = packed_weights.two_of_four(x @ mlp.up_right.t())
            unpacked = sparse24.unpack24(mlp.up_values, mlp.up_meta, F, 64 + columns.shape[1])
            exact = x.double() @ summed.t()
            h = torch.cat((x, columns), 1).double() @ unpacked.double().t()
            of_rival = x.double() @ summed.to(dtype).double().t()
            assert (h - exact).norm() <= 2 * (of_rival - exact).norm() + 1e-6 * exact.norm()
