"""Training of 2:4 weights: soft thresholds, masks that stay, decay, what is reported and resumed."""

import copy

import pytest
import torch
from compare import assert_same_bits
from convert_models import Inline
from pruned_networks import BOTH, change, network
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparse24
from sparse24 import Recipe, WeightPruning, prune24, soft_threshold24
from sparse24.mlp.weights import kept24, soft_scale

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def converted():
    torch.manual_seed(0)
    model = Inline(d=32, hidden=64)
    sparse24.convert(model, sparse24.ConvertConfig(recipe=BOTH, min_tokens=0), quiet=True)
    return model


@pytest.mark.parametrize("make", [network, converted])
def test_soft_weights_with_a_frozen_scale(make):
    model = make()
    x = torch.randn(64, 32)
    pruning = WeightPruning(model, soft=True)
    plain = model(x)
    pruning.step()
    w1, w2 = list(model.parameters())[:2]
    scales = soft_scale(w1), soft_scale(w2, 0)
    for _ in range(2):
        soft = soft_threshold24(w1, -1, scales[0]), soft_threshold24(w2, 0, scales[1])
        assert_same_bits(model(x), sparse24.relu2_mlp(x, *soft))
        change(model)
        pruning.step()
    assert not torch.equal(soft_scale(w1), scales[0])
    pruning.remove()
    assert_same_bits(model(x), sparse24.relu2_mlp(x, prune24(w1), prune24(w2, 0)))
    assert not torch.equal(plain, model(x)) and not list(model.buffers())


@pytest.mark.parametrize("make", [network, converted])
@pytest.mark.parametrize("every", [0, 3])
def test_masks_stay(make, every):
    """The values follow the weights, and their places only when they are due; gradients are dense."""
    model = make()
    x = torch.randn(64, 32)
    pruning = WeightPruning(model, refresh_steps=every)
    w1, w2 = list(model.parameters())[:2]
    keep = None
    for step in range(5):
        pruning.step()
        if keep is None or (every and step % every == 0):
            keep = kept24(w1), kept24(w2, 0)
        expected = sparse24.relu2_mlp(x, torch.where(keep[0], w1, 0), torch.where(keep[1], w2, 0))
        assert_same_bits(model(x), expected)
        change(model, step)
    model(x).square().mean().backward()
    assert w1.grad[~keep[0]].count_nonzero() and w2.grad[~keep[1]].count_nonzero()


def test_dense_phases_and_schedules():
    """Dense steps use nothing of it and count for nothing; the first sparse one makes masks."""
    model = network()
    x = torch.randn(64, 32)
    schedule = sparse24.Schedule(9, dense_warmup_steps=3, dense_final_steps=2)
    pruning = WeightPruning(model, refresh_steps=0)
    for step in range(9):
        sparse = schedule.apply(model, step)
        pruning.step()
        if not sparse:
            assert_same_bits(
                model(x), sparse24.relu2_mlp(x, model.up_proj.weight, model.down_proj.weight, sparse=False)
            )
        if step == 3:
            keep = kept24(model.up_proj.weight)
        if sparse:
            assert_same_bits(model._buffers["_sparse24_keep_up"], keep)
        change(model, step)
    assert pruning.steps == 4


@pytest.mark.parametrize("make", [network, converted])
@pytest.mark.parametrize("options", [{"soft": True}, {"refresh_steps": 0}, {}], ids=str)
def test_a_dense_end_starts_with_the_network_of_the_last_sparse_step(make, options):
    """And with the parameters as they are, where that is chosen; a second sparse phase finds masks and scales anew."""
    x = torch.randn(64, 32)
    for settle in (True, False):
        model = make()
        pruning = WeightPruning(model, settle=settle, **options)
        w1, w2 = list(model.parameters())[:2]
        for step in range(3):
            pruning.step()
            change(model, step)
        stored, sparse = [w.detach().clone() for w in (w1, w2)], model(x).detach()
        model.sparse = False
        pruning.step()
        if not settle:
            assert_same_bits(w1.detach(), stored[0])
            assert_same_bits(w2.detach(), stored[1])
            continue
        assert_same_bits(prune24(w1).detach(), w1.detach())
        assert_same_bits(prune24(w2, 0).detach(), w2.detach())
        assert_same_bits(sparse24.relu2_mlp(x, w1, w2, min_tokens=0).detach(), sparse)
        assert not list(model.buffers()) and pruning.steps == 3
        change(model)
        dense = w1.detach().clone()
        pruning.step()
        assert_same_bits(w1.detach(), dense)
        model.sparse = True
        pruning.step()
        entering = {"soft": soft_threshold24(w1, -1, soft_scale(w1))}.get(next(iter(options), ""), prune24(w1))
        assert_same_bits(pruning._networks[0].entering().detach(), entering.detach())


@pytest.mark.parametrize("refresh", [1, 4])
def test_decay(refresh):
    for decay_of in ("gradients", "weights"):
        model = network()
        pruning = WeightPruning(model, refresh_steps=refresh, decay=0.5, decay_of=decay_of)
        pruning.step()
        w1, w2 = model.up_proj.weight, model.down_proj.weight
        before = [w.detach().clone() for w in (w1, w2)]
        w1.grad, w2.grad = torch.ones_like(w1), torch.ones_like(w2)
        pruning.decay_(0.25)
        for w, old, dim in zip((w1, w2), before, (-1, 0), strict=True):
            rest = old - prune24(old, dim)
            gradients = decay_of == "gradients"
            torch.testing.assert_close(w.grad, 1 + 0.5 * rest if gradients else torch.ones_like(w))
            torch.testing.assert_close(w.detach(), old if gradients else old - 0.125 * rest)
        model.sparse = False
        kept = w1.grad.clone()
        pruning.decay_()
        assert_same_bits(w1.grad, kept)


def test_flip_rate():
    model = network(Recipe(sparse_weights="up"))
    pruning = WeightPruning(model)
    assert pruning.flip_rate() == 0
    before = kept24(model.up_proj.weight)
    change(model)
    after = kept24(model.up_proj.weight)
    assert pruning.flip_rate() == pytest.approx((before != after).double().mean().item()) != 0
    assert pruning.flip_rate() == 0
    kept = WeightPruning(model, refresh_steps=3)
    kept.step()
    kept.flip_rate()
    change(model)
    assert kept.flip_rate() == 0  # the mask stays
    for _ in range(3):
        kept.step()
    assert kept.flip_rate() > 0


@pytest.mark.parametrize("options", [{"soft": True}, {"refresh_steps": 3}], ids=str)
def test_resumed(options):
    """The state of the model is what it was without; that of the object has masks, scales and steps."""
    model = network()
    names = set(model.state_dict())
    pruning = WeightPruning(model, **options)
    x = torch.randn(64, 32)
    for _ in range(2):
        pruning.step()
        change(model)
    assert set(model.state_dict()) == names
    other = network()
    other.load_state_dict(model.state_dict())
    resumed = WeightPruning(other, **options)
    resumed.load_state_dict(copy.deepcopy(pruning.state_dict()))
    assert_same_bits(other(x), model(x))
    for _ in range(3):
        for m, p in ((model, pruning), (other, resumed)):
            p.step()
            change(m, 7)
    assert_same_bits(other(x), model(x))
    assert_same_bits(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("options", [{"soft": True}, {"refresh_steps": 3}], ids=str)
def test_resumed_at_the_first_step(options):
    """What a state has not is not there afterwards."""
    model = network()
    pruning = WeightPruning(model, **options)
    first = copy.deepcopy(pruning.state_dict())
    pruning.step()
    assert list(model.buffers())
    pruning.load_state_dict(first)
    assert not list(model.buffers()) and pruning.steps == 0


@pytest.mark.parametrize("choice", ["up", "both"])
@pytest.mark.parametrize("options", [{"soft": True}, {"refresh_steps": 0}, {}], ids=str)
def test_pruned_before_they_are_quantised(choice, options):
    """Float8 has equals of what was not: which of them are kept is for the weights to say."""
    model = network(Recipe(sparse_weights=choice))
    WeightPruning(model, **options).step()
    change(model)
    layers = "up_proj", "down_proj"
    wanted = [sparse24.quantize_fp8(w) for w in model.entering_weights()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.quantize_()
    assert not any(name.startswith("_sparse24") for name in model._buffers)
    for name, (codes, scale) in zip(layers, wanted, strict=True):
        assert_same_bits(model.get_submodule(name).weight, codes)
        assert_same_bits(model.get_submodule(name).weight_scale, scale.flatten())
    model.load_state_dict(state)  # as it was before quantising: pruned by the recipe alone
    for name, dim in zip(layers, model.recipe.weight_groups(), strict=True):
        w = state[f"{name}.weight"]
        assert_same_bits(
            model.get_submodule(name).weight, sparse24.quantize_fp8(w if dim is None else prune24(w, dim))[0]
        )


@pytest.mark.filterwarnings("ignore:.*no copies of weights are kept")
@pytest.mark.parametrize("inside", [False, True])
def test_weights_made_in_inference_mode_are_pruned_before_they_are_quantised(inside):
    with torch.inference_mode():
        model = network()
        wanted = [sparse24.quantize_fp8(w)[0] for w in model.entering_weights()]
    with torch.inference_mode(inside):
        model.quantize_()
    for layer, codes in zip((model.up_proj, model.down_proj), wanted, strict=True):
        assert_same_bits(layer.weight, codes)
    x = torch.randn(3, 32)
    assert_same_bits(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("quantised", [False, True])
def test_states_that_do_not_fit_are_refused_as_without_pruning(quantised):
    state = network(None).quantize_().state_dict()
    for name, value in (
        ("up_proj.weight_scale", torch.ones(5)),
        ("down_proj.weight_scale", torch.ones(5)),
        ("down_proj.weight", torch.ones(8, 8)),
        ("down_proj.weight", torch.ones(8, 8).to(torch.float8_e4m3fn)),
    ):
        said = []
        for model in (network(None), network().prune_weights_()):
            with pytest.raises(RuntimeError) as error:
                (model.quantize_() if quantised else model).load_state_dict({**state, name: value})
            said.append(str(error.value))
        assert said[0] == said[1]


def test_quantised_in_a_dense_phase():
    """Then nothing is pruned, and no threshold is left for a later phase."""
    model = network()
    WeightPruning(model, soft=True, settle=False).step()
    model.sparse = False
    wanted = [sparse24.quantize_fp8(layer.weight)[0] for layer in (model.up_proj, model.down_proj)]
    model.quantize_()
    for layer, codes in zip((model.up_proj, model.down_proj), wanted, strict=True):
        assert_same_bits(layer.weight, codes)
    assert not any(name.startswith("_sparse24") for name in model._buffers)


@pytest.mark.parametrize("options", [{"refresh_steps": 2}, {"soft": True}, {}], ids=str)
def test_compiled_steps(options):
    """One graph: masks and scales are written in place. Gradients are those of the modules as they are, and dense."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = network()
    pruning = WeightPruning(model, **options)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(64, 32)
    pruning.step()
    for step in range(5):
        model(x).sum().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        compiled(x).sum().backward()
        for p, grad in zip(model.parameters(), expected, strict=True):
            assert_same_bits(p.grad, grad)
            assert p.grad.count_nonzero() > 0.9 * p.numel()
        model.zero_grad()
        assert_same_bits(compiled(x), model(x))
        change(model, step)
        pruning.step()
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_transposed_parameters():
    """A converted network that stores a weight [in, out]: decay and masks lie as it does."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(a, b) / 8) for a, b in ((32, 64), (64, 16)))

        def forward(self, x):
            return torch.relu(x @ self.first).square() @ self.second

    model = Network()
    report = sparse24.convert(model, sparse24.ConvertConfig(recipe=BOTH, min_tokens=0), quiet=True)
    assert report.converted
    pruning = WeightPruning(model, refresh_steps=0, decay=1.0)
    pruning.step()
    model.first.grad = torch.zeros_like(model.first)
    pruning.decay_()
    assert_same_bits(model.first.grad, (model.first - prune24(model.first, 0)).detach())
    x = torch.randn(64, 32)
    expected = sparse24.relu2_mlp(x, prune24(model.first.t()), prune24(model.second.t(), 0))
    assert_same_bits(model(x), expected)


def merged():
    model = network().add_adapters_(4)
    nn.init.normal_(model.up_left)
    return model, model.merge_adapters_


def reverted():
    model = converted()
    return model, lambda: sparse24.revert(model)


def other_recipe():
    model = network()
    return model, lambda: setattr(model, "recipe", Recipe())


@pytest.mark.parametrize("options", [{}, {"soft": True}, {"refresh_steps": 0}], ids=str)
@pytest.mark.parametrize("make", [merged, reverted, other_recipe])
def test_networks_that_are_not_pruned_any_more_are_left_alone(make, options):
    model, end = make()
    pruning = WeightPruning(model, decay=0.5, decay_of="weights", **options)
    pruning.step()
    pruning.flip_rate()
    end()
    before = [w.detach().clone() for w in model.parameters()]
    for sparse in (True, False):
        model.sparse = sparse
        pruning.step()
        pruning.decay_()
        assert pruning.flip_rate() == 0
    pruning.settle_()
    for w, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(w, old)


def test_refusals():
    model = network()
    for options, words in (
        ({"soft": True, "refresh_steps": 2}, "refresh_steps to be 1 with a soft threshold, got 2"),
        ({"refresh_steps": -1}, "refresh_steps to be at least 0, got -1"),
        ({"decay": -1.0}, "decay to be a finite number from 0, got -1.0"),
        ({"decay_of": "both"}, 'decay_of to be "gradients" or "weights", got "both"'),
        ({"soft": 3}, "soft to be True or False, got 3"),
    ):
        with pytest.raises(RuntimeError, match=f"^sparse24.WeightPruning: expected {words}$"):
            WeightPruning(model, **options)
    for none in (nn.Linear(4, 4), network(None), network(Recipe())):
        with pytest.raises(RuntimeError, match="modules with 2:4 weights, got "):
            WeightPruning(none)
    with pytest.raises(RuntimeError, match="expected a state of 2 weights, got 1"):
        WeightPruning(model).load_state_dict({"steps": 1, "buffers": [{}]})
    with pytest.raises(RuntimeError, match="expected a state that state_dict gave, got one without buffers"):
        WeightPruning(model).load_state_dict({"steps": 1})
    masks = {"_sparse24_keep_up": torch.ones(4, 4, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match=r"expected a state of weights of shape \[64, 32\], got \[4, 4\]"):
        WeightPruning(model).load_state_dict({"steps": 1, "buffers": [masks, {}]})
    for first, words in (
        ({"_sparse24_keep_down": torch.ones(64, 32, dtype=torch.bool)}, "a state of _sparse24_keep_up and"),
        ({"_sparse24_keep_up": torch.ones(64, 32)}, "_sparse24_keep_up to be bool, got float32"),
        ({"_sparse24_soft_up": torch.ones(2)}, r"a state of weights of shape \[1\], got \[2\]"),
    ):
        with pytest.raises(RuntimeError, match=f"sparse24.WeightPruning: expected {words}"):
            WeightPruning(model).load_state_dict({"steps": 1, "buffers": [first, {}]})
    with pytest.raises(RuntimeError, match="expected a state that state_dict gave, got None"):
        WeightPruning(model).load_state_dict(None)
    assert not list(model.buffers())
    for rate in (-1.0, float("nan"), "x"):
        with pytest.raises(RuntimeError, match=f"expected learning_rate to be a finite number from 0, got {rate}"):
            WeightPruning(model).decay_(rate)
    with pytest.raises(RuntimeError, match="expected model to have weights that can be trained, got float8 ones"):
        WeightPruning(network().quantize_())


@pytest.mark.parametrize("options", [{"soft": True}, {"refresh_steps": 0}], ids=str)
@pytest.mark.parametrize("make", [network, converted])
def test_masks_and_scales_outlive_casts(make, options):
    """A scale that was frozen stays what it was found to be; memory that is made anew holds none."""
    model = make()
    WeightPruning(model, **options).step()
    before = {name: t.clone() for name, t in model.named_buffers() if "sparse24" in name}
    assert len(before) == 2
    model.to(torch.bfloat16).to_empty(device="cpu").to(torch.float32)
    for name, t in before.items():
        assert_same_bits(model.get_buffer(name), t)
    model.to("meta").to_empty(device="cpu")
    assert not [name for name, _ in model.named_buffers() if name in before]
