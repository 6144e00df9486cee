"""Networks with packed 2:4 weights in tests: small ones too, and which ops they call."""

from data import integers

from sparse24.mlp import backward, choice, forward, kept_weights, packed_weights, step_fp8

D, F, OUT = 32, 160, 64


def always(monkeypatch):
    """Pack few tokens and narrow networks too, on CUDA; forget what other tests have kept."""
    monkeypatch.setattr(choice, "MIN_WEIGHT_PRODUCTS", 0)
    monkeypatch.setattr(choice, "MIN_GRADIENT_DEPTH", 0)
    monkeypatch.setattr(choice, "MIN_FP8_GRADIENT_DEPTH", 0)
    monkeypatch.setattr(choice, "MIN_FP8_DEPTH", 0)
    kept_weights._kept.clear()
    monkeypatch.setattr(kept_weights, "_accumulating", False)


def spied(monkeypatch):
    """Names of the ops with packed weights, and of what packs them, in the order of the calls."""
    made = []

    def spy(module, name):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            made.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for module in (forward, step_fp8):
        spy(module, "linear_compress_packed")
    spy(backward, "linear_gradient_packed")
    spy(step_fp8, "linear_gradient_fp8_packed")
    spy(packed_weights, "prune_pack24")
    spy(kept_weights, "prune_quantize_fp8_both")
    spy(kept_weights, "prune_pack_fp8_both")
    return made


def operands(tokens, dtype, device, d=D):
    """Small integers: every sum of products is exact."""
    shapes = ((tokens, d), (F, d), (OUT, F), (F,), (OUT,), (tokens, OUT))
    return [integers(*s, dtype=dtype, limit=1, seed=i).to(device) for i, s in enumerate(shapes)]
