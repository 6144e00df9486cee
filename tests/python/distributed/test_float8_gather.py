"""FSDP2 that gathers float8 codes: the bits of FSDP2 that gathers weights and quantises them, in two processes."""

import float8_gather_worker as worker
import pytest
import torch
from distributed_worker import WORLD

import sparse24


def assert_same(results):
    """The same bits on each rank, with codes made once for the micro-batches of each of two steps."""
    assert len(results) == WORLD
    for plain, gathered, made in results:
        assert len(plain) == len(gathered) > 10 and made == 2
        for a, b in zip(plain, gathered, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "kind, wrap",
    [("module", "plain"), ("converted", "plain"), ("module", "checkpointed"), ("module", "compiled")],
)
def test_training(ranks, kind, wrap):
    assert_same(ranks(worker.trained, kind, wrap, "twice"))


@pytest.mark.parametrize("kind, wrap", [("module", "plain"), ("converted", "compiled")])
def test_training_with_one_gather(ranks, kind, wrap):
    assert_same(ranks(worker.trained, kind, wrap, "once"))


def test_weights_beside_others(ranks):
    """Of a module that is sharded as one some weights are gathered as codes and others are not."""
    assert_same(ranks(worker.trained, "module", "plain", "twice", block=True))


def test_activations_that_are_computed_again(ranks):
    assert_same(ranks(worker.trained, "module", "plain", "twice", recompute=True))


@pytest.mark.parametrize("gathers", ["twice", "once"])
def test_copy_engines(ranks, gathers, tmp_path):
    assert_same(ranks(worker.trained, "module", "plain", gathers, folder=str(tmp_path)))


@pytest.mark.parametrize("kind", ["module", "converted"])
def test_codes_are_those_of_the_whole_weight(ranks, kind):
    for seen, expected in ranks(worker.codes_in_a_step, kind):
        assert len(seen) == len(expected) == 4
        for (codes, scale), (expected_codes, expected_scale) in zip(seen, expected, strict=True):
            assert torch.equal(codes, expected_codes) and torch.equal(scale, expected_scale)


def test_evaluation(ranks):
    """It takes the numbers that codes stand for, and quantises them by row."""
    for expected, actual in ranks(worker.evaluated):
        assert (actual - expected).float().norm() < 0.2 * expected.float().norm()


def test_checkpoints(ranks, tmp_path):
    """States hold plain masters, and codes follow what is loaded."""
    for first, second, third, plain in ranks(worker.loaded, str(tmp_path)):
        assert torch.equal(first, third) and not torch.equal(first, second) and plain == [True]


def test_refusals(ranks):
    expected = {
        "parallel": "weights to be sharded by rows, and by nothing else, got [Shard(dim=1)]",
        "uneven": f"weights to have a multiple of {WORLD} rows (ranks), got 63",
        "without_memory": f"weights to have memory on {ranks.device}, got meta",
        "in_blocks": "fully_shard to have wrapped each network by itself with once=True, got ReLU2MLP",
        "recompute": "networks without recompute with once=True, got recompute=True",
        "given_up": "weights to be gathered for the backward pass too, or once=True, "
        "got memory that FSDP2 has given up",
    }
    for case in ("checkpointed", "checkpointed_converted"):
        expected[case] = (
            "nothing to compute networks again in the backward pass (activation checkpointing) with once=True, "
            "got a call of one there"
        )
    if ranks.device == "cuda":
        expected["float32"] = "fully_shard with MixedPrecisionPolicy(param_dtype=torch.bfloat16), got float32"
        expected["offloaded"] = "weights to have memory on cuda, got cpu"
    sentences = {case: f"sparse24.distributed.gather_float8: expected {rest}" for case, rest in expected.items()}
    for found in ranks(worker.refusals):
        assert found == sentences


def test_models_without_such_networks():
    what = 'model to have sharded networks with precision="fp8" whose weight gradients are float8 too, got '
    for model in (torch.nn.Linear(2, 2), sparse24.nn.ReLU2MLP(64, 160, precision="fp8")):
        with pytest.raises(RuntimeError) as refused:
            sparse24.distributed.gather_float8(model)
        assert str(refused.value) == f"sparse24.distributed.gather_float8: expected {what}{type(model).__name__}"
