"""SLoPe's scheme: both weights pruned along their input features, and again along the output ones going backward."""

import pytest
import torch
import training_reference as reference
from compare import assert_same_bits
from training_reference import NAMES, exact_operands, operands, run

import sparse24
from sparse24 import Recipe, prune24

SLOPE = Recipe(sparse_weights="both", double_pruning=True)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "few tokens"])
def test_as_slope(device, dtype, sparse):
    """The forward pass and the weight gradients of its activation; dx and dh by the doubly pruned weights."""
    x, w1, w2, b1, b2, grad = exact_operands(133, dtype, device)
    first, second = prune24(w1, -1), prune24(w2, -1)
    back1, back2 = (prune24(w, 0).double() for w in (first, second))
    assert not torch.equal(back2, second.double()) and not torch.equal(back1, first.double())
    expected = reference.step(x, first, second, b1, b2, grad, SLOPE)
    leaves = [t.detach().clone().requires_grad_() for t in (x, w1, w2, b1, b2)]
    out = sparse24.relu2_mlp(*leaves, recipe=SLOPE, min_tokens=0 if sparse else 134)
    out.backward(grad)
    if sparse:
        assert_same_bits(out.detach() + 0.0, expected.out.to(dtype) + 0.0)
        assert_same_bits(leaves[2].grad + 0.0, expected.grads[2].float().to(dtype) + 0.0)
        y = expected.y
    else:
        y = (x.double() @ first.double().t() + b1.double()).clamp(min=0).square()
    dh = (grad.double() @ back2 * 2 * y.sqrt()).to(dtype).double()
    assert_same_bits(leaves[0].grad + 0.0, (dh @ back1).float().to(dtype) + 0.0)


def test_differs_from_one_orientation(device):
    *leaves, grad = operands(133, torch.bfloat16, device)
    both = run(leaves, grad, recipe=Recipe(sparse_weights="both"))
    for name, a, b in zip(("out", *NAMES), run(leaves, grad, recipe=SLOPE), both, strict=True):
        assert name in ("w2", "b2") or not torch.equal(a, b), name  # those depend on no w2


def test_refusals(checked_device):
    with pytest.raises(RuntimeError, match='expected sparse_weights to be "both" for double_pruning, got "up"'):
        Recipe(sparse_weights="up", double_pruning=True)
    x = torch.zeros(32, 32, device=checked_device, dtype=torch.bfloat16)
    for options, what in (
        ({"precision": "fp8", "recipe": SLOPE}, "fp8"),
        ({"recompute": True, "recipe": SLOPE}, "recompute"),
        ({"recipe": Recipe(sparse_weights="both", double_pruning=True, reuse_mask=False)}, "reuse_mask=False"),
    ):
        with pytest.raises(RuntimeError, match=f"with double_pruning, got {what}$"):
            sparse24.relu2_mlp(x, x, x, **options)
