"""FSDP2 and DDP of networks with 2:4 weights and adapters, against one process."""

import distributed_worker as worker
import pytest
import torch
from composition_models import WEIGHT_KINDS, build
from distributed_worker import WORLD, assert_ranks_near, averaged


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("wrap", ["plain", "checkpointed", "compiled"])
def test_fsdp2_of_sparse_weights(ranks, kind, wrap):
    """What is gathered is pruned, and the gradients are dense."""
    actual = ranks(worker.sharded, kind, wrap)
    expected = averaged(build(kind, ranks.device))
    assert_ranks_near([a for a, _ in actual], expected, ranks.tolerance(1e-5))


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_data_parallel_of_sparse_weights(ranks, kind):
    expected = averaged(build(kind, ranks.device))
    assert_ranks_near(ranks(worker.data_parallel, kind), expected, ranks.tolerance(1e-5))


def test_masks_and_decay_of_sharded_weights(ranks):
    """Masks are of whole weights, and the decay of each rank's part of them."""
    actual = ranks(worker.sharded_weight_pruning, 4)
    expected = worker.weight_pruning(build("weights", ranks.device, torch.float32), 4)
    assert len(actual) == WORLD
    for found, _ in actual:
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a.to(e), e, rtol=1e-4, atol=1e-5)
