"""Options of a conversion, its report, and the switches of converted modules."""

import copy
import threading

import numpy as np
import pytest
import torch
from compare import assert_same_bits
from convert_models import EXACT, CountOps, D, Inline, Stack, WithModule, gradients, randomize
from data import normal
from saved import saved_bytes
from torch import nn

import sparse24
from sparse24 import ConvertConfig


def inputs(device):
    return normal(3, 11, D, dtype=torch.bfloat16, seed=5).to(device)


def build(make, device):
    return randomize(make()).to(device, torch.bfloat16)


# ---- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("not_by_few_tokens")
def test_switches(device):
    """`sparse` keeps the library's dense path, the others the module's own forward."""
    module = build(Inline, device)
    before = copy.deepcopy(module)
    sparse24.convert(module, EXACT, quiet=True)
    x = inputs(device)

    def ops_of_a_call():
        with CountOps() as ops:
            out = module(x)
        return {name for name in ops.calls if "sparse24" in name}, out

    with torch.no_grad():
        assert ops_of_a_call()[0] == {"sparse24.relu2_mlp_sparse.default"}
        module.sparse = False
        assert ops_of_a_call()[0] == {"sparse24.linear_relu2.default"}
        module.sparse = True
        module.sparse24_enabled = False
        ops, out = ops_of_a_call()
        assert not ops
        assert_same_bits(out, before(x))
        module.sparse24_enabled = True
        with sparse24.disabled():
            with sparse24.disabled():
                assert not ops_of_a_call()[0]
            assert not ops_of_a_call()[0]
        with pytest.raises(ZeroDivisionError), sparse24.disabled():
            1 / 0  # noqa: B018
        assert ops_of_a_call()[0]

        @sparse24.disabled()
        def evaluate():
            return ops_of_a_call()[0]

        assert not evaluate() and not evaluate() and ops_of_a_call()[0]


def test_overlapping_blocks(device):
    """Of generators and of threads: off until the last one ends, and on afterwards."""
    module = build(Inline, device)
    sparse24.convert(module, EXACT, quiet=True)
    x = inputs(device)

    def is_on():
        with CountOps() as ops:
            module(x)
        return ops.sparse == 1

    def block():
        with sparse24.disabled():
            yield

    first, second = block(), block()
    assert is_on()
    next(first)
    next(second)
    first.close()
    assert not is_on()
    second.close()
    assert is_on()

    opened, ended = threading.Event(), threading.Event()

    def outlast():
        with sparse24.disabled():
            opened.set()
            ended.wait(60)

    thread = threading.Thread(target=outlast)
    with sparse24.disabled():
        thread.start()
        assert opened.wait(60)
    assert not is_on()  # the switch is of the process
    ended.set()
    thread.join(60)
    assert is_on()


def test_many_threads_of_blocks():
    def enter():
        for _ in range(200):
            with sparse24.disabled():
                pass

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    module = build(Inline, "cpu")
    sparse24.convert(module, EXACT, quiet=True)
    with CountOps() as ops:
        module(inputs("cpu"))
    assert ops.sparse == 1


def test_schedule_finds_converted_modules(device):
    module = build(lambda: Stack(Inline(), WithModule(nn.GELU())), device)
    sparse24.convert(module, EXACT, quiet=True)
    schedule = sparse24.Schedule(4, dense_warmup_steps=1, dense_final_steps=1)
    counts = []
    for step in range(4):
        schedule.apply(module, step)
        with CountOps() as ops, torch.no_grad():
            module(inputs(device))
        counts.append(ops.sparse)
    assert counts == [0, 1, 1, 0]


# ---- options and the report ------------------------------------------------------------------------------------------


def test_options_reach_relu2_mlp(device):
    x = inputs(device)
    for config, options in (
        (ConvertConfig("fp8", min_tokens=0), {"precision": "fp8", "min_tokens": 0}),
        (ConvertConfig("bf16", min_tokens=34), {"sparse": False}),
        (ConvertConfig(recompute=True, min_tokens=33), {"recompute": True, "min_tokens": 0}),
        (
            ConvertConfig(recipe=sparse24.Recipe(residual=True), min_tokens=0),
            {"recipe": sparse24.Recipe(residual=True)},
        ),
    ):
        module = build(lambda: Inline(bias=True), device)
        w1, b1, w2, b2 = module.c_fc.weight, module.c_fc.bias, module.c_proj.weight, module.c_proj.bias
        options = {"min_tokens": 0, **options}
        expected = gradients(module, lambda x: sparse24.relu2_mlp(x, w1, w2, b1, b2, **options), x)  # noqa: B023
        sparse24.convert(module, config, quiet=True)
        for a, e in zip(gradients(module, module, x), expected, strict=True):
            assert_same_bits(a, e)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_recompute_saves_nothing(device, dtype):
    """The results say nothing about it: what is saved between the passes does."""
    x = inputs(device).requires_grad_()

    def saved(recompute):
        module = build(lambda: Inline(bias=True), device)
        sparse24.convert(module, ConvertConfig(dtype, min_tokens=0, recompute=recompute), quiet=True)
        return saved_bytes(lambda: module(x), (x, *module.parameters()))[0]

    assert saved(recompute=True) == 0 < saved(recompute=False)


@pytest.mark.parametrize("make", [ConvertConfig, lambda **options: sparse24.nn.ReLU2MLP(D, 64, **options)])
def test_values_of_numpy_and_torch(make):
    """What is stored is Python's, which a compiler takes for a constant, and JSON for a value."""
    for tokens, recompute in ((np.int64(40), np.bool_(True)), (torch.tensor(40), torch.tensor(True)), (40.0, 1)):
        made = make(min_tokens=tokens, recompute=recompute)
        assert type(made.min_tokens) is int and made.min_tokens == 40 and made.recompute is True


def test_filters_and_decisions(capsys):
    model = Stack(*(Inline() for _ in range(5)))
    config = ConvertConfig(
        decisions={"layers.0": False, "layers.1": "fp8", "layers.2": True}, min_tokens=0, dtype="bf16"
    )
    report = sparse24.convert(model, config, lambda module, name: module is not model.layers[4])
    assert report.converted == ["layers.1", "layers.2", "layers.3"]
    assert report.skipped == {"layers.0": "decided against", "layers.4": "filtered out"}
    text = "sparse24: converted 3 of 5, skipped 2 (1: decided against; 1: filtered out)"
    assert str(report) == text and capsys.readouterr().out == text + "\n"
    assert [model.layers[i]._sparse24.precision for i in (1, 2, 3)] == ["fp8", "16bit", "16bit"]

    report = sparse24.convert(model, quiet=True)
    assert capsys.readouterr().out == ""
    assert str(report) == "sparse24: converted 2 of 5, skipped 3 (already converted)"
    assert str(sparse24.convert(nn.Linear(2, 2), quiet=True)) == "sparse24: converted 0 of 0"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ConvertConfig("int8"), 'ConvertConfig: expected dtype to be one of .*, got "int8"'),
        (lambda: ConvertConfig(recipe={}), "ConvertConfig: expected recipe to be a sparse24.Recipe, got dict"),
        (lambda: ConvertConfig(min_tokens=-1), "ConvertConfig: expected min_tokens to be at least 0, got -1"),
        (lambda: ConvertConfig(min_tokens=0.5), "ConvertConfig: expected min_tokens to be a whole number, got 0.5"),
        (lambda: ConvertConfig(recompute="no"), "ConvertConfig: expected recompute to be True or False, got no"),
        (
            lambda: ConvertConfig(decisions={"a": "dense"}),
            "ConvertConfig: expected decisions to be True, False or one of .*, got 'dense' for a",
        ),
        (lambda: ConvertConfig(["fp8"]), r"ConvertConfig: expected dtype to be one of .*, got \"\['fp8'\]\""),
        (
            lambda: ConvertConfig(decisions={"a": [True]}),
            r"ConvertConfig: expected decisions to be True, False or one of .*, got \[True\] for a",
        ),
        (
            lambda: sparse24.nn.ReLU2MLP(D, 64, min_tokens=-1),
            "nn.ReLU2MLP: expected min_tokens to be at least 0, got -1",
        ),
        (
            lambda: sparse24.nn.ReLU2MLP(D, 64, recompute="no"),
            "nn.ReLU2MLP: expected recompute to be True or False, got no",
        ),
        (lambda: sparse24.convert("gpt"), "convert: expected model to be a torch.nn.Module, got str"),
        (lambda: sparse24.convert(Inline(), "fp8"), "convert: expected config to be a .*ConvertConfig, got str"),
        (
            lambda: sparse24.convert(Stack(Inline()), ConvertConfig(decisions={"layers.1": True})),
            'convert: expected decisions of config to name feed-forward networks of model, got "layers.1"',
        ),
        (
            lambda: ConvertConfig(recipe={"residual": True, "masks": 1}),
            "ConvertConfig: expected recipe to have the fields of sparse24.Recipe, got masks",
        ),
        (
            lambda: ConvertConfig(sparse_weights="up", calibration=torch.ones(2, D)),
            "ConvertConfig: expected calibration to be an iterable of batches, such as a list of them, got Tensor",
        ),
        (
            lambda: ConvertConfig(
                sparse_weights="both", adapters=4, recipe=sparse24.Recipe(sparse_weights="both", double_pruning=True)
            ),
            "ConvertConfig: expected recipe to prune each weight once, beside adapters, got double_pruning=True",
        ),
        (
            lambda: sparse24.convert(Inline(), None, "layers"),
            "convert: expected module_filter_fn to be a function of a module and its name, got str",
        ),
        (lambda: sparse24.analyze_weights(None, []), "analyze_weights: expected model to be a .*, got NoneType"),
        (
            lambda: sparse24.analyze_weights(Inline(), torch.ones(2, D)),
            "analyze_weights: expected batches to be an iterable of batches, such as a list of them, got Tensor",
        ),
        (
            lambda: sparse24.activation_stats(torch.ones(2, D, dtype=torch.int32)),
            "activation_stats: expected y1 to be of a floating dtype, got int32",
        ),
        (
            lambda: sparse24.distributed.use_copy_engines(None),
            "distributed.use_copy_engines: expected model to be a torch.nn.Module, got NoneType",
        ),
        (
            lambda: sparse24.distributed.gather_float8(Inline(), once="yes"),
            "distributed.gather_float8: expected once to be True or False, got yes",
        ),
        (
            lambda: sparse24.convert(Inline(), quiet="no"),
            "convert: expected quiet to be True or False, got no",
        ),
        (
            lambda: sparse24.revert(Inline(), merge="no"),
            "revert: expected merge to be True or False, got no",
        ),
        (lambda: sparse24.revert(None), "revert: expected model to be a torch.nn.Module, got NoneType"),
    ],
)
def test_wrong_arguments(make, sentence):
    with pytest.raises(RuntimeError, match=rf"^sparse24\.{sentence}$"):
        make()


@pytest.mark.parametrize("decode", [False, True], ids=["as it is", "decode"])
@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
def test_a_wrong_switch_is_refused(learns, decode):
    net = Inline()
    sparse24.convert(net, ConvertConfig(decode=decode, min_tokens=0), quiet=True)
    net.sparse = "no"
    with torch.set_grad_enabled(learns), pytest.raises(RuntimeError, match="expected sparse to be True or False, got"):
        net(torch.randn(65, D))
