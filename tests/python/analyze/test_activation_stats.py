"""activation_stats on matrices that a person can check, and its mask against the op's."""

import oracle
import pytest
import torch
from data import activations

import sparse24
from sparse24.analyze import counts, top2_mask


def test_stats_by_hand(device):
    """Two tokens of eight features; squares 1 4 9 16 | 0 0 25 0 and 0 0 0 0 | 1 1 1 0."""
    y1 = torch.tensor([[1.0, 2, 3, 4, -1, 0, 5, -2], [-1, -1, -1, 0, 1, 1, 1, -3]], device=device)
    w2 = torch.ones(1, 8, device=device)
    stats = sparse24.activation_stats(y1, w2)
    assert stats.zeros == 8 / 16
    assert stats.feature_groups_over_2 == 2 / 4
    assert stats.feature_nonzeros_dropped == 3 / 8  # 1 and 4 of the first group, 1 of the last
    energy = 1 + 16 + 81 + 256 + 625 + 3
    assert stats.feature_energy_dropped == pytest.approx((1 + 16 + 1) / energy)
    # With ones as weights the outputs are 55 and 3; dropped are 5 and 1.
    assert stats.output_error == pytest.approx((26**0.5) / ((55**2 + 3**2) ** 0.5))
    assert stats.amax == 25
    assert stats.features_never_active == 1 / 8
    # Two tokens never have more than two of four.
    assert stats.token_groups_over_2 == stats.token_nonzeros_dropped == stats.token_energy_dropped == 0
    assert stats.fp8_saturated == stats.fp8_underflow == 0
    assert sparse24.activation_stats(y1).output_error is None


def test_token_stats_by_hand(device):
    """One feature group, five tokens that all keep the features 0 and 1: the smallest two of the first four go."""
    y1 = torch.zeros(5, 4, device=device)
    y1[:, 0] = torch.tensor([1.0, 2, 3, 4, 5])
    stats = sparse24.activation_stats(y1)
    assert stats.token_groups_over_2 == 1 / 8  # two groups of tokens (the second is padded) of four features
    assert stats.token_nonzeros_dropped == 2 / 5
    assert stats.token_energy_dropped == pytest.approx((1 + 16) / (1 + 16 + 81 + 256 + 625))


def test_fp8_stats_by_hand(device):
    y1 = torch.tensor([[30.0, 1, 0.01, 0]], device=device)  # squares 900, 1, 0.0001
    stats = sparse24.activation_stats(y1, fp8_scale=torch.ones(1, device=device))
    assert stats.fp8_saturated == 1 / 3 and stats.fp8_underflow == 1 / 3
    assert sparse24.activation_stats(y1).fp8_saturated == 0


def test_two_of_four_fit(device):
    y1 = torch.tensor([[1.0, 0, 2, 0, 1, 2, 3, -1], [0, 0, 0, 1, 3, 3, 0, 0]], device=device)
    stats = sparse24.activation_stats(y1)
    assert stats.feature_groups_over_2 == 1 / 4 and stats.feature_nonzeros_dropped == 1 / 8


def test_what_rounds_to_the_largest_fp8_does_not_saturate(device):
    """Squares 448, 451.6 and 484 of a scale of 1: the next number would be 480, and half of the way is 464."""
    y1 = torch.tensor([[448**0.5, 21.25, 22, 0]], device=device)
    assert sparse24.activation_stats(y1, fp8_scale=torch.ones(1, device=device)).fp8_saturated == 1 / 3


def test_tiny_rows_underflow(device):
    """The scale of a row is a normal number, as that of compress_fp8: what is far below the least one becomes zero."""
    tiny = sparse24.activation_stats(torch.tensor([[2.0**-71, 0, 0, 0]], device=device))
    assert tiny.fp8_underflow == 1 and tiny.fp8_saturated == 0
    assert sparse24.activation_stats(torch.tensor([[2.0**-65, 2.0**-69, 0, 0]], device=device)).fp8_underflow == 1 / 2


def test_energies_are_summed_in_float64(device):
    """Of pre-activations of 2^33 the fourth power is no float32."""
    y1 = torch.tensor([[2.0**33, 2.0**33, 2.0**33, 0]], device=device)
    assert sparse24.activation_stats(y1).feature_energy_dropped == pytest.approx(1 / 3)


def test_the_mask_is_that_of_compress(dim):
    x = activations(64, 96, torch.float32, seed=1)
    meta = sparse24.compress(x, dim=dim)[1]
    expected = oracle.Pattern.of_meta(meta, 64, 96, torch.float32, dim).mask()
    assert torch.equal(top2_mask(x, dim), expected)


def test_empty_and_wrong_inputs(device):
    assert sparse24.activation_stats(torch.zeros(0, 8, device=device)).zeros == 0
    with pytest.raises(
        RuntimeError, match=r"^sparse24\.activation_stats: expected y1 to have a multiple of 4 .*got \[2, 6\]"
    ):
        sparse24.activation_stats(torch.zeros(2, 6, device=device))
    with pytest.raises(
        RuntimeError, match=r"^sparse24\.activation_stats: expected w2 to have 8 columns .*got \[8, 3\]"
    ):
        sparse24.activation_stats(torch.zeros(2, 8, device=device), torch.zeros(8, 3, device=device))


def test_groups_of_every_number_of_non_zeros(device):
    y1 = torch.tensor([[-1.0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1]], device=device)
    assert sparse24.activation_stats(y1).nonzeros_per_group == pytest.approx((1 / 6, 1 / 6, 1 / 6, 1 / 6, 2 / 6))


def test_permuted_tokens_by_hand(device):
    """Tokens 0 to 3 light a feature of their own: as neighbours 2 of 4 are dropped, a quarter apart none."""
    y1 = torch.full((16, 4), -1.0, device=device)
    y1[:4, 0] = torch.tensor([1.0, 2, 3, 4])
    stats = sparse24.activation_stats(y1)
    assert stats.token_nonzeros_dropped == 2 / 4 and stats.token_groups_over_2 == 1 / 16
    assert stats.token_energy_dropped == pytest.approx((1 + 16) / (1 + 16 + 81 + 256))
    assert stats.permuted_token_nonzeros_dropped == stats.permuted_token_groups_over_2 == 0
    assert stats.permuted_token_energy_dropped == 0


def test_the_split_spares_the_features_that_most_tokens_use(device):
    """64 of 128 are spared, of equals the lower: of 100 features that all tokens light, 36 are pruned."""
    y1 = torch.full((8, 256), -1.0, device=device)
    lit = [f for f in range(256) if f % 4 < 2][:100]  # two of each group of features
    y1[:, lit] = 1.0
    stats = sparse24.activation_stats(y1)
    assert stats.token_nonzeros_dropped == 1 / 2 and stats.token_groups_over_2 == 100 / 256
    assert stats.split_token_nonzeros_dropped == pytest.approx(36 / 100 / 2)
    assert stats.split_token_groups_over_2 == 36 / 256
    assert stats.split_permuted_token_nonzeros_dropped == pytest.approx(36 / 100 / 2)
    assert stats.split_token_energy_dropped == pytest.approx(36 / 100 / 2)


def test_features_that_neighbouring_tokens_light(device):
    """Of 128 tokens each lights a feature of its own, of 256."""
    y1 = torch.full((128, 256), -1.0, device=device)
    y1[range(128), range(128)] = 1.0
    stats = sparse24.activation_stats(y1)
    assert stats.features_active_8_tokens == 8 / 256
    assert stats.features_active_64_tokens == 64 / 256
    assert stats.features_active_128_tokens == 128 / 256
    few = sparse24.activation_stats(y1[:5])  # a tile of five tokens
    assert few.features_active_8_tokens == few.features_active_128_tokens == 5 / 256
    more = sparse24.activation_stats(y1[:15])  # whole tiles alone
    assert more.features_active_8_tokens == 8 / 256


def test_slabs_and_chunks_change_nothing(monkeypatch):
    """Shares of a matrix that is looked at in parts are those of the whole, but for what is of a chunk."""
    y1 = torch.randn(320, 384, generator=torch.Generator().manual_seed(3))
    w2 = torch.randn(24, 384, generator=torch.Generator().manual_seed(1))
    whole = sparse24.activation_stats(y1, w2)
    monkeypatch.setattr(counts, "SLAB", 320 * 52)
    in_slabs = sparse24.activation_stats(y1, w2)
    monkeypatch.setattr(counts, "CHUNK", 128)
    in_chunks = sparse24.activation_stats(y1, w2)
    for name, value in whole.as_dict().items():
        assert in_slabs.as_dict()[name] == pytest.approx(value), name
        if not name.startswith(("permuted", "split")):
            assert in_chunks.as_dict()[name] == pytest.approx(value), name
    given = torch.linspace(1e-3, 1e-1, 320)  # a scale per token goes with its tokens
    saturated = sparse24.activation_stats(y1, fp8_scale=given).fp8_saturated
    monkeypatch.setattr(counts, "CHUNK", 4096)
    assert 0 < sparse24.activation_stats(y1, fp8_scale=given).fp8_saturated == saturated
