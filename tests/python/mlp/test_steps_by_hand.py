"""Loops without an optimizer, which write through `weight.data`: nothing kept of a weight is of the step before."""

import copy
import pickle

import packed_calls
import pytest
import torch
from compare import assert_same_bits

import sparse24
from sparse24 import Recipe
from sparse24.mlp import kept_weights

# Dynamo makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def always(monkeypatch):
    packed_calls.always(monkeypatch)


KINDS = {
    "float8": (0, {"precision": "fp8", "recipe": Recipe(fp8_weight_gradients=True)}),
    "float8, 2:4": (0, {"precision": "fp8", "recipe": Recipe(fp8_weight_gradients=True, sparse_weights="both")}),
    "2:4": (0, {"recipe": Recipe(sparse_weights="both")}),
    "2:4, adapters": (4, {"recipe": Recipe(sparse_weights="up")}),
}


def network(device, kind):
    torch.manual_seed(0)
    rank, options = KINDS[kind]
    module = sparse24.nn.ReLU2MLP(64, 256, device=device, dtype=torch.bfloat16, min_tokens=0, **options)
    return module.add_adapters_(rank) if rank else module


def without_gradients(module):
    made = copy.deepcopy(module)
    made.zero_grad()
    return made


@torch.no_grad()
def step(parameters):
    for p in parameters:
        p.data -= 0.5 * p.abs().mean() * p.grad.sign()
        p.grad.zero_()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_now(device, kind, micro_batches):
    module = network(device, kind)
    g = torch.Generator().manual_seed(1)
    for _ in range(4):
        for _ in range(micro_batches):
            x = torch.randn(128, 64, generator=g).to(device, torch.bfloat16)
            out = module(x)
            assert_same_bits(out, without_gradients(module)(x))
            out.square().sum().backward()
        step(module.parameters())


def test_of_several_dimensions(device):
    """Weights of experts, whose steps keep codes on CUDA alone."""
    w = torch.nn.Parameter(torch.randn(2, 64, 64, device=device, dtype=torch.bfloat16))
    for _ in range(4):
        codes = kept_weights.codes_of(w, w)
        if codes is not None:
            assert_same_bits(codes.values, kept_weights.both_orders(w.detach()).values)
        w.square().sum().backward()
        step([w])
    assert codes is not None


def test_what_a_weight_is_packed_with(device):
    """An adapter that is trained alone, beside a weight whose gradient nobody reads."""
    w, left = (torch.nn.Parameter(torch.randn(64, n, device=device)) for n in (64, 4))
    for _ in range(4):
        form = kept_weights.kept_form(w, w.dtype, "both", lambda: torch.cat((w, left), 1).detach(), left)
        assert form is None or torch.equal(form, torch.cat((w, left), 1))
        (w.square().sum() + left.square().sum()).backward()
        step([left])
    assert form is not None


def test_a_gradient_that_is_clipped_is_of_a_step(device):
    """Nobody can tell it from the one of a step by hand."""
    module = network(device, "2:4")
    x = torch.randn(128, 64).to(device, torch.bfloat16)
    for _ in range(3):
        module(x).sum().backward()
    weight = module.up_proj.weight
    kept = next(iter(kept_weights._kept[weight].values())).form
    module(x)
    assert next(iter(kept_weights._kept[weight].values())).form is kept
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    module(x)
    assert next(iter(kept_weights._kept[weight].values())).form is not kept


def test_parameters_are_as_before_the_steps(device):
    """The hook on a gradient is gone with what is kept; copies have none."""
    module = network(device, "2:4")
    x = torch.randn(128, 64).to(device, torch.bfloat16)
    for _ in range(3):
        module(x).sum().backward()
    weight = module.up_proj.weight
    assert weight._post_accumulate_grad_hooks
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not made.up_proj.weight._post_accumulate_grad_hooks
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(x), module(x))
    torch.optim.SGD([weight], lr=1e-2).step()
    assert not weight._post_accumulate_grad_hooks
