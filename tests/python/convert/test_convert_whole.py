"""A conversion is whole or not at all: for classes of every layout, and whatever fails on the way."""

import abc
import copy
import types
import typing
import warnings

import pytest
import torch
from compare import assert_same_bits
from convert_models import EXACT, CountOps, D, Inline, Stack, WithModule, randomize
from data import normal
from torch import nn

import sparse24


class Slots:
    __slots__ = ()


class Mixin:
    pass


class Meta(type):
    pass


class WithMeta(metaclass=Meta):
    pass


T = typing.TypeVar("T")
LAYOUTS = {
    "ABC, Module": (abc.ABC, nn.Module),
    "Module, ABC": (nn.Module, abc.ABC),
    "Generic, Module": (typing.Generic[T], nn.Module),
    "Module, Generic": (nn.Module, typing.Generic[T]),
    "Slots, Module": (Slots, nn.Module),
    "Mixin, Module": (Mixin, nn.Module),
    "Meta, Module": (WithMeta, nn.Module),
    "network": (Inline,),
    "Slots, network": (Slots, Inline),
}


def make(bases):
    def init(self):
        nn.Module.__init__(self)
        self.c_fc, self.c_proj = nn.Linear(D, 160, bias=False), nn.Linear(160, D, bias=False)

    def forward(self, x):
        return self.c_proj(torch.relu(self.c_fc(x)).square())

    return types.new_class("Network", bases, {}, lambda namespace: namespace.update(__init__=init, forward=forward))


@pytest.mark.parametrize("name", LAYOUTS)
def test_class_layouts(device, name):
    """Converted, copied and reverted as others are; `isinstance` holds."""
    kind = make(LAYOUTS[name])
    module = randomize(kind()).to(device, torch.bfloat16)
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    dense = module(x)
    assert sparse24.convert(module, EXACT, quiet=True).converted == [""]
    assert isinstance(module, kind)
    with CountOps() as ops:
        assert_same_bits(copy.deepcopy(module)(x), module(x))
    assert ops.sparse == 2
    assert sparse24.revert(module) == [""] and type(module) is kind
    assert_same_bits(module(x), dense)


class Registered(Inline):
    """Its subclasses need a name."""

    def __init_subclass__(cls, *, tag, **options):
        super().__init_subclass__(**options)


class Final(Inline):
    def __init_subclass__(cls, **options):
        raise RuntimeError("final")


def state_of(model):
    return [(type(m), dict(m.__dict__)) for m in model.modules()]


@pytest.mark.parametrize("kind", [Registered, Final])
def test_classes_without_subclasses(kind):
    model = Stack(Inline(), kind(), WithModule())
    report = sparse24.convert(model, quiet=True)
    assert report.converted == ["layers.0", "layers.2"]
    assert list(report.skipped) == ["layers.1"]
    assert report.skipped["layers.1"].startswith("its class cannot be extended: ")
    assert type(model.layers[1]) is kind and "_sparse24" not in model.layers[1].__dict__


def test_a_filter_that_fails():
    model = Stack(Inline(), Inline(), WithModule())
    before = state_of(model)

    def keep(module, name):
        if name == "layers.1":
            raise ZeroDivisionError
        return True

    with pytest.raises(ZeroDivisionError):
        sparse24.convert(model, module_filter_fn=keep, quiet=True)
    assert state_of(model) == before


def test_an_interrupted_conversion():
    """At the second network, whose class is being made."""

    class Interrupted(Inline):
        def __init_subclass__(cls, **options):
            raise KeyboardInterrupt

    model = Stack(Inline(), Interrupted(), WithModule())
    sparse24.convert(model, sparse24.ConvertConfig(decisions={"layers.0": False, "layers.1": False}), quiet=True)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        sparse24.convert(model, quiet=True)
    assert state_of(model) == before


def test_a_forward_that_outlives_its_conversion(device):
    """What holds the method of a converted module runs the module as it is."""
    module = randomize(Inline()).to(device, torch.bfloat16)
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    dense = module(x)
    sparse24.convert(module, EXACT, quiet=True)
    held = module.forward
    module.forward = held
    with CountOps() as ops:
        module(x)
    assert ops.sparse == 1
    sparse24.revert(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in (held, module):
            assert_same_bits(call(x), dense)


def test_the_older_name_of_the_module_with_the_state_of_blocks():
    from sparse24 import _convert_forward
    from sparse24.convert import forward

    assert _convert_forward is forward
    with sparse24.disabled():
        assert not _convert_forward._enabled
    assert _convert_forward._enabled
