"""What is copied of 2:4 weights for inference follows masks, scales, recipes and states."""

import copy

import pytest
import torch
from compare import assert_same_bits
from convert_models import Inline
from pruned_networks import BOTH, change, network

import sparse24
from sparse24 import Recipe, WeightPruning

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def with_copies():
    return network(Recipe(sparse_weights="up")).add_adapters_(4).prepare_decode_()


def converted_with_copies():
    torch.manual_seed(0)
    model = Inline(d=32, hidden=64)
    config = sparse24.ConvertConfig(recipe=BOTH, adapters=4, decode=True, min_tokens=0)
    sparse24.convert(model, config, quiet=True)
    return model.eval()


def assert_copies_follow(model, before):
    """As a copy of the module has them, which makes them anew: with few tokens, and with more than are few."""
    after = []
    for tokens in (3, 80):
        x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            after.append(model(x))
            assert_same_bits(after[-1], copy.deepcopy(model)(x))
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) if before else True
    return after


@pytest.mark.parametrize("make", [with_copies, converted_with_copies])
@pytest.mark.parametrize("options", [{"soft": True}, {"refresh_steps": 2}], ids=["soft", "masks"])
def test_copies_for_inference_follow_masks_and_scales(make, options):
    """Which are written to without a change of the weights."""
    model = make()
    pruning = WeightPruning(model, **options)
    outs = assert_copies_follow(model, None)
    if "refresh_steps" in options:
        pruning.step()
        change(model, seed=3)
        pruning.step()
        outs = assert_copies_follow(model, outs)
    pruning.step()
    outs = assert_copies_follow(model, outs)
    pruning.remove()
    if "soft" in options:  # masks are those of the recipe alone, so soon after they were found
        assert_copies_follow(model, outs)


def test_copies_for_inference_follow_the_recipe():
    model = with_copies()
    outs = assert_copies_follow(model, None)
    model.recipe = BOTH
    outs = assert_copies_follow(model, outs)
    model.recipe = None
    outs = assert_copies_follow(model, outs)
    model.prune_weights_("up")
    outs = assert_copies_follow(model, outs)
    model.recipe = None  # the weights stay as they were pruned, and states are loaded as they are
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert_same_bits(model.up_proj.weight, state["up_proj.weight"])
    assert_copies_follow(model, outs)


@pytest.mark.parametrize("decode", [False, True], ids=["", "decode"])
def test_a_recipe_that_is_taken_away_and_given_back(decode):
    """Nothing is packed of weights that are not 2:4 then, in the module and in what is made of it."""
    model = network(Recipe(sparse_weights="up")).prune_weights_()
    if decode:
        model.prepare_decode_()
    change(model)
    outs = assert_copies_follow(model, None)
    model.recipe = None
    outs = assert_copies_follow(model, outs)
    x = torch.randn(80, 32)
    with torch.no_grad():
        wanted = sparse24.relu2_mlp(x, model.up_proj.weight, model.down_proj.weight, min_tokens=0)
        assert_same_bits(model(x), wanted)
        assert_same_bits(copy.deepcopy(model)(x), wanted)
    assert "up_values" not in model._buffers and ("w2_rows" in model._buffers) == decode
    assert copy.deepcopy(model).quantize_().up_proj.weight.float().count_nonzero() > 0.9 * 32 * 64
    model.recipe = BOTH
    outs = assert_copies_follow(model, outs)
    assert "up_values" in model._buffers and model._copies_fresh
    model.quantize_()
    assert model.up_proj.weight.float().count_nonzero() <= 32 * 32


def test_adapters_of_a_state_that_is_assigned():
    """Parameters are others then, and copies are made of these."""
    model = network(Recipe(sparse_weights="up")).add_adapters_(4)
    model.load_state_dict({name: t + 0.1 for name, t in model.state_dict().items()}, assign=True)
    assert model._copies_fresh and model._copies.holds(model._sources(*model._weights()))
    assert_copies_follow(model, None)
