"""The comparison of machine code (tests/compare_sass.py): names do not count, instructions and their encodings do."""

from pathlib import Path

import pytest

LISTING = """
\t\tFunction : {name}
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
        /*0010*/              @!P0 {instruction} ;      /* 0x0000000000057919 */
                                                               /* {control} */
"""


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    import compare_sass

    def kernel(name, obj="a.cu.o", instruction="S2R R5, SR_TID.X", control="0x000e220000002100"):
        listing = LISTING.format(name=name, instruction=instruction, control=control)
        return compare_sass.kernels_of(listing, obj)[0]

    compare_sass.kernel = kernel
    return compare_sass


def test_renamed_and_moved_kernels_are_the_same(compare, capsys):
    assert compare.report([compare.kernel("old")], [compare.kernel("new", obj="b.cu.o")])
    assert "1 the same, 1 of them in another object" in capsys.readouterr().out


def test_an_instruction_differs(compare, capsys):
    other = compare.kernel("k", instruction="S2UR UR5, SR_TID.X", control="0x000fe20000002100")
    assert not compare.report([compare.kernel("k")], [other])
    assert "+1 S2UR, -1 S2R" in capsys.readouterr().out


def test_control_bits_differ(compare):
    """Stalls and barriers are in the second half of an encoding only."""
    assert not compare.report([compare.kernel("k")], [compare.kernel("k", control="0x000fe20000002100")])


def test_kernels_that_came_and_went(compare, capsys):
    assert not compare.report([compare.kernel("k")], [])
    assert "gone     a.cu.o  k" in capsys.readouterr().out
