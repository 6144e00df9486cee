"""ReLU2MLP: relu2_mlp with the parameters of two layers, which it may hold in fp8."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from data import normal
from oracle import FP8
from small_network import HIDDEN, OUT, D, tokens

import sparse24


def module(device, dtype=torch.bfloat16, **kw):
    torch.manual_seed(0)
    return sparse24.nn.ReLU2MLP(D, HIDDEN, **kw, device=device, dtype=dtype, min_tokens=0)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_module_is_the_function(device, dtype, bias):
    m = module(device, dtype, bias=bias, dim_out=OUT)
    x = tokens(33, dtype, device)
    up, down = m.up_proj, m.down_proj
    assert (up.bias is not None) == bias
    expected = sparse24.relu2_mlp(x, up.weight, down.weight, up.bias, down.bias, min_tokens=0)
    assert_same_bits(m(x), expected)


def test_names_of_the_state(device):
    assert list(module(device).state_dict()) == ["up_proj.weight", "down_proj.weight"]
    names = ["up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"]
    with_bias = module(device, bias=True)
    assert list(with_bias.state_dict()) == names
    assert [name for name, _ in with_bias.named_parameters()] == names
    assert {n: tuple(p.shape) for n, p in with_bias.named_parameters()} == {
        "up_proj.weight": (HIDDEN, D),
        "up_proj.bias": (HIDDEN,),
        "down_proj.weight": (D, HIDDEN),
        "down_proj.bias": (D,),
    }


def test_module_trains(device):
    """A step of gradient descent lowers the loss."""
    m = module(device)
    x, target = tokens(64, torch.bfloat16, device), normal(64, D, dtype=torch.bfloat16, seed=5).to(device)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = F.mse_loss(m(x).float(), target.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_quantised_module(device):
    m = module(device, bias=True, dim_out=OUT)
    x = tokens(65, torch.bfloat16, device)
    w1, w2, b1, b2 = m.up_proj.weight, m.down_proj.weight, m.up_proj.bias, m.down_proj.bias
    expected = sparse24.relu2_mlp(x, w1, w2, b1, b2, precision="fp8", min_tokens=0)
    scale_y = torch.full((1,), 0.03, device=device)
    expected_given = sparse24.relu2_mlp(x, w1, w2, b1, b2, precision="fp8", scale_y=scale_y, min_tokens=0)
    assert m.quantize_() is m
    assert m.up_proj.weight.dtype == m.down_proj.weight.dtype == FP8
    assert_same_bits(m(x), expected)
    assert_same_bits(m(x, scale_y), expected_given)
    state = m.state_dict()
    assert state["up_proj.weight"].dtype == FP8 and state["up_proj.weight_scale"].dtype == torch.float32
    # Twice is once; casts leave quantised weights alone; copies and files keep them.
    assert_same_bits(m.quantize_()(x), expected)
    assert_same_bits(copy.deepcopy(m).to(torch.bfloat16)(x), expected)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = module(device, bias=True, dim_out=OUT).quantize_()
    with torch.no_grad():
        other.up_proj.bias.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits(other(x), expected)
    assert_same_bits(pickle.loads(pickle.dumps(m))(x), expected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dim": 32.5}, "dim to be a whole number, got 32.5"),
        ({"hidden": "64"}, "hidden to be a whole number, got 64"),
        ({"hidden": -64}, "hidden to be at least 0, got -64"),
        ({"dim_out": -3}, "dim_out to be at least 0, got -3"),
        ({"bias": "no"}, "bias to be True or False, got no"),
        ({"dtype": torch.int8}, "dtype to be float32, bfloat16 or float16, got int8"),
        ({"dtype": torch.float8_e4m3fn}, "dtype to be float32, bfloat16 or float16, got float8_e4m3fn"),
        ({"dtype": "bf16"}, "dtype to be float32, bfloat16 or float16, got 'bf16'"),
    ],
)
def test_refused_sizes_and_dtypes(options, sentence):
    with pytest.raises(RuntimeError, match=rf"^sparse24\.nn\.ReLU2MLP: expected {sentence}$"):
        sparse24.nn.ReLU2MLP(**{"dim": 32, "hidden": 64, **options})


MAKE = {
    "ReLU2MLP": lambda: sparse24.nn.ReLU2MLP(32, 64),
    "ReLU2Experts": lambda: sparse24.nn.ReLU2Experts(2, 32, 64),
}
WRONG = [
    ("recipe", 3, "recipe to be a sparse24.Recipe, got int"),
    ("recipe", "up", "recipe to be a sparse24.Recipe, got str"),
    ("precision", "bf16", 'precision to be "auto", "16bit" or "fp8", got "bf16"'),
    ("precision", ["fp8"], r'precision to be "auto", "16bit" or "fp8", got "\[\'fp8\'\]"'),
    ("sparse", "no", "sparse to be True or False, got no"),
    ("min_tokens", "a", "min_tokens to be a whole number, got a"),
    ("min_tokens", -1, "min_tokens to be at least 0, got -1"),
    ("recompute", None, "recompute to be True or False, got None"),
    ("scales_known", 2, "scales_known to be True or False, got 2"),
    ("threshold", -1, "threshold to be finite and at least 0, got -1"),
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "sentence"),
    [(kind, *row) for kind, make in MAKE.items() for row in WRONG if hasattr(make(), row[0])],
)
def test_options_are_checked_when_they_are_set(kind, name, value, sentence):
    m = MAKE[kind]()
    before = getattr(m, name)
    with pytest.raises(RuntimeError, match=rf"^sparse24\.nn\.{kind}: expected {sentence}$"):
        setattr(m, name, value)
    assert getattr(m, name) == before


@pytest.mark.parametrize("kind", MAKE)
def test_options_that_are_set_are_values_of_python(kind):
    m = MAKE[kind]()
    m.sparse = np.bool_(False)
    assert m.sparse is False
    m.recipe, m.precision = sparse24.Recipe(residual=True), "16bit"
    assert m.recipe.residual and m.precision == "16bit"
    if kind == "ReLU2MLP":
        m.min_tokens, m.recompute = np.int64(7), 1
        assert type(m.min_tokens) is int and m.min_tokens == 7 and m.recompute is True
        m.min_tokens = None
        assert m.min_tokens is None


def test_options_are_set_while_compiling():
    @torch.compile(fullgraph=True, backend="eager")
    def step(m, x):
        m.sparse = False
        return m(x)

    m, x = sparse24.nn.ReLU2MLP(32, 64), torch.randn(8, 32)
    dense = step(m, x)
    assert m.sparse is False
    assert_same_bits(dense, m(x))
