"""What the ops of a whole float8 step compute, op by op: their bits."""

import torch

import sparse24
from sparse24.mlp.step_fp8 import next_scales
from sparse24.mlp.tokens import put_rows


def dense_product(x, scale_x, w, scale_w, bias, dtype):
    """Of float8 codes, as torch multiplies them on a GPU and the reference on a CPU."""
    if x.is_cuda:
        w = w.contiguous().t()
        bias = None if bias is None else bias.to(torch.bfloat16)
        options = {"bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        return torch._scaled_mm(x.contiguous(), w, scale_x, scale_w, **options).to(dtype)
    out = (x.float() @ w.float().t()) * scale_x * scale_w
    return (out if bias is None else out + bias.to(torch.bfloat16)).to(torch.bfloat16).to(dtype)


def forward(x, w1, w2, scales, b1, b2, s1, s2, sparse, interleaved, threshold):
    """What `relu2_mlp_fp8` computes: its results, the scales that it used and the largest magnitudes too."""
    q, q_t, scale_x, amax_x = sparse24.quantize_fp8_both(x, scales[:1], sparse and interleaved)
    codes = []
    for w, s in ((w1, s1), (w2, s2)):
        codes.append((w, None, s) if s is not None else sparse24.quantize_fp8_both(w)[:3])
    (c1, t1, s1), (c2, t2, s2) = codes
    scale_y = scales[1:2].clone()
    if sparse:
        values, meta, _, amax_y, _ = sparse24.linear_compress(q, c1, scale_x, s1, b1, scale_y, threshold=threshold)
        out = sparse24.mm(values, meta, c2.contiguous().t(), scale_y, s2, b2, out_dtype=x.dtype)
    else:
        values, amax_y, _ = sparse24.linear_relu2(q, c1, scale_x, s1, b1, scale_y, threshold=threshold)
        meta = None
        out = dense_product(values, scale_y, c2, s2, b2, x.dtype)
    return (out, q_t, t1, t2, values, meta), (scale_x, scale_y, s1, s2), (amax_x, amax_y)


def backward(grad, saved, used, seen, scales, now, hot, count, sparse, interleaved):
    """What `relu2_mlp_fp8_gradients` computes: its results but for the next scales, and these."""
    _, x, w1, w2, values, meta = saved
    scale_x, scale_y, s1, s2 = used
    interleaved = sparse and interleaved
    q, q_t, scale_grad, amax_grad = sparse24.quantize_fp8_both(grad, scales[2:3], interleaved)
    operands = q, w2[:, : grad.shape[1]].contiguous(), values
    given = scale_grad, s2, scale_y, scales[3:].clone()
    scale_dh = given[-1]
    if sparse:
        if hot is None and count:
            hot = sparse24.densest_features(sparse24.feature_counts(values, meta, fp8_meta=True), count)
        made = sparse24.linear_gradient_fp8(*operands, meta, *given, interleaved, hot)
        dh, dh_tokens, dh_meta, y_tokens, y_meta, y_hot, dh_hot, amax_dh, _ = made
        dx = sparse24.mm(dh, meta, w1.t(), scale_dh, s1, out_dtype=grad.dtype)
        dw1 = sparse24.mm(dh_tokens, dh_meta, x.t(), scale_dh, scale_x, dim=-2, out_dtype=grad.dtype)
        options = {"dim": -2, "out_dtype": grad.dtype, "transpose_out": True}
        dw2 = sparse24.mm(y_tokens, y_meta, q_t.t(), scale_y, scale_grad, **options)
        if hot is not None and len(hot):
            put_rows(dw1, hot, dense_product(dh_hot, scale_dh, x, scale_x, None, grad.dtype))
            put_rows(dw2, hot, dense_product(q_t, scale_grad, y_hot, scale_y, None, grad.dtype), transpose=True)
    else:
        dh, dh_t, y_t, amax_dh, _ = sparse24.linear_relu2_gradient_fp8(*operands, *given)
        dx = dense_product(dh, scale_dh, w1[:, : dh.shape[1]], s1, None, grad.dtype)
        dw1 = dense_product(dh_t, scale_dh, x, scale_x, None, grad.dtype)
        dw2 = dense_product(q_t, scale_grad, y_t, scale_y, None, grad.dtype)
    found = next_scales(scales, torch.cat((*seen, amax_grad, amax_dh)))
    return (dx, dw1, dw2, dh), torch.where(now == scales, found, found.maximum(now))
