"""The programs of docs/guide/sparse_weights.md run, and do what it says."""

import re

import torch
from convert_models import assert_near
from recipes import run


def test_train(capsys):
    names, ops = run("Train")
    lines = capsys.readouterr().out.splitlines()
    printed = [re.fullmatch(r"loss (\d\.\d{4}), flips in 10 steps (\d\.\d{3})", line) for line in lines]
    losses, flips = zip(*((float(line[1]), float(line[2])) for line in printed), strict=True)
    assert len(losses) == 3 and 0 < losses[-1] < 1.2
    assert flips[0] == 0 and all(0 < rate < 0.5 for rate in flips[1:])
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
