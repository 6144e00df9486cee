"""What is done after a step of an optimizer: once, in order, and without holding on to anything."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

import sparse24
from sparse24 import _optimizer_steps, float8_gather
from sparse24._optimizer_steps import after_each_step
from sparse24.mlp import kept_weights
from sparse24.nn import delayed_scales, weight_copies


@pytest.fixture(autouse=True)
def nobody_has_asked(monkeypatch):
    """As in a new process; what asks in a test is forgotten after it."""
    before = set(torch_optimizer._global_optimizer_post_hooks)
    monkeypatch.setattr(_optimizer_steps, "_handles", {})
    yield
    for key in set(torch_optimizer._global_optimizer_post_hooks) - before:
        del torch_optimizer._global_optimizer_post_hooks[key]


def hooks():
    return len(torch_optimizer._global_optimizer_post_hooks)


def sgd(*parameters):
    return torch.optim.SGD(parameters or [torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def fp8_module(device="cpu"):
    recipe = sparse24.Recipe(fp8_weight_gradients=True)
    return sparse24.nn.ReLU2MLP(64, 128, precision="fp8", recipe=recipe, device=device, dtype=torch.bfloat16)


def train(module, device):
    x = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    optimizer = sgd(*module.parameters())
    for _ in range(2):
        module(x).sum().backward()
    optimizer.step()
    return optimizer


def test_once_however_often_it_is_asked_and_in_that_order():
    calls, before = [], hooks()

    def first(optimizer):
        calls.append(("first", optimizer))

    def second(optimizer):
        calls.append(("second", optimizer))

    for function in (second, first, second, first):
        after_each_step(function)
    assert hooks() == before + 2
    optimizers = sgd(), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    for optimizer in optimizers:
        optimizer.step()
    assert calls == [(name, optimizer) for optimizer in optimizers for name in ("second", "first")]


def test_one_hook_for_each_that_needs_it(device):
    """However many modules there are; those of a process that trains nothing in float8 ask for none."""
    before = hooks()
    sparse24.nn.ReLU2MLP(64, 128, device=device)
    assert hooks() == before
    modules = [fp8_module(device) for _ in range(3)]
    assert list(_optimizer_steps._handles) == [delayed_scales._look]
    for module in modules:
        train(module, device)
        module.prepare_decode_()
    asked = [delayed_scales._look, kept_weights._drop_all, weight_copies._after_step]
    assert list(_optimizer_steps._handles) == asked
    assert hooks() == before + 3


def test_a_step_is_told_to_all_who_asked(device):
    """The codes of weights are dropped, copies are not fresh, and scales are found."""
    module = fp8_module(device).prepare_decode_()
    kept_weights._kept.clear()
    x = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        module(x).sum().backward()
    assert len(kept_weights._kept) == 2
    module.scales_known = False
    parts = float8_gather.Parts([], once=False)
    parts.states = ["a state"]
    sgd(*module.parameters()).step()
    assert not kept_weights._kept
    assert not module._copies.fresh
    assert module.scales_known
    assert not parts.states


def test_nothing_is_held(device):
    """Neither modules, weights nor parts outlive those who have them."""
    module = fp8_module(device).prepare_decode_()
    optimizer = train(module, device)
    parts = float8_gather.Parts([], once=False)
    of_module = [weakref.ref(t) for t in (module, module._copies, module.up_proj)]
    del module, optimizer
    gc.collect()
    assert [ref() for ref in of_module] == [None] * 3
    of_parts = weakref.ref(parts)
    del parts
    gc.collect()
    assert of_parts() is None
    sgd().step()


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("converts", [False, True], ids=["module", "converted"])
def test_copies_are_told_too(copied, converts, device):
    """As in a new process, where nobody else has asked; a copy whose scales are known looks for nothing."""
    module = fp8_module(device)
    if converts:
        module = torch.nn.Sequential(module.up_proj, Squares(), module.down_proj)
        config = sparse24.ConvertConfig("fp8", sparse24.Recipe(fp8_weight_gradients=True), 0)
        assert sparse24.convert(module, config, quiet=True).converted
    _optimizer_steps._handles.clear()
    delayed_scales._unknown.clear()
    other = copied(module)
    assert list(_optimizer_steps._handles) == [delayed_scales._look]
    other.calls_with_unknown_scales = 5  # so that calls do not look for themselves
    x = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    other(x).sum().backward()
    assert not other.scales_known
    sgd(*other.parameters()).step()
    assert other.scales_known
    assert not module.scales_known
    delayed_scales._unknown.clear()
    copied(other)
    assert not delayed_scales._unknown


class Squares(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x) ** 2
