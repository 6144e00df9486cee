"""Weights in float8 are quantised once an optimizer step, and anew whenever something has changed them."""

import copy
import gc
import weakref

import pytest
import torch
from compare import assert_same_bits
from torch.utils.checkpoint import checkpoint
from training_reference import HIDDEN, OUT, D

import sparse24
from sparse24.mlp import kept_weights, step_fp8, step_fp8_whole

# Dynamo makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

RECIPE = sparse24.Recipe(fp8_weight_gradients=True)


@pytest.fixture(autouse=True)
def nothing_is_kept_from_before(monkeypatch):
    kept_weights._kept.clear()
    monkeypatch.setattr(kept_weights, "_accumulating", False)


@pytest.fixture
def made(monkeypatch):
    """The shapes of the weights that were quantised, but for those that a backward pass made again."""
    calls, original = [], kept_weights.both_orders

    def counted(w, prune=None, scale=None, **options):
        if scale is None:
            calls.append(tuple(w.shape))
        return original(w, prune, scale, **options)

    in_one = step_fp8_whole.relu2_mlp_fp8

    def counted_in_one(x, w1, w2, scales, b1, b2, w1_scale, w2_scale, *options):
        calls.extend(tuple(w.shape) for w, scale in ((w1, w1_scale), (w2, w2_scale)) if scale is None)
        return in_one(x, w1, w2, scales, b1, b2, w1_scale, w2_scale, *options)

    monkeypatch.setattr(kept_weights, "both_orders", counted)
    monkeypatch.setattr(step_fp8, "both_orders", counted)
    monkeypatch.setattr(step_fp8_whole, "both_orders", counted)
    monkeypatch.setattr(step_fp8_whole, "relu2_mlp_fp8", counted_in_one)
    return calls


def make(device, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    options = {"precision": "fp8", "recipe": RECIPE, "min_tokens": 0} | options
    return sparse24.nn.ReLU2MLP(D, HIDDEN, OUT, device=device, dtype=dtype, **options)


def micro_batch(module, seed, run=None):
    g = torch.Generator().manual_seed(seed)
    device = module.up_proj.weight.device
    x, grad = (torch.randn(64, n, generator=g).to(device, torch.bfloat16) for n in (D, OUT))
    out = module(x) if run is None else run(module, x)
    out.backward(grad)
    return out.detach()


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=1e-2)


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["saved", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "masters"])
def test_once_a_step(device, made, monkeypatch, dtype, options):
    """The bits of a training that keeps nothing."""
    module = make(device, dtype, **options)
    other = copy.deepcopy(module)
    optimizers = sgd(module), sgd(other)
    for step in range(3):
        made.clear()
        outs = [micro_batch(module, 4 * step + i) for i in range(4)]
        # The first step finds out that gradients accumulate.
        assert len(made) == (4 if step == 0 else 2)
        with monkeypatch.context() as patch:
            patch.setattr(step_fp8, "codes_of", lambda *_, **__: None)
            expected = [micro_batch(other, 4 * step + i) for i in range(4)]
        for one, another in zip(outs, expected, strict=True):
            assert_same_bits(one, another)
        for p, q in zip(module.parameters(), other.parameters(), strict=True):
            assert_same_bits(p.grad, q.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert not kept_weights._kept


def test_nothing_is_kept_without_accumulation(device, made):
    module = make(device)
    optimizer = sgd(module)
    for step in range(3):
        micro_batch(module, step)
        assert not kept_weights._kept
        optimizer.step()
        optimizer.zero_grad()
    assert len(made) == 6


class Unseen(torch.optim.Optimizer):
    """Writes without a new version, as fused kernels do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.mul_(2)


CHANGES = {
    "in place": lambda m: m.up_proj.weight.mul_(2),
    "a slice": lambda m: m.up_proj.weight[3].zero_(),
    "other memory": lambda m: setattr(m.up_proj.weight, "data", m.up_proj.weight * 3),
    "another parameter": lambda m: setattr(m.up_proj, "weight", torch.nn.Parameter(m.up_proj.weight * 2)),
    "loaded": lambda m: m.load_state_dict({k: 2 * t if "weight" in k else t for k, t in m.state_dict().items()}),
    "an optimizer": lambda m: Unseen([m.up_proj.weight]).step(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_between_micro_batches(device, made, change):
    module = make(device)
    for seed in range(3):
        micro_batch(module, seed)
    assert len(made) == 4 and len(kept_weights._kept) == 2
    with torch.no_grad():
        CHANGES[change](module)
    fresh = copy.deepcopy(module)
    made.clear()
    assert_same_bits(micro_batch(module, 3), micro_batch(fresh, 3))
    assert (HIDDEN, D) in made


def test_parameters_that_are_swapped(device, made):
    """torch swaps no tensor to which there are weak references."""
    module = make(device)
    for seed in range(3):
        micro_batch(module, seed)
    assert len(kept_weights._kept) == 2
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.load_state_dict({k: 2 * t if "weight" in k else t for k, t in module.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    fresh = copy.deepcopy(module)
    assert_same_bits(micro_batch(module, 3), micro_batch(fresh, 3))


def test_the_dtype_of_the_call(device, made):
    """Autocast casts masters anew in each call, to what it is told."""
    module = make(device, torch.float32)
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype):
            micro_batch(module, 0, lambda m, x: m(x).to(torch.bfloat16))
    made.clear()
    with torch.autocast(device, torch.float16):
        micro_batch(module, 0, lambda m, x: m(x).to(torch.bfloat16))
    assert not made
    with torch.autocast(device, torch.bfloat16):
        micro_batch(module, 0)
    assert len(made) == 2


def test_checkpointing(device):
    module = make(device)
    plain = copy.deepcopy(module)
    for seed in range(3):
        out = micro_batch(module, seed, lambda m, x: checkpoint(m, x, use_reentrant=False))
        assert_same_bits(out, micro_batch(plain, seed))
        assert module.refresh_scales() and plain.refresh_scales()
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        assert_same_bits(p.grad, q.grad)


def test_compiled_steps_quantise_in_the_graph(device):
    torch._dynamo.reset()
    module = make(device)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    for seed in range(3):
        with torch.no_grad():
            module.up_proj.weight.data.mul_(1.5)  # nobody sees it
            compiled.up_proj.weight.data.mul_(1.5)
        kept_weights._kept.clear()
        assert_same_bits(micro_batch(compiled, seed), micro_batch(module, seed))
        assert module.refresh_scales() and compiled.refresh_scales()


def test_nothing_outlives_its_weight(device):
    module = make(device)
    for seed in range(3):
        micro_batch(module, seed)
    codes = weakref.ref(next(iter(kept_weights._kept[module.up_proj.weight].values())).form.values)
    del module
    gc.collect()
    assert codes() is None and not kept_weights._kept


def test_captured_steps_quantise_in_the_graph(cuda):
    module = make(cuda)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(64, D, dtype=torch.bfloat16, device=cuda)
    for _ in range(3):
        module(x).sum().backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
        out.sum().backward()
    with torch.no_grad():
        module.up_proj.weight.mul_(2)
    graph.replay()
    scales = module.delayed_scales.clone()
    assert out.isfinite().all() and scales.isfinite().all()
    before = out.clone()
    with torch.no_grad():
        module.up_proj.weight.zero_()
    graph.replay()
    assert before.count_nonzero() and not out.count_nonzero()
