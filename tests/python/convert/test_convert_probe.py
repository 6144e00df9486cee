"""How conversion looks at a module: what it tries, on what, and what it leaves as it was."""

import pytest
import torch
from convert_models import EXACT, HIDDEN, CountOps, D, Inline, SquaredReLU, WithModule, randomize, relu2
from data import normal
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import sparse24
from sparse24 import ConvertConfig
from sparse24.nn import QuantizedLinear


def convert(module, config=None):
    """Why it is skipped; None if it is converted."""
    return sparse24.convert(module, config, quiet=True).skipped.get("")


@pytest.mark.parametrize("name", ["sparse", "sparse24_enabled"])
def test_attributes_of_the_module_are_not_hidden(device, name):
    module = Inline().to(device)
    setattr(module, name, "mine")
    assert convert(module) == f"it has an attribute {name} of its own"
    assert getattr(module, name) == "mine"


def test_dropout_that_drops_nothing_is_no_reason(device):
    module = WithModule(nn.Sequential(SquaredReLU(), nn.Dropout(0.0))).to(device)
    assert convert(module) is None


def test_fp8_needs_outputs_that_are_multiples_of_16(device):
    module = Inline()
    module.c_proj = nn.Linear(HIDDEN, 72, bias=False)
    reason = "fp8 needs multiples of 16 features, it has 64 and 72"
    assert convert(module.to(device), ConvertConfig("fp8")) == reason
    assert convert(module) is None


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
    + ["register_full_backward_pre_hook"],
)
def test_hooks_of_every_kind_are_noticed(device, register):
    """Before conversion and after it."""
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    module = Inline().to(device, torch.bfloat16)
    handle = getattr(module.c_fc, register)(lambda *args: None)
    assert convert(module) == "c_fc has hooks"
    handle.remove()
    assert convert(module, EXACT) is None
    getattr(module.c_fc, register)(lambda *args: None)
    with CountOps() as ops, pytest.warns(UserWarning, match="Inline runs as before conversion: c_fc has hooks"):
        module(x)
    assert ops.sparse == 0


def test_inputs_that_wrap_tensors_run_as_before(device):
    module = randomize(Inline()).to(device, torch.bfloat16)
    assert convert(module, EXACT) is None
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    with CountOps() as ops, pytest.warns(UserWarning, match="the input is a TwoTensor"):
        out = module(TwoTensor(x, x))
    assert ops.sparse == 0 and isinstance(out, TwoTensor)


@pytest.mark.parametrize("factor", [1.5, 0.5])
def test_float8_networks_are_judged_too(device, factor):
    """By the precision of float8: what is off by half of the result is another network."""

    class Scaled(nn.Module):
        def forward(self, h):
            return factor * relu2(h)

    for act in (SquaredReLU(), Scaled()):
        module = randomize(WithModule(act)).to(device, torch.bfloat16)
        for name in ("up_proj", "down_proj"):
            setattr(module, name, QuantizedLinear(getattr(module, name)))
        assert (convert(module) is None) == isinstance(act, SquaredReLU)


def test_small_replicas_are_tried(device):
    """Conversion of a large model takes no time: the replica has sizes of its own."""
    shapes = set()

    class Watched(nn.Linear):
        def forward(self, x):
            shapes.add(tuple(self.weight.shape))
            return super().forward(x)

    assert convert(Inline(linear=Watched, d=512, hidden=2048).to(device)) is None
    assert shapes and max(rows * columns for rows, columns in shapes) <= 64 * 128


def test_a_module_may_overwrite_its_input(device):
    """It is judged by what it returns; of each try it gets a copy."""

    class Overwriting(Inline):
        def forward(self, x):
            out = super().forward(x)
            x.zero_()
            return out

    assert convert(Overwriting().to(device)) is None


def test_autocast_around_conversion_does_not_matter(device):
    """A module is tried in the dtypes that the trial names."""

    class Watched(Inline):
        def forward(self, x):
            assert not torch.is_autocast_enabled(x.device.type)
            return super().forward(x)

    with torch.autocast(device, torch.bfloat16):
        assert convert(Watched().to(device)) is None


def test_autocast_decides_about_the_dtype(device):
    """The input's own dtype says nothing where autocast replaces it."""
    module = randomize(Inline()).to(device)
    assert convert(module, EXACT) is None
    x = normal(21, D, dtype=torch.float32).to(device)
    with torch.autocast(device, torch.bfloat16), CountOps() as ops:
        out = module(x)
    assert ops.sparse == 1 and out.dtype == torch.bfloat16
