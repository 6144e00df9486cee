"""Gradients of the float8 step on the activations of the demo's model: as accurate as those of dense float8."""

import pytest
import torch
import torch.nn.functional as F
import training_reference as reference
from oracle import FP8, Pattern, quantize_fp8

import sparse24
from sparse24 import Recipe
from sparse24.bench.reference import relative_error
from sparse24.demo.data import random_windows, read_corpus
from sparse24.demo.model import BYTES, GPT, SMALL, DenseMLP
from sparse24.demo.training import TrainConfig, train

RECIPE = Recipe(fp8_weight_gradients=True)
NAMES = ("dx", "dw1", "dw2")


@pytest.fixture(scope="module")
def layers():
    """x, w1, w2 and the gradient of the output of each layer's network, after some steps of training."""
    corpus = read_corpus([], 0, SMALL.sequence + 1)
    model = GPT(SMALL, BYTES, DenseMLP, 0, torch.float32)
    for _ in train(model, corpus.train, TrainConfig(steps=25), 0, 60):
        pass
    found = []

    def keep(module, inputs, out):
        operands = [inputs[0].detach(), module.up_proj.weight.detach(), module.down_proj.weight.detach()]
        found.append(operands)
        out.register_hook(lambda grad: operands.append(grad.detach()))

    for block in model.blocks:
        block.mlp.register_forward_hook(keep)
    model(random_windows(corpus.train, 4, SMALL.sequence + 1, torch.Generator().manual_seed(5))).backward()
    return [[t.flatten(0, -2).bfloat16() for t in operands] for operands in found]


def rounded(t):
    """With the digits of float8 and one exact scale, in float32."""
    codes, scale = quantize_fp8(t, None, "tensor")
    return codes.float() * scale


def step(x, w1, w2, grad):
    """The gradients with delayed scales, and those scales."""
    leaves = [t.clone().requires_grad_() for t in (x, w1, w2)]
    scales = torch.zeros(4)
    for known in (False, True):
        used = scales.clone()
        options = {"delayed_scales": scales, "scales_known": known, "recipe": RECIPE, "min_tokens": 0}
        found = torch.autograd.grad(sparse24.relu2_mlp(*leaves, precision="fp8", **options), leaves, grad)
    return found, used


def masks(x, w1, w2, grad, scales):
    """What the step keeps along features, and along tokens of y and dh."""
    tokens, hidden = len(x), len(w1)
    (q, s), (q1, s1) = sparse24.quantize_fp8(x, scales[:1], "tensor"), sparse24.quantize_fp8(w1, None, "tensor")
    values, meta, *_ = sparse24.linear_compress(q, q1, s, s1, None, scales[1:2])
    along_features = Pattern.of_meta(meta, tokens, hidden, FP8, -1).mask()
    y = sparse24.decompress(values, meta, tokens, hidden).float() * scales[1]
    codes, scale = quantize_fp8(grad, scales[2:3], "tensor")
    dh = ((codes.float() * scale) @ rounded(w2)).bfloat16().float() * 2 * y.sqrt()
    codes, _ = quantize_fp8(dh, scales[3:], "tensor")
    hot = reference.hot_features(y, RECIPE.hot_features(hidden))
    kept = []
    for t in (y / scales[1], codes.float()):
        mask = reference.token_mask(t.bfloat16(), RECIPE.permute_tokens)
        mask[:, hot] = True
        kept.append(mask)
    return along_features, *kept


def gradients(x, w1, w2, grad, along_features, of_y, of_dh, *, exact):
    """Dense products with entries left out: in float64, or of operands in float8."""
    if exact:
        x, w1, w2, grad = (t.double() for t in (x, w1, w2, grad))
        h = F.linear(x, w1).relu() * along_features
        y, dh = h.square(), (grad @ w2) * 2 * h
    else:
        x, w1, w2, grad = rounded(x), rounded(w1), rounded(w2), rounded(grad)
        h = (x @ w1.t()).bfloat16().float().relu() * along_features
        y = rounded(h.square().bfloat16())
        dh = rounded(((grad @ w2).bfloat16().float() * 2 * h).bfloat16())
    return dh @ w1, (dh * of_dh).t() @ x, grad.t() @ (y * of_y)


@pytest.mark.parametrize("layer", range(SMALL.layers))
def test_errors_with_the_masks_fixed(layers, layer):
    """Against float64: at most 1.1 of the errors of dense float8, which has exact scales."""
    operands = layers[layer]
    found, scales = step(*operands)
    kept = masks(*operands, scales)
    exact, dense = (gradients(*operands, *kept, exact=how) for how in (True, False))
    for name, actual, rival, truth in zip(NAMES, found, dense, exact, strict=True):
        error, of_dense = relative_error(actual, truth), relative_error(rival, truth)
        assert 0.01 < error <= 1.1 * of_dense, (name, error, of_dense)
