"""Whatever is given in place of an argument of the network, as a function or a module: one sentence of sparse24."""

import inspect

import numpy as np
import pytest
import torch

import sparse24

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")


def wrong_kinds():
    strided = [torch.ones(2), torch.ones(3)]
    return {
        "a number": 3,
        "a fraction": -2.5,
        "a word": "a",
        "a list": [1],
        "a mapping": {"a": 1},
        "an array": np.ones((2, 2)),
        "an object": object(),
        "a dtype": torch.float32,
        "a function": wrong_kinds,
        "nested": torch.nested.nested_tensor(strided),
        "sparse": torch.ones(4).to_sparse(),
        "integers": torch.ones(3, 3, dtype=torch.int8),
        "complex": torch.ones(8, 16, dtype=torch.complex64),
        "elsewhere": torch.ones(8, 16, device="meta"),
        "no elements": torch.ones(0),
    }


def is_refused(call, *args, **options):
    """Whether a call is refused in our words; some values are fine for some arguments."""
    try:
        call(*args, **options)
    except RuntimeError as error:
        assert str(error).startswith("sparse24."), error
        return True
    return False


def operands(function):
    x = torch.randn(8, 16)
    if function is sparse24.relu2_mlp:
        return {"x": x, "w1": torch.randn(32, 16), "w2": torch.randn(16, 32)}
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    return {"x": x, "w1": torch.randn(2, 32, 16), "w2": torch.randn(2, 16, 32), "offsets": offsets}


@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("function", [sparse24.relu2_mlp, sparse24.relu2_experts], ids=lambda f: f.__name__)
def test_functions(function, learns):
    for name in inspect.signature(function).parameters:
        given = operands(function)
        given["w2"].requires_grad_(learns)
        refused = [is_refused(function, **given | {name: value}) for value in wrong_kinds().values()]
        assert sum(refused) >= len(refused) - 3, name  # 3 is a number of tokens, and numbers may be flags


MODULES = {
    "plain": lambda: sparse24.nn.ReLU2MLP(16, 32),
    "decode": lambda: sparse24.nn.ReLU2MLP(16, 32).prepare_decode_(),
    "quantised": lambda: sparse24.nn.ReLU2MLP(16, 32).quantize_(),
    "fp8": lambda: sparse24.nn.ReLU2MLP(16, 32, precision="fp8"),
}


@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", MODULES)
def test_modules(kind, learns):
    module, x = MODULES[kind](), torch.randn(8, 16)
    with torch.set_grad_enabled(learns):
        for name, value in wrong_kinds().items():
            assert is_refused(module, value), name
            assert is_refused(module, x, value), name
