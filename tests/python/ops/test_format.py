"""The metadata helpers of sparse24._C against the bit offsets of CUTLASS's layout, and a few bytes by hand."""

import numpy as np
import oracle
import pytest
import torch

from sparse24 import _C

NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float8_e4m3fn": oracle.FP8}
LEGAL = np.array([0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110], dtype=np.uint8)
SHAPES = [(0, 32), (32, 0), (1, 32), (4, 4), (5, 96), (127, 64), (129, 160), (300, 352), (3, 15680)]


def nibbles_of(rows, cols, dim, seed=0):
    m, k = (rows, cols) if dim == -1 else (cols, rows)
    return LEGAL[np.random.default_rng(seed).integers(0, 6, (m, -(-k // 4)))]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_equals_the_oracle(name, dim, shape):
    nibbles = nibbles_of(*shape, dim)
    packed = _C.pack_meta(nibbles, *shape, name, dim)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, oracle.pack_meta(nibbles, NAMES[name]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_is_the_inverse(name, dim, shape):
    nibbles = nibbles_of(*shape, dim, seed=1)
    unpacked = _C.unpack_meta(oracle.pack_meta(nibbles, NAMES[name]), *shape, name, dim)
    assert unpacked.dtype == np.uint8
    np.testing.assert_array_equal(unpacked, nibbles)


def test_bytes(name, dim):
    for shape in [*SHAPES, (65536, 32768)]:
        assert _C.meta_bytes(*shape, name, dim) == oracle.meta_bytes(*shape, NAMES[name], dim)


def test_four_by_four_by_hand():
    """Rows keep (0,1) (0,2) (1,3) (2,3): nibbles 4, 8, D, E, each in the low half of a byte."""
    nibbles = np.array([[0x4], [0x8], [0xD], [0xE]], dtype=np.uint8)
    sixteen_bit = _C.pack_meta(nibbles, 4, 4, "bfloat16")
    assert sixteen_bit.size == 128 * 64 // 8
    # 16 bits: rows are 8 bytes apart (row r + 8 and 32 more columns lie between them).
    assert [hex(b) for b in sixteen_bit[[0, 8, 16, 24]]] == ["0x44", "0x48", "0x4d", "0x4e"]
    # fp8: rows are 16 bytes apart, one for each 8 of 128 columns.
    fp8 = _C.pack_meta(nibbles, 4, 4, "float8_e4m3fn")
    assert [hex(b) for b in fp8[[0, 16, 32, 48]]] == ["0x44", "0x48", "0x4d", "0x4e"]
    for packed in (sixteen_bit, fp8):
        assert (packed != 0x44).sum() == 3


def test_four_by_eight_along_tokens_by_hand():
    """X [4, 8] along tokens: A has 8 rows (the columns of X) and one group each."""
    nibbles = np.full((8, 1), 0x4, dtype=np.uint8)
    nibbles[5] = 0x9
    packed = _C.pack_meta(nibbles, 4, 8, "float16", -2)
    assert packed[5 * 8] == 0x49 and (packed != 0x44).sum() == 1


def test_eight_by_sixty_four_by_hand():
    """The 16 groups of row 0 in the 16-bit order: bytes 0, 1 (k 0-15), 64, 65 (16-31), 4, 5 (32-47), 68, 69 (48-63)."""
    nibbles = np.full((8, 16), 0x4, dtype=np.uint8)
    nibbles[0] = [0x8, 0x9, 0xC, 0xD, 0xE, 0x8, 0x9, 0xC, 0xD, 0xE, 0x8, 0x9, 0xC, 0xD, 0xE, 0x8]
    packed = _C.pack_meta(nibbles, 8, 64, "bfloat16")
    order = [0, 1, 64, 65, 4, 5, 68, 69]
    assert [int(b) for b in packed[order]] == [0x98, 0xDC, 0x8E, 0xC9, 0xED, 0x98, 0xDC, 0x8E]
    assert (np.delete(packed, order) == 0x44).all()


def test_refusals():
    with pytest.raises(RuntimeError, match=r"expected meta to have 1024 elements, got 7"):
        _C.unpack_meta(np.zeros(7, np.uint8), 4, 16, "bfloat16")
    with pytest.raises(RuntimeError, match=r"expected nibbles to have shape \(4, 4\)"):
        _C.pack_meta(np.full((4, 5), 4, np.uint8), 4, 16, "bfloat16")
    with pytest.raises(RuntimeError, match=r"i0 < i1 < 4, got 5"):
        _C.pack_meta(np.full((4, 4), 5, np.uint8), 4, 16, "bfloat16")
    with pytest.raises(RuntimeError, match=r"expected dim to be -1 or -2, got 0"):
        _C.meta_bytes(4, 16, "bfloat16", 0)
    with pytest.raises(RuntimeError, match=r"expected dtype to be .*, got int8"):
        _C.meta_bytes(4, 16, "int8")
