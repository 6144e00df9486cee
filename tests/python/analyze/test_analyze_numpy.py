"""The numbers of analyze_model against an independent computation: NumPy, float64, all tokens at once."""

import json

import numpy as np
import pytest
import torch
from convert_models import D, Inline, Stack, randomize

import sparse24

CALLS = (130, 1, 255, 64, 7, 300)


def keeps(groups):
    """The two largest of each four in the last dimension, of equals the lower index."""
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, np.argsort(-groups, axis=-1, kind="stable")[..., :2], True, -1)
    return kept


def dropped(groups):
    """Shares: of groups with more than two, of non-zeros and of energy that are dropped."""
    lost = groups * ~keeps(groups)
    lit, energy = (groups > 0).sum(), np.square(groups).sum()
    return ((groups > 0).sum(-1) > 2).mean(), (lost > 0).sum() / lit, np.square(lost).sum() / energy


def of_calls(activation):
    """Along tokens, of each call on its own, padded to whole groups."""
    calls = np.split(activation, np.cumsum(CALLS)[:-1])
    padded = [np.pad(call, ((0, -len(call) % 4), (0, 0))) for call in calls]
    return np.concatenate([call.reshape(-1, 4, call.shape[1]).transpose(0, 2, 1) for call in padded])


def tiles(lit, size):
    """The mean share of features that whole tiles of tokens light, whatever call they came in."""
    whole = lit[: len(lit) // size * size].reshape(-1, size, lit.shape[1])
    return whole.any(1).mean()


def expected(y1, w2):
    y = np.square(np.maximum(y1, 0))
    groups = y.reshape(len(y), -1, 4)
    lost = (groups * ~keeps(groups)).reshape(y.shape)
    of_features, of_tokens = dropped(groups), dropped(of_calls(y - lost))
    names = ("groups_over_2", "nonzeros_dropped", "energy_dropped")
    return {
        "zeros": (y == 0).mean(),
        **{f"feature_{name}": share for name, share in zip(names, of_features, strict=True)},
        **{f"token_{name}": share for name, share in zip(names, of_tokens, strict=True)},
        "output_error": np.linalg.norm(lost @ w2.T) / np.linalg.norm(y @ w2.T),
        "amax": y.max(),
        "features_never_active": (y == 0).all(0).mean(),
        **{f"features_active_{size}_tokens": tiles(y > 0, size) for size in (8, 64, 128)},
        "nonzeros_per_group": tuple(((groups > 0).sum(-1) == number).mean() for number in range(5)),
    }


def test_numbers_of_calls_of_any_length():
    net = Stack(randomize(Inline(bias=True)))
    torch.nn.init.constant_(net.layers[0].c_fc.bias, -0.7)
    net.layers[0].c_fc.bias.data[:5] = -1e3  # dead features
    calls = [torch.randn(tokens, D, generator=torch.Generator().manual_seed(tokens)) for tokens in CALLS]
    layer = sparse24.analyze_model(net, iter(calls)).layers["layers.0"]
    assert layer["tokens"] == sum(CALLS)
    w1, b1, w2 = (t.detach().double().numpy() for t in (*net.layers[0].c_fc.parameters(), net.layers[0].c_proj.weight))
    y1 = torch.cat(calls).double().numpy() @ w1.T + b1
    for name, value in expected(y1, w2).items():
        assert layer[name] == pytest.approx(value, rel=1e-5), name
    density = np.sort((y1 > 0).mean(0))
    assert layer["feature_density"][0] == 0 and layer["feature_density"][-1] == pytest.approx(density[-1])
    assert layer["features_active_128_tokens"] > layer["features_active_8_tokens"] > 1 - layer["zeros"]


def test_tiles_go_on_from_call_to_call():
    """Calls of one token, as in decoding, light what one call lights."""
    net = Stack(randomize(Inline()))
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    one, many = (sparse24.analyze_model(net, calls).layers["layers.0"] for calls in ([x], x.split(1)))
    for size in (8, 64, 128):
        assert one[f"features_active_{size}_tokens"] == many[f"features_active_{size}_tokens"]
    assert one["features_active_8_tokens"] > 0.9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_no_number_is_still_json(value):
    """And a reason to keep the layer dense."""
    net = Stack(randomize(Inline()))
    report = sparse24.analyze_model(net, [torch.full((8, D), value)])
    assert report.decisions == {"layers.0": False} and "is not a number" in report.verdict
    content = report.as_dict()
    json.dumps(content, allow_nan=False)
    assert content["layers"]["layers.0"]["output_error"] is None and content["layers"]["layers.0"]["tokens"] == 8
