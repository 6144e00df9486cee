"""relu2_mlp with the scale of the activation predicted from x, forward and backward."""

import pytest
import torch
from compare import assert_same_bits
from data import normal

import sparse24

D, HIDDEN, OUT, TOKENS = 64, 160, 48, 65


@pytest.fixture
def operands(device):
    x = normal(TOKENS, D, dtype=torch.bfloat16, seed=0).to(device)
    w1, w2 = (normal(*shape, dtype=torch.float32, seed=s) for s, shape in ((1, (HIDDEN, D)), (2, (OUT, HIDDEN))))
    return x, w1.div(D**0.5).to(device, torch.bfloat16), w2.div(HIDDEN**0.5).to(device, torch.bfloat16)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("min_tokens", [0, TOKENS + 1], ids=["sparse", "dense"])
def test_equals_the_given_scale(operands, device, fused, min_tokens):
    factor = torch.tensor([0.004], device=device)
    options = {"precision": "fp8", "fused": fused, "min_tokens": min_tokens}
    predicted = sparse24.quantize_fp8_predict(operands[0], factor)[2]
    got = sparse24.relu2_mlp(*operands, scale_y_factor=factor, **options)
    assert_same_bits(got, sparse24.relu2_mlp(*operands, scale_y=predicted, **options))
    assert not torch.equal(got, sparse24.relu2_mlp(*operands, **options))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_those_of_the_given_scale(operands, device, recompute):
    factor = torch.tensor([0.004], device=device)
    gradients = []
    for scale in ({"scale_y_factor": factor}, {"scale_y": sparse24.quantize_fp8_predict(operands[0], factor)[2]}):
        leaves = [t.clone().requires_grad_() for t in operands]
        out = sparse24.relu2_mlp(*leaves, precision="fp8", fused=True, min_tokens=0, recompute=recompute, **scale)
        gradients.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for got, expected in zip(*gradients, strict=True):
        assert_same_bits(got, expected)


REFUSALS = {
    "16 bits": ({"precision": "16bit"}, "to be None in 16-bit precision, got a tensor"),
    "both": ({"scale_y": torch.ones(1)}, "to be None where scale_y is given, got a tensor"),
    "dtype": ({"scale_y_factor": torch.ones(1).double()}, "to be float32, got float64"),
    "size": ({"scale_y_factor": torch.ones(2)}, "to have 1 element, got 2"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(operands, device, name):
    options, sentence = REFUSALS[name]
    options = {"precision": "fp8", "scale_y_factor": torch.ones(1)} | options
    options = {key: value.to(device) if torch.is_tensor(value) else value for key, value in options.items()}
    with pytest.raises(RuntimeError, match=f"^sparse24.relu2_mlp: expected scale_y_factor {sentence}$"):
        sparse24.relu2_mlp(*operands, **options)
