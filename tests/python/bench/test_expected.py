"""What the library expects of a network's speed, from the records of the benches."""

from made_up_records import MODELS, SWEEPS, WIDE, record

from bench.reporting import expected
from bench.reporting.figures import EXPECTED, records_of
from sparse24.analyze import speed


def test_the_table_of_speeds_is_that_of_the_records():
    """The same is in `python -m bench figures --check`."""
    records = records_of(("h200",))
    assert expected.text(records) == EXPECTED.read_text()
    rows = expected.rows(records)
    found = {(race, dtype) for race, dtype, *_ in rows}
    assert found | {("decode", "bf16"), ("decode", "fp8")} == set(expected.OURS)
    assert all(0.5 < gain < 3 for *_, gain in rows) and speed.device() == "NVIDIA H200"


def test_a_row_compares_with_the_fastest_of_torch():
    rows = expected.rows([*SWEEPS, *MODELS])
    assert ["forward", "bf16", 8192, *WIDE, 1.32] in rows  # fused dense, which is ours, is no rival
    assert not [row for row in rows if row[1] == "fp8"]  # without exact scales
    exact = record(8192, WIDE, "fp8", "sparse24_fused", "part", 110.0)
    assert ["forward", "fp8", 8192, *WIDE, 1.3] in expected.rows([*SWEEPS, exact])
    assert len(rows) == len({tuple(row[:5]) for row in rows})


def test_few_tokens_are_of_networks_that_are_prepared_for_decoding():
    times = (("eager", "dense", 30.0), ("torch_compile", "dense", 24.0), ("sparse24", "sparse24", 10.0))
    few = [record(4, WIDE, "bf16", name, role, us, bench="ffn_few_tokens") for name, role, us in times]
    assert expected.rows(few) == [["decode", "bf16", 4, *WIDE, 2.4]]
