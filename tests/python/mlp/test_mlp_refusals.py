"""Wrong arguments of relu2_mlp: the argument, the rule and the value in one sentence."""

import pytest
import torch
from oracle import FP8
from small_network import tokens, weights

import sparse24

REFUSALS = {
    "x dtype": (lambda x, w1, w2: (x.double(), w1, w2), {}, "x to be .*, got float64"),
    "x scalar": (lambda x, w1, w2: (x[0, 0], w1, w2), {}, "x to have at least 1 dimension, got 0"),
    "x features": (lambda x, w1, w2: (x[:, 1:], w1, w2), {}, "x to have 64 features .*, got 63"),
    "w1 rank": (lambda x, w1, w2: (x, w1[0], w2), {}, "w1 to have 2 dimensions, got 1"),
    "w1 dtype": (lambda x, w1, w2: (x, w1.double(), w2), {}, "w1 to be .*, got float64"),
    "w2 columns": (lambda x, w1, w2: (x, w1, w2[:, 16:]), {}, "w2 to have 160 columns .*, got 144"),
    "b1 rank": (lambda x, w1, w2: (x, w1, w2, w1[:, :1]), {}, r"b1 to have shape \[160\] .*, got \[160, 1\]"),
    "b1 dtype": (lambda x, w1, w2: (x, w1, w2, w1[:, 0].double()), {}, "b1 to be .*, got float64"),
    "b1 shape": (lambda x, w1, w2: (x, w1, w2, w1[:1, 0]), {}, r"b1 to have shape \[160\] .*, got \[1\]"),
    "b2 shape": (lambda x, w1, w2: (x, w1, w2, None, w2[:1, 0]), {}, r"b2 to have shape \[48\] .*, got \[1\]"),
    "precision": (lambda *t: t, {"precision": "int4"}, 'precision to be .*, got "int4"'),
    "min_tokens": (lambda *t: t, {"min_tokens": -1}, "min_tokens to be at least 0, got -1"),
    "a fraction": (lambda *t: t, {"min_tokens": 2.5}, "min_tokens to be a whole number, got 2.5"),
    "no number": (lambda *t: t, {"min_tokens": "3"}, "min_tokens to be a whole number, got 3"),
    "fused": (lambda *t: t, {"fused": "no"}, "fused to be True or False, got no"),
    "recompute": (lambda *t: t, {"recompute": 2}, "recompute to be True or False, got 2"),
    "sparse": (lambda *t: t, {"sparse": None}, "sparse to be True or False, got None"),
    "scales_known": (lambda *t: t, {"scales_known": "x"}, "scales_known to be True or False, got x"),
    "weights_pruned": (lambda *t: t, {"weights_pruned": "x"}, "weights_pruned to be True or False, got x"),
    "layout": (lambda x, w1, w2: (x.to_sparse(), w1, w2), {}, "x to be dense .*, got torch.sparse_coo"),
    "layout of w2": (lambda x, w1, w2: (x, w1, w2.to_sparse()), {}, "w2 to be dense .*, got torch.sparse_coo"),
    "nested": (
        lambda x, w1, w2: (torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged), w1, w2),
        {},
        "x to be dense .*, got a nested tensor",
    ),
    "one fp8 weight": (lambda x, w1, w2: (x, w1.to(FP8), w2), {}, "w2 to be float8_e4m3fn .*, got bfloat16"),
    "no scale": (lambda x, w1, w2: (x, w1.to(FP8), w2.to(FP8)), {}, "w1_scale .*, got None"),
    "scale_y in 16 bits": (lambda *t: t, {"scale_y": torch.ones(1)}, "scale_y to be None .*, got a tensor"),
    "scale_y dtype": (
        lambda *t: t,
        {"precision": "fp8", "scale_y": torch.ones(1).double()},
        "scale_y to be float32, got float64",
    ),
    "scale_y size": (
        lambda *t: t,
        {"precision": "fp8", "scale_y": torch.ones(7)},
        r"scale_y to have 1 or 8 elements \(tokens\), got 7",
    ),
    "scale of 16-bit": (lambda *t: t, {"w1_scale": torch.ones(1)}, "w1_scale to be None .*"),
    "16bit of fp8": (
        lambda x, w1, w2: (x, w1.to(FP8), w2.to(FP8)),
        {"precision": "16bit"},
        'precision to be .*"16bit"',
    ),
    "fp8 columns of w1": (
        lambda x, w1, w2: (x[:, :56], w1[:, :56], w2),
        {"precision": "fp8"},
        "w1 to have a multiple of 16 columns for fp8, got 56",
    ),
    "fp8 rows of w1": (
        lambda x, w1, w2: (x, w1[:152], w2[:, :152]),
        {"precision": "fp8"},
        "w1 to have a multiple of 16 rows for fp8, got 152",
    ),
    "fp8 rows of w2": (
        lambda x, w1, w2: (x, w1, w2[:40]),
        {"precision": "fp8"},
        "w2 to have a multiple of 16 rows for fp8, got 40",
    ),
    "scale_y_factor size": (
        lambda *t: t,
        {"precision": "fp8", "scale_y_factor": torch.ones(2)},
        "scale_y_factor to have 1 element, got 2",
    ),
    # On the meta device: elsewhere than x, on every machine.
    "w1 device": (lambda x, w1, w2: (x, w1.to("meta"), w2), {}, "w1 to be on .* as x is, got meta"),
    "w2 device": (lambda x, w1, w2: (x, w1, w2.to("meta")), {}, "w2 to be on .* as x is, got meta"),
    "b1 device": (lambda x, w1, w2: (x, w1, w2, w1[:, 0].to("meta")), {}, "b1 to be on .* as x is, got meta"),
    "b2 device": (lambda x, w1, w2: (x, w1, w2, None, w2[:, 0].to("meta")), {}, "b2 to be on .* as x is, got meta"),
    "scale_y device": (
        lambda *t: t,
        {"precision": "fp8", "scale_y": torch.ones(1, device="meta")},
        "scale_y to be on .* as x is, got meta",
    ),
    "scale_y_factor device": (
        lambda *t: t,
        {"precision": "fp8", "scale_y_factor": torch.ones(1, device="meta")},
        "scale_y_factor to be on .* as x is, got meta",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(device, name):
    change, options, sentence = REFUSALS[name]
    w1, w2, _, _ = weights(torch.bfloat16, device)
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_mlp: expected {sentence}"):
        sparse24.relu2_mlp(*change(tokens(8, torch.bfloat16, device), w1, w2), **options)


@pytest.mark.parametrize("owner", ["w1", "w2"])
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda scale: None, "to be a tensor for a float8 weight, got None"),
        (lambda scale: scale.double(), "to be float32, got float64"),
        (lambda scale: scale.expand(7), r"to have 1 or \d+ elements \(rows of {}\), got 7"),
        (lambda scale: scale.to("meta"), "to be on .* as {} is, got meta"),
    ],
    ids=["none", "dtype", "size", "device"],
)
def test_refused_scales_of_weights(device, owner, wrong, sentence):
    w1, w2, _, _ = weights(torch.bfloat16, device)
    scales = {f"{name}_scale": torch.ones(1, device=device) for name in ("w1", "w2")}
    scales[f"{owner}_scale"] = wrong(scales[f"{owner}_scale"])
    sentence = sentence.format(owner)
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_mlp: expected {owner}_scale {sentence}$"):
        sparse24.relu2_mlp(tokens(8, torch.bfloat16, device), w1.to(FP8), w2.to(FP8), **scales)


REFUSED_PACKED = {
    "no tuple": (lambda values, meta: values, r"w1_packed to be a tuple of 2 or 3 tensors, got Tensor"),
    "one": (lambda values, meta: (values,), r"w1_packed to be a tuple of 2 or 3 tensors, got tuple"),
    "none": (lambda values, meta: (None, None), "values of w1_packed to be a Tensor, got None"),
    "swapped": (lambda values, meta: (meta, values), r"values of w1_packed to have shape \[160, 32\], got \[\d+\]"),
    "rows": (
        lambda values, meta: (values[:80], meta),
        r"values of w1_packed to have shape \[160, 32\], got \[80, 32\]",
    ),
    "device": (lambda values, meta: (values, meta.to("meta")), "metadata of w1_packed to be on .* as w1 is, got meta"),
    "adapter": (
        lambda values, meta: (values, meta, values),
        r"the right adapter of w1_packed to have shape \[rank, 64\], got \[160, 32\]",
    ),
    "adapter of another rank": (
        lambda values, meta: (values, meta, values.new_zeros(9, 64)),
        r"values of w1_packed to have shape \[160, 48\], got \[160, 32\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED_PACKED)
def test_refused_packed_weights(device, name):
    change, sentence = REFUSED_PACKED[name]
    w1, w2, _, _ = weights(torch.bfloat16, device)
    w1, *packed = sparse24.prune_pack24(w1)
    options = {"recipe": sparse24.Recipe(sparse_weights="up"), "weights_pruned": True, "min_tokens": 0}
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_mlp: expected {sentence}$"):
        sparse24.relu2_mlp(tokens(8, torch.bfloat16, device), w1, w2, **options, w1_packed=change(*packed))
