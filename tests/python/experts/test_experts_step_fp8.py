"""Training steps of experts in float8: those of 16 bits within float8's precision, and where they run."""

import pytest
import torch
from compare import assert_same_bits
from data import normal
from mixture import COUNTS, OUT, in_float8, rows, together, weights
from synchronisation import no_synchronisation
from torch._dynamo.testing import CompileCounterWithBackend

import sparse24
from sparse24.experts.choice import MIN_TRAINING_ROWS, trains_in_float8
from sparse24.experts.wide_activation import wide_meta
from sparse24.mlp import kept_weights

BF16 = torch.bfloat16


@pytest.fixture
def always(monkeypatch):
    """Few rows train in float8, too."""
    monkeypatch.setattr("sparse24.experts.trains_in_float8", lambda *_, **__: True)


@pytest.fixture
def quantised(monkeypatch):
    """The shapes of what is quantised in both orders."""
    found, original = [], kept_weights.quantize_fp8_both

    def spy(w, *args):
        found.append(tuple(w.shape))
        return original(w, *args)

    monkeypatch.setattr(kept_weights, "quantize_fp8_both", spy)
    monkeypatch.setattr(kept_weights, "_accumulating", False)
    yield found
    kept_weights._kept.clear()


def inputs_of(device, counts=COUNTS, beyond=0):
    x, offsets = rows(BF16, device, counts, beyond)
    row_scale = normal(len(x), dtype=torch.float32, seed=4).abs().add(0.5).to(device)
    return [x, *weights(BF16, device, len(counts)), row_scale], offsets


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def step(run, inputs, offsets, grad):
    x, w1, w2, row_scale = own = leaves(inputs)
    out = run(x, w1, w2, offsets, row_scale)
    return out.detach(), *torch.autograd.grad(out, own, grad)


@pytest.mark.parametrize("counts", [COUNTS, (300,), (0, 129, 0), (64, 2, 200, 33)], ids=str)
def test_it_is_the_step_of_16_bits_within_float8(device, counts):
    inputs, offsets = inputs_of(device, counts)
    grad = normal(len(inputs[0]), OUT, dtype=BF16, seed=5).to(device)
    found = step(in_float8, inputs, offsets, grad)
    expected = step(together, inputs, offsets, grad)
    for what, a, b in zip(("out", "x", "w1", "w2", "row_scale"), found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        # float8 has three digits, and other near-equals are kept of a group.
        assert (a.float() - b.float()).norm() <= 0.12 * b.float().norm(), what
    unused = torch.tensor(counts, device=device) == 0
    assert not found[2][unused].any() and not found[3][unused].any()


def test_rows_of_nobody_may_hold_anything(device):
    inputs, offsets = inputs_of(device, beyond=11)
    kept = sum(COUNTS)
    inputs[3][kept:] = torch.nan
    grad = normal(len(inputs[0]), OUT, dtype=BF16, seed=5).to(device)
    grad[kept:] = torch.nan
    out, dx, dw1, dw2, drow = step(in_float8, inputs, offsets, grad)
    assert all(t.isfinite().all() for t in (out, dx, dw1, dw2, drow))
    assert not any(t[kept:].any() for t in (out, dx, drow))


def test_what_needs_no_gradient_gets_none(device):
    inputs, offsets = inputs_of(device)
    grad = normal(len(inputs[0]), OUT, dtype=BF16, seed=5).to(device)
    expected = step(in_float8, inputs, offsets, grad)[1:]
    for index in range(4):
        own = [t.detach().clone().requires_grad_(i == index) for i, t in enumerate(inputs)]
        out = in_float8(*own[:3], offsets, own[3])
        assert_same_bits(torch.autograd.grad(out, own[index], grad)[0], expected[index])


def test_second_derivatives_are_refused(device):
    inputs, offsets = inputs_of(device)
    own = leaves(inputs)
    out = in_float8(*own[:3], offsets, own[3])
    with pytest.raises(RuntimeError, match="sparse24.relu2_experts: expected create_graph to be False"):
        torch.autograd.grad(out.sum(), own, create_graph=True)


def test_weights_are_quantised_once_for_all_micro_batches(device, quantised):
    """From the first micro-batch of the steps after the first that accumulated."""
    inputs, offsets = inputs_of(device)
    x, w1, w2, row_scale = leaves(inputs)
    optimizer = torch.optim.SGD([w1, w2], lr=0.1)
    made = []
    for _ in range(3):
        for _ in range(3):
            quantised.clear()
            in_float8(x, w1, w2, offsets, row_scale, stored=(w1, w2)).sum().backward()
            made.append(len(quantised))
        optimizer.step()
        optimizer.zero_grad()
    assert made == [2, 2, 0, 2, 0, 0, 2, 0, 0]
    assert set(quantised) <= {tuple(w1.shape), tuple(w2.shape)}


def test_kept_codes_change_nothing(device, quantised):
    inputs, offsets = inputs_of(device)
    x, w1, w2, row_scale = leaves(inputs)
    outs = []
    for _ in range(3):
        out = in_float8(x, w1, w2, offsets, row_scale, stored=(w1, w2))
        out.sum().backward()
        outs.append(out)
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_is_compiled_with_its_gradients(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(in_float8, backend=counter, fullgraph=True, dynamic=True)
    for counts in (COUNTS, (9, 9, 9, 0, 5), (0, 40, 2, 3, 4)):
        inputs, offsets = inputs_of(device, counts, beyond=4)
        grad = normal(len(inputs[0]), OUT, dtype=BF16, seed=5).to(device)
        for a, b in zip(step(compiled, inputs, offsets, grad), step(in_float8, inputs, offsets, grad), strict=True):
            assert_same_bits(a, b)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_few_rows_train_in_16_bits(cuda):
    """As they do with `precision` "16bit", dense too."""
    inputs, offsets = inputs_of(cuda)
    grad = normal(len(inputs[0]), OUT, dtype=BF16, seed=5).to(cuda)
    assert not trains_in_float8(len(inputs[0]), len(COUNTS), kept=True)
    for options in ({}, {"sparse": False}):

        def run(x, w1, w2, offsets, row_scale, options=options, precision="fp8"):
            return sparse24.relu2_experts(x, w1, w2, offsets, row_scale=row_scale, precision=precision, **options)

        expected = step(lambda *a, run=run: run(*a, precision="16bit"), inputs, offsets, grad)
        for a, b in zip(step(run, inputs, offsets, grad), expected, strict=True):
            assert_same_bits(a, b)


def test_many_rows_train_in_float8(cuda, always):
    inputs, offsets = inputs_of(cuda)
    grad = normal(len(inputs[0]), OUT, dtype=BF16, seed=5).to(cuda)

    def run(x, w1, w2, offsets, row_scale):
        return sparse24.relu2_experts(x, w1, w2, offsets, row_scale=row_scale, precision="fp8")

    for a, b in zip(step(run, inputs, offsets, grad), step(in_float8, inputs, offsets, grad), strict=True):
        assert_same_bits(a, b)


def test_the_host_does_not_wait(cuda, always):
    x, offsets = rows(BF16, cuda)
    w1, w2 = (w.requires_grad_() for w in weights(BF16, cuda))
    sparse24.relu2_experts(x, w1, w2, offsets, precision="fp8").sum().backward()
    with no_synchronisation():
        out = sparse24.relu2_experts(x, w1, w2, offsets, precision="fp8")
        torch.autograd.grad(out, (w1, w2), torch.ones_like(out))


@pytest.mark.parametrize("written", [True, False], ids=["written", "fused"])
def test_codes_are_kept_from_the_step_after_one_that_accumulates(monkeypatch, written):
    """A micro-batch that is computed again, behind the backward pass of another one, runs as the first time."""
    monkeypatch.setattr(kept_weights, "_accumulating", False)
    w = torch.zeros(2, 4, 4, requires_grad=True)
    told = []
    for accumulates in (False, True, False):
        told.append(kept_weights.keeps(w))
        w.grad = torch.zeros_like(w) if accumulates else None
        told.append(kept_weights.keeps(w))
        w.grad = None
        if written:  # by an optimizer that is not torch's
            with torch.no_grad():
                w.add_(1)
        else:
            kept_weights._drop_all(None)
    assert told == [False, False, False, False, True, True]
    w.grad = torch.zeros_like(w)
    assert kept_weights.keeps(w) and not kept_weights.keeps(w.detach())


@pytest.mark.parametrize("features", [32, 64, 96, 128, 224, 320])
def test_metadata_in_the_layout_of_16_bits(device, features):
    x = normal(256, features, dtype=BF16, seed=7).to(device)
    values, meta, _ = sparse24.compress_fp8(x)
    expected = sparse24.decompress(values, meta, 256, features).to(BF16)
    wide = wide_meta(meta, 256, features)
    assert_same_bits(sparse24.decompress(values.to(BF16), wide, 256, features), expected)
    padding = sparse24.compress(x)[1].numel()
    assert wide.numel() == padding and wide.is_contiguous()


def test_the_choice_follows_rows_and_what_is_kept():
    for kept, least in MIN_TRAINING_ROWS.items():
        assert trains_in_float8(least * 8, 8, kept=kept) and not trains_in_float8(least * 8 - 1, 8, kept=kept)
    assert MIN_TRAINING_ROWS[True] <= MIN_TRAINING_ROWS[False]
