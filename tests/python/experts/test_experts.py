"""relu2_experts against relu2_mlp, expert by expert: values and gradients."""

import pytest
import torch
from compare import assert_same_bits
from data import normal
from mixture import COUNTS, HIDDEN, OUT, D, float8, one_by_one, rows, together, weights

import sparse24
from sparse24.experts.choice import pays

BF16 = torch.bfloat16


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_on_the_cpu_it_is_relu2_mlp(dtype, sparse, scaled):
    x, offsets = rows(dtype, "cpu", beyond=9)
    w1, w2 = weights(dtype, "cpu")
    row_scale = normal(len(x), dtype=torch.float32, seed=4) if scaled else None
    out = sparse24.relu2_experts(x, w1, w2, offsets, row_scale=row_scale, sparse=sparse)
    assert_same_bits(out, one_by_one(x, w1, w2, offsets, row_scale, sparse=sparse))
    assert out.dtype == dtype and not out[sum(COUNTS) :].any()


@pytest.mark.parametrize("precision", ["auto", "fp8"])
@pytest.mark.parametrize(
    "recipe", [None, sparse24.Recipe("dense"), sparse24.Recipe(fp8_weight_gradients=True)], ids=str
)
def test_gradients_on_the_cpu_are_those_of_relu2_mlp(precision, recipe):
    x, offsets = rows(BF16, "cpu")
    inputs = x, *weights(BF16, "cpu"), normal(len(x), dtype=torch.float32, seed=4)
    grad = normal(len(x), OUT, dtype=BF16, seed=5)
    results = []
    for run in (sparse24.relu2_experts, one_by_one):
        x, w1, w2, row_scale = own = leaves(*inputs)
        out = run(x, w1, w2, offsets, row_scale=row_scale, precision=precision, recipe=recipe)
        results.append((out, *torch.autograd.grad(out, own, grad)))
    for what, a, b in zip(("out", "x", "w1", "w2", "row_scale"), *results, strict=True):
        assert_same_bits(a, b, what)
    assert not results[0][2][1].any()  # of the expert without rows


def test_rows_beyond_the_last_offset_may_hold_anything(device):
    x, offsets = rows(BF16, device, beyond=11)
    kept = sum(COUNTS)
    inputs = x, *weights(BF16, device), normal(len(x), dtype=torch.float32, seed=4).to(device)
    inputs[3][kept:] = torch.nan
    grad = normal(len(x), OUT, dtype=BF16, seed=5).to(device)
    grad[kept:] = torch.nan
    runs = [lambda x, w1, w2, s: sparse24.relu2_experts(x, w1, w2, offsets, row_scale=s)]
    runs += [lambda x, w1, w2, s, sp=sp: together(x, w1, w2, offsets, s, sparse=sp) for sp in (True, False)]
    for run in runs:
        own = leaves(*inputs)
        out = run(*own)
        dx, dw1, dw2, drow = torch.autograd.grad(out, own, grad)
        assert all(t.isfinite().all() for t in (out, dx, dw1, dw2, drow))
        for t in (out, dx, drow):
            assert not t[kept:].any() and t[:kept].any()


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("counts", [COUNTS, (5,), (0, 0, 9), (4, 0, 0), (1, 1, 1, 1)], ids=str)
def test_together_they_are_as_one_by_one(device, sparse, counts):
    """The products of CUDA: the output, and exact gradients under the forward's mask."""
    dtype = torch.float32 if device == "cpu" else BF16
    x, offsets = rows(dtype, device, counts, beyond=3)
    x = x.nan_to_num()
    inputs = x, *weights(dtype, device, len(counts)), normal(len(x), dtype=torch.float32, seed=4).to(device)
    grad = normal(len(x), OUT, dtype=dtype, seed=5).to(device)
    own, its = leaves(*inputs), leaves(*inputs)
    out = together(*own[:3], offsets, own[3], sparse=sparse)
    expected = one_by_one(*its[:3], offsets, its[3], sparse=sparse, recipe=sparse24.Recipe("dense"))
    grads, right = torch.autograd.grad(out, own, grad), torch.autograd.grad(expected, its, grad)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip((out, *grads), (expected, *right), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "experts"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_float8_weights(device, by_row, sparse):
    x, offsets = rows(BF16, device, beyond=2)
    w1, w2, w1_scale, w2_scale = float8(*weights(BF16, device), by_row)
    row_scale = normal(len(x), dtype=torch.float32, seed=4).to(device)
    scales = {"w1_scale": w1_scale, "w2_scale": w2_scale}
    expected = one_by_one(x, w1, w2, offsets, row_scale, **scales, sparse=sparse)
    out = sparse24.relu2_experts(x, w1, w2, offsets, row_scale=row_scale, **scales, sparse=sparse)
    if device == "cpu":
        assert_same_bits(out, expected)
    atol = 4e-2 * expected.abs().max().item()
    torch.testing.assert_close(
        together(x, w1, w2, offsets, row_scale, **scales, fp8=True, sparse=sparse), expected, rtol=0.1, atol=atol
    )


def test_float8_weights_pass_a_gradient_to_x(device):
    x, offsets = rows(BF16, device)
    w1, w2, w1_scale, w2_scale = float8(*weights(BF16, device))
    grad = normal(len(x), OUT, dtype=BF16, seed=5).to(device)
    own, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    right = torch.autograd.grad(one_by_one(its, w1, w2, offsets, None, w1_scale, w2_scale), its, grad)[0]
    for out in (
        sparse24.relu2_experts(own, w1, w2, offsets, w1_scale=w1_scale, w2_scale=w2_scale),
        together(own, w1, w2, offsets, None, w1_scale, w2_scale, fp8=True),
    ):
        dx = torch.autograd.grad(out, own, grad)[0]
        torch.testing.assert_close(dx, right, rtol=0.1, atol=0.05 * right.abs().max().item())


def test_the_factor_of_a_row_may_be_zero(device):
    x, offsets = rows(BF16, device)
    w1, w2 = weights(BF16, device)
    grad = normal(len(x), OUT, dtype=BF16, seed=5).to(device)
    factors = torch.zeros(len(x), device=device)
    for run in (
        lambda s: sparse24.relu2_experts(x, w1, w2, offsets, row_scale=s),
        lambda s: together(x, w1, w2, offsets, s),
    ):
        s = factors.clone().requires_grad_()
        found = torch.autograd.grad(run(s), s, grad)[0]
        right = (sparse24.relu2_experts(x, w1, w2, offsets).float() * grad.float()).sum(1)
        torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2 * right.abs().max().item())


def test_no_rows(device):
    x, offsets = rows(BF16, device, (0, 0))
    w1, w2 = weights(BF16, device, 2)
    own = leaves(x, w1, w2)
    out = sparse24.relu2_experts(*own, offsets)
    assert out.shape == (0, OUT)
    dx, dw1, dw2 = torch.autograd.grad(out, own, torch.zeros_like(out))
    assert dx.shape == (0, D) and not dw1.any() and not dw2.any() and dw1.shape == (2, HIDDEN, D)


def test_nothing_belongs_to_an_expert(device):
    x, offsets = rows(BF16, device, (0, 0), beyond=5)
    own = leaves(x, *weights(BF16, device, 2))
    out = sparse24.relu2_experts(*own, offsets)
    assert not out.any() and not any(g.any() for g in torch.autograd.grad(out, own, torch.ones_like(out)))


def test_rows_of_others_do_not_matter(device):
    """Groups are formed within an expert, forward and backward."""
    x, offsets = rows(BF16, device)
    w1, w2 = weights(BF16, device)
    grad = normal(len(x), OUT, dtype=BF16, seed=5).to(device)
    begin, end = offsets[2].item(), offsets[3].item()
    results = []
    for other in (1.0, -3.0):
        t = x.clone()
        t[:begin] *= other
        t[end:] *= other
        own = leaves(t, w1, w2)
        out = sparse24.relu2_experts(*own, offsets)
        dx, dw1, dw2 = torch.autograd.grad(out, own, grad)
        results.append((out[begin:end], dx[begin:end], dw1[3], dw2[3]))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_float32_master_weights(device):
    x, offsets = rows(BF16, device)
    own = leaves(x, *weights(torch.float32, device))
    out = sparse24.relu2_experts(*own, offsets)
    grads = torch.autograd.grad(out, own, torch.ones_like(out))
    assert [g.dtype for g in grads] == [BF16, torch.float32, torch.float32]


def test_autocast(device):
    x, offsets = rows(torch.float32, device)
    w1, w2 = weights(torch.float32, device)
    with torch.autocast(device, BF16):
        out = sparse24.relu2_experts(x, w1, w2, offsets)
    assert out.dtype == BF16
    assert_same_bits(out, sparse24.relu2_experts(x.to(BF16), w1.to(BF16), w2.to(BF16), offsets))


def test_second_derivatives_are_refused(device):
    x, offsets = rows(BF16, device)
    own = leaves(x, *weights(BF16, device))
    out = sparse24.relu2_experts(*own, offsets)
    with pytest.raises(RuntimeError, match="sparse24.relu2_experts: expected create_graph to be False"):
        torch.autograd.grad(out.sum(), own, create_graph=True)


def test_deterministic(device):
    x, offsets = rows(BF16, device)
    own = leaves(x, *weights(BF16, device))
    first, second = (
        torch.autograd.grad(sparse24.relu2_experts(*own, offsets).float().square().sum(), own) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def test_layouts(device):
    """Rows and matrices that are views of others, and that do not begin at 16 bytes."""
    x, offsets = rows(BF16, device)
    w1, w2 = weights(BF16, device)
    expected = sparse24.relu2_experts(x, w1, w2, offsets)
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    for t in (x.t().contiguous().t(), odd, torch.cat([x, x], 1)[:, : x.shape[1]]):
        assert_same_bits(sparse24.relu2_experts(t, w1, w2, offsets), expected)
    assert_same_bits(sparse24.relu2_experts(x, torch.cat([w1, w1], 1)[:, :HIDDEN], w2, offsets), expected)
    for first, second in ((w1.mT.contiguous().mT, w2), (w1, w2.mT.contiguous().mT)):
        out = sparse24.relu2_experts(x, first, second, offsets)
        if device == "cpu":
            assert_same_bits(out, expected)
        else:  # other kernels, whose sums have another order
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["up", "both"])
@pytest.mark.parametrize("quantised", [False, True], ids=["sixteen_bit", "fp8"])
def test_weights_that_a_recipe_prunes(kind, quantised):
    x, offsets = rows(BF16, "cpu")
    w1, w2 = weights(BF16, "cpu")
    scales = {}
    if quantised:
        w1, w2, scales["w1_scale"], scales["w2_scale"] = float8(w1, w2)
    recipe = sparse24.Recipe(sparse_weights=kind)
    for sparse in (True, False):
        out = sparse24.relu2_experts(x, w1, w2, offsets, **scales, recipe=recipe, sparse=sparse)
        assert_same_bits(out, one_by_one(x, w1, w2, offsets, **scales, recipe=recipe, sparse=sparse))


def test_few_rows_run_dense_by_default(cuda, monkeypatch):
    """And so without pruning, in the same bits as with `sparse` False."""
    monkeypatch.setattr("sparse24.experts.pays", pays)
    x, offsets = rows(BF16, cuda)
    w1, w2 = weights(BF16, cuda)
    assert not pays(len(x), len(w1)) and pays(10**6, len(w1))
    out = sparse24.relu2_experts(x, w1, w2, offsets)
    assert_same_bits(out, sparse24.relu2_experts(x, w1, w2, offsets, sparse=False))
    expected = one_by_one(x, w1, w2, offsets, sparse=False)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize("seed", range(12))
def test_offsets_of_any_kind(device, seed):
    """Random numbers of rows: many experts without any, all rows of one expert, rows that belong to nobody."""
    dice = torch.Generator().manual_seed(seed)
    experts = int(torch.randint(1, 9, (), generator=dice))
    counts = torch.randint(0, (2, 9, 140)[seed % 3], (experts,), generator=dice)
    counts *= torch.rand(experts, generator=dice) < (0.4, 0.8, 1.0)[seed // 4]
    dtype = torch.float32 if device == "cpu" else BF16
    x, offsets = rows(dtype, device, counts.tolist(), beyond=int(torch.randint(0, 140, (), generator=dice)))
    w1, w2 = weights(dtype, device, experts)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for sparse in (True, False):
        own = leaves(x, w1, w2)
        out = together(*own, offsets, sparse=sparse)
        dx, dw1, dw2 = torch.autograd.grad(out, own, torch.ones_like(out))
        expected = one_by_one(x, w1, w2, offsets, sparse=sparse)
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * max(1, expected.abs().max().item()))
        unused = (counts == 0).to(device)
        assert not dw1[unused].any() and not dw2[unused].any() and dx.isfinite().all()


def test_weight_gradients_are_not_worse_than_those_of_relu2_mlp(device):
    """In the distance from those of the network with the mask of the forward pass, by at most 1.3 times."""
    counts = (64, 0, 200, 33)
    x, offsets = rows(BF16, device, counts)
    inputs = x, *weights(BF16, device, len(counts))
    grad = normal(len(x), OUT, dtype=BF16, seed=5).to(device)
    exact = torch.autograd.grad(
        one_by_one(*(own := leaves(*inputs)), offsets, recipe=sparse24.Recipe("dense")), own[1:], grad
    )
    theirs = torch.autograd.grad(one_by_one(*(own := leaves(*inputs)), offsets), own[1:], grad)
    for run in (sparse24.relu2_experts, together):
        ours = torch.autograd.grad(run(*(own := leaves(*inputs)), offsets), own[1:], grad)
        for mine, other, e in zip(ours, theirs, exact, strict=True):
            assert (mine - e).float().norm() <= 1.3 * (other - e).float().norm() + 2e-2 * e.float().norm()
