"""The programs of docs/guide/sparse_weights.md run, and do what it says."""

import re

import torch
from convert_models import assert_near
from recipes import run


def test_train(capsys):
    names, ops = run("Train")
    printed = re.fullmatch(r"loss (\d\.\d{4}), flips (\d\.\d{3})\n", capsys.readouterr().out)
    assert 0 < float(printed[1]) < 1.2 and 0 <= float(printed[2]) < 0.5
    assert ops.sparse > 0
    mlp, x = names["mlp"], names["x"]
    assert getattr(mlp, "up_left", None) is None and len(list(mlp.parameters())) == 2
    assert_near([mlp(x)], [names["y"]], 5e-2)


def test_a_trained_dense_model(capsys):
    names, _ = run("A trained dense model")
    errors = [float(text) for text in re.findall(r"error (\d\.\d{3})", capsys.readouterr().out)]
    assert len(errors) == 3 and errors[0] > errors[1] > errors[2] > 0
    with torch.no_grad():
        assert type(names["model"]).__name__ == "MLP" and torch.equal(names["model"](names["x"]), names["dense"])
