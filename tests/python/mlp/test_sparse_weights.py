"""The network with 2:4 weights: all products see the pruned ones, and the gradients are those of that network."""

import copy

import pytest
import torch
import training_reference as reference
from compare import assert_same_bits
from small_network import tokens, weights
from training_reference import NAMES, exact_operands, operands, run

import sparse24
from sparse24 import Recipe, prune24

CHOICES = ("up", "both")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def pruned(leaves, choice):
    """The leaves of the network that is computed."""
    x, w1, w2, *biases = leaves
    return [x, prune24(w1, -1), prune24(w2, 0) if choice == "both" else w2, *biases]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"recompute": True}], ids=["fused", "unfused", "recompute"])
@pytest.mark.parametrize("further", [{}, {"residual": True}, {"weight_gradients": "dense"}], ids=str)
def test_exactly(device, dtype, choice, options, further):
    """Weights as they are pruned, and their gradients at all entries."""
    *leaves, grad = exact_operands(133, dtype, device)
    recipe = Recipe(sparse_weights=choice, **further)
    expected = reference.step(*pruned(leaves, choice), grad, recipe)
    assert not torch.equal(expected.out, reference.step(*leaves, grad, recipe).out)
    out, *grads = run(leaves, grad, recipe=recipe, **options)
    assert_same_bits(out + 0.0, expected.out.to(dtype) + 0.0)
    for name, actual, exact in zip(NAMES, grads, expected.grads, strict=True):
        assert_same_bits(actual + 0.0, exact.float().to(dtype) + 0.0, name)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_as_with_pruned_weights(device, choice, precision):
    """Bit for bit; also in float8, whose step has scales of its own."""
    *leaves, grad = operands(96, torch.bfloat16, device)
    recipe = Recipe(sparse_weights=choice, fp8_weight_gradients=True)
    plain = Recipe(fp8_weight_gradients=True)
    actual = run(leaves, grad, recipe=recipe, precision=precision)
    expected = run(pruned(leaves, choice), grad, recipe=plain, precision=precision)
    for name, a, e in zip(("out", *NAMES), actual, expected, strict=True):
        assert_same_bits(a, e, name)


@pytest.mark.parametrize("choice", CHOICES)
def test_dense_phase_prunes_no_weight(device, choice):
    *leaves, grad = operands(64, torch.bfloat16, device)
    actual = run(leaves, grad, recipe=Recipe(sparse_weights=choice), sparse=False)
    for name, a, e in zip(("out", *NAMES), actual, run(leaves, grad, sparse=False), strict=True):
        assert_same_bits(a, e, name)


@pytest.mark.parametrize("choice", CHOICES)
def test_few_tokens_keep_pruned_weights(device, dtype, choice):
    """They run dense, and the network is one."""
    *leaves, grad = operands(40, dtype, device)
    x, *parameters = leaves
    out = sparse24.relu2_mlp(x, *parameters, recipe=Recipe(sparse_weights=choice), min_tokens=41)
    x, *parameters = pruned(leaves, choice)
    assert_same_bits(out, sparse24.relu2_mlp(x, *parameters, min_tokens=41))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("float8", [False, True], ids=["16bit", "fp8"])
def test_w2_rows(device, choice, float8):
    """Few tokens by neuron: rows are pruned as w2 is, float8 ones by what they are worth."""
    w1, w2, *_ = weights(torch.bfloat16, device)
    x = tokens(5, torch.bfloat16, device)
    recipe, scales = Recipe(sparse_weights=choice), {}
    dense1, dense2 = prune24(w1), prune24(w2, 0) if choice == "both" else w2
    if float8:
        (w1, s1), (w2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
        scales = {"w1_scale": s1, "w2_scale": s2}
        worth = w2.float() * s2.reshape(-1, 1)
        dense1 = prune24(w1)
        dense2 = torch.where(prune24(worth, 0) != 0, w2.float(), 0).to(w2.dtype) if choice == "both" else w2
        assert choice == "up" or not torch.equal(dense2.float(), prune24(w2, 0).float())
    rows = {"w2_rows": w2.t().contiguous()}
    expected_rows = {"w2_rows": dense2.t().contiguous()}
    for count in (5, 3):
        out = sparse24.relu2_mlp(x[:count], w1, w2, recipe=recipe, **scales, **rows)
        assert_same_bits(out, sparse24.relu2_mlp(x[:count], dense1, dense2, **scales, **expected_rows))
    out = sparse24.relu2_mlp(x, w1, w2, recipe=recipe, min_tokens=0, **scales)
    assert_same_bits(out, sparse24.relu2_mlp(x, dense1, dense2, min_tokens=0, **scales))


def test_float32_masters(device):
    """They are pruned before they are rounded, and get float32 gradients."""
    *leaves, grad = operands(64, torch.float32, "cpu")
    leaves = [t.to(device) for t in leaves]
    leaves[1][:, 1] = leaves[1][:, 0] * (1 + 2**-12)  # equal in 16 bits
    x, *masters = leaves
    grad = grad.to(device, torch.bfloat16)

    def step(masters, recipe):
        masters = [t.detach().clone().requires_grad_() for t in masters]
        out = sparse24.relu2_mlp(x.bfloat16(), *masters, recipe=recipe, min_tokens=0)
        out.backward(grad)
        return out.detach(), *(t.grad for t in masters)

    _, *dense = pruned([x, *masters], "both")
    for a, e in zip(step(masters, Recipe(sparse_weights="both")), step(dense, None), strict=True):
        assert_same_bits(a, e)


def test_autocast_and_torch_func(device):
    *leaves, grad = operands(64, torch.float32, "cpu")
    leaves, grad = [t.to(device) for t in leaves], grad.to(device, torch.bfloat16)
    recipe = Recipe(sparse_weights="both")
    with torch.autocast(device, torch.bfloat16):
        a = run(leaves, grad, recipe=recipe)
        e = run(pruned(leaves, "both"), grad)
    for one, other in zip(a, e, strict=True):
        assert_same_bits(one, other)
    x, w1, w2, b1, b2 = (t.bfloat16() for t in leaves)

    def loss(w1, w2):
        return (sparse24.relu2_mlp(x, w1, w2, b1, b2, recipe=recipe, min_tokens=0) * grad).float().sum()

    expected = run((x, w1, w2, b1, b2), grad, recipe=recipe)
    for a, e in zip(torch.func.grad(loss, argnums=(0, 1))(w1, w2), expected[2:4], strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("choice", CHOICES)
def test_compiled(choice):
    torch._dynamo.reset()
    *leaves, grad = operands(64, torch.bfloat16, "cpu")
    recipe = Recipe(sparse_weights=choice)
    compiled = torch.compile(sparse24.relu2_mlp, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in leaves]
    out = compiled(*leaves, recipe=recipe, min_tokens=0)
    expected = run(leaves, grad, recipe=recipe)
    for a, e in zip((out.detach(), *torch.autograd.grad(out, leaves, grad)), expected, strict=True):
        assert_same_bits(a, e)
    torch._dynamo.reset()


def test_refusals(checked_device):
    x, w1, w2 = (torch.zeros(8, n, device=checked_device, dtype=torch.bfloat16) for n in (6, 6, 8))
    with pytest.raises(RuntimeError, match='Recipe: expected sparse_weights to be "none", "up" or "both", got "down"'):
        Recipe(sparse_weights="down")
    recipe = Recipe(sparse_weights="up")
    for sparse in (False, True):
        with pytest.raises(RuntimeError, match="w1 to have a multiple of 4 columns for 2:4 weights, got 6"):
            sparse24.relu2_mlp(x, w1, w2, recipe=recipe, sparse=sparse)
    w1, w2 = torch.zeros_like(w1).new_zeros(8, 8), w2.new_zeros(6, 8)
    x = w1.new_zeros(3, 8)
    assert sparse24.relu2_mlp(x, w1, w2, recipe=recipe).shape == (3, 6)
    with pytest.raises(RuntimeError, match="w2 to have a multiple of 4 rows for 2:4 weights, got 6"):
        sparse24.relu2_mlp(x, w1, w2, recipe=Recipe(sparse_weights="both"))


def test_modules_and_schedules():
    """The recipe of a module; the switch of a schedule prunes and does not."""
    recipe = Recipe(sparse_weights="both")
    mlp = sparse24.nn.ReLU2MLP(64, 160, 48, dtype=torch.bfloat16, recipe=recipe)
    x = tokens(64, torch.bfloat16, "cpu")
    weights = mlp.up_proj.weight, mlp.down_proj.weight
    schedule = sparse24.Schedule(30, dense_warmup_steps=10, dense_final_steps=10)
    outs = {step: (schedule.apply(mlp, step), copy.copy(mlp(x)))[1] for step in (0, 15, 29)}
    assert_same_bits(outs[0], sparse24.relu2_mlp(x, *weights, sparse=False))
    assert_same_bits(outs[15], sparse24.relu2_mlp(x, prune24(weights[0]), prune24(weights[1], 0)))
    assert_same_bits(outs[29], outs[0])
