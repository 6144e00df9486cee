"""Training of 2:4 weights of experts: a dense end starts with the network of the last sparse step; decay, flips."""

import pytest
import torch
from compare import assert_same_bits
from convert_models import D
from mixture_models import EXPERTS, HIDDEN, Experts
from torch import nn

import sparse24
from sparse24 import ConvertConfig, Recipe, WeightPruning, prune24

BOTH = Recipe(sparse_weights="both")


@pytest.fixture(params=["module", "converted"])
def experts(request):
    torch.manual_seed(0)
    if request.param == "module":
        return sparse24.nn.ReLU2Experts(EXPERTS, D, HIDDEN, recipe=BOTH)
    module = Experts()
    assert sparse24.convert(module, ConvertConfig(recipe=BOTH), quiet=True).converted == [""]
    return module


def test_settled_in_a_dense_end(experts):
    schedule = sparse24.Schedule(3, dense_warmup_steps=1, dense_final_steps=1)
    pruning = WeightPruning(experts)
    before = [w.detach().clone() for w in experts.parameters()]
    for step in range(3):
        for w, old in zip(experts.parameters(), before, strict=True):
            assert_same_bits(w, old)
        schedule.apply(experts, step)
        pruning.step()
    for w, old, dim in zip(experts.parameters(), before, (-1, 1), strict=True):
        assert_same_bits(w, prune24(old, dim))


@pytest.mark.parametrize("of", ["gradients", "weights"])
def test_decay_and_flips(experts, of):
    pruning = WeightPruning(experts, decay=0.25, decay_of=of)
    pruning.step()
    assert pruning.flip_rate() == 0
    w = experts.up_proj
    before, rest = w.detach().clone(), (w - prune24(w)).detach()
    w.grad = torch.zeros_like(w)
    pruning.decay_()
    assert_same_bits(w.grad if of == "gradients" else w, 0.25 * rest if of == "gradients" else before - 0.25 * rest)
    with torch.no_grad():
        w[0, 0, :4] = torch.tensor([3.0, 2.0, 1.0, 0.0])
        pruning.flip_rate()
        w[0, 0, :4] = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert pruning.flip_rate() == pytest.approx(2 / sum(w.numel() for w in experts.parameters()))


@pytest.mark.parametrize("options", [{"soft": True}, {"refresh_steps": 4}], ids=str)
def test_masks_and_thresholds_are_for_networks(experts, options):
    """Refused for experts alone, which would do without them; beside networks these have them."""
    with pytest.raises(RuntimeError, match=r"sparse24\.WeightPruning: expected neither soft nor refresh_steps for exp"):
        WeightPruning(experts, **options)
    model = nn.ModuleList([experts, sparse24.nn.ReLU2MLP(D, HIDDEN, recipe=BOTH)])
    WeightPruning(model, **options).step()
    assert [name.partition(".")[0] for name, _ in model.named_buffers()] == ["1", "1"]


def test_float8_experts_are_left_alone():
    experts = sparse24.nn.ReLU2Experts(2, 64, 64, recipe=BOTH).quantize_()
    model = nn.ModuleList([experts, sparse24.nn.ReLU2MLP(64, 64, recipe=BOTH)])
    pruning = WeightPruning(model)
    before = experts.up_proj.view(torch.uint8).clone()
    pruning.step()
    pruning.settle_()
    assert torch.equal(experts.up_proj.view(torch.uint8), before)
    with pytest.raises(RuntimeError, match=r"with 2:4 weights, got none in ReLU2Experts"):
        WeightPruning(experts)


def test_what_a_compiled_module_wraps_is_one_network():
    """The wrapper has the attributes of the module that it wraps."""
    torch.manual_seed(0)
    module = Experts()
    sparse24.convert(module, ConvertConfig(recipe=BOTH), quiet=True)
    model = nn.ModuleList([torch.compile(module, backend="eager")])
    assert len(list(sparse24.schedule.feed_forwards(model))) == 1
    assert not sparse24.Schedule(2, dense_warmup_steps=1).apply(model, 0) and not module.sparse
