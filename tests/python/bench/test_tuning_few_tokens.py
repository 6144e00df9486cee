"""The table of few tokens: made from records, and written as it stands."""

import pytest
from benches import run

from bench.reporting.figure_values import RESULTS
from bench.tuning import few_tokens
from sparse24 import _C
from sparse24.bench import results
from sparse24.mlp import choice

FEW, DENSE_FEW, DENSE = few_tokens.FEW, few_tokens.DENSE_FEW, few_tokens.OTHERWISE


def records(d_model, times, dtype="bf16", **facts):
    """Of a size [d_model, 4 d_model]: us of all variants by tokens, None of what was not measured."""
    common = {"bench": "ffn_few_tokens", "dtype": dtype, "d_model": d_model, "d_ff": 4 * d_model, "zeros": 0.9}
    common |= {"pattern": "iid", "verified": True, "race": "forward"} | facts
    return [
        common | {"tokens": tokens, "variant": variant, "median_us": us}
        for tokens, all_us in times.items()
        for variant, us in zip((FEW, DENSE_FEW, DENSE), all_us, strict=True)
        if us != "not measured"
    ]


def test_the_largest_number_up_to_which_it_is_nowhere_slower():
    no = "not measured"
    made = [
        *records(
            1024, {1: (10, 20, 20), 4: (20.2, 20, 20), 8: (21, 20, 20), 16: (5, 20, 20), 32: (5, 9, 9), 64: (5, 9, 8)}
        ),
        *records(2048, {1: (21, 21, 20), 2: (1, 20, 20), 16: (9, 9, 8)}),
        *records(4096, {1: (3, 4, 5), 4: (5, 4, 5), 64: (1, 4, 5), 128: (no, 4, 5)}),  # few only until it ends
        *records(1024, {1: (1, 3, 2), 64: (1, 3, 2)}, "fp8"),
        *records(2048, {1: (1, 2, 2), 8: (3, 2, 2), 64: (3, 2, 2), 128: (no, 3, 2)}, "fp8"),
        *records(512, {8: (3, 3, 2), 16: (3, 3, 2)}, zeros=0.5),  # not the usual zeros
        *records(512, {8: (3, 3, 2), 16: (3, 3, 2)}, pattern="layer5"),
        *records(256, {8: (3, 3, 2), 16: (3, 3, 2)}, verified=False),
        *records(256, {8: (3, 3, None), 16: (3, 3, None)}),  # failed
        *records(320, {8: (3, no, 2), 16: (3, no, 2)}),  # before there was a third
        *records(5120, {1: (1, 2, 2), 64: (1, 3, 2)}),  # nothing is left for the second
        *records(6144, {1: (1, 4, 5), 8: (5, no, 9), 16: (1, 4, 5), 128: (no, 4, 5)}),  # with 8 as fast as with 16
        *records(7168, {1: (1, 4, 5), 4: (5, 4, 5), 64: (9, 4, 5), 128: (no, 4, 5)}),  # 2:4 is faster then
        records(7168, {128: (3, no, no)}, runs="2:4")[0] | {"variant": "sparse24"},
        *records(128, {1: (1, 2, 2), 32: (1, 3, 2)}),  # where the first ends was not measured
        *records(64, {1: (3, 2, 2), 32: (1, 2, 2)}),  # nor the second
    ]
    rows = few_tokens.rows_of(made, "a record")
    assert [tuple(row.values()) for row in rows] == [
        (16, 1024, 4096, 4, 32, "a record"),
        (16, 2048, 8192, 0, 0, "a record"),
        (16, 4096, 16384, 1, 128, "a record"),
        (8, 1024, 4096, 64, 0, "a record"),
        (8, 2048, 8192, 1, 64, "a record"),
        (16, 5120, 20480, 64, 0, "a record"),
        (16, 6144, 24576, 1, 128, "a record"),
        (16, 7168, 28672, 1, 64, "a record"),
    ]


def test_the_file_is_what_it_writes(tmp_path, monkeypatch):
    path = tmp_path / "few_tokens.inc"
    path.write_text(few_tokens.TABLE.read_text())
    few_tokens.write(path, _C.few_tokens_rows())
    assert path.read_text() == few_tokens.TABLE.read_text()

    new, known = tmp_path / "new.json", _C.few_tokens_rows()[0]
    times = {1: (1, 2, 2), known["tokens"]: (1, 2, 2), 32: (1, 2, 2), 64: (3, 3, 2)}
    results.write_json(new, records(known["d_model"], times) + records(7777, {16: (1, 1, 2), 32: (3, 3, 2)}))
    monkeypatch.setattr(few_tokens, "TABLE", path)
    monkeypatch.setattr(few_tokens, "ROOT", tmp_path)
    before = path.read_text().splitlines()
    printed = run("fit_few_tokens", new)
    assert f"16 bits, 4096 x 16384: {known['tokens']}, {known['dense']} -> 32, 0" in printed
    assert "7777 x 31108: no row -> 16, 0" in printed
    assert path.read_text().splitlines() == before
    run("fit_few_tokens", new, "--write")
    after = path.read_text().splitlines()
    changed = [line for line in after if line not in before]
    assert changed == [f'{{16, 4096, 16384, 32, 0, "{new}"}},', f'{{16, 7777, 31108, 16, 0, "{new}"}},']
    assert len(after) == len(before) + 1


def test_no_choice_is_slower_than_dense():
    """At the sizes of the records: the library's own table, against them."""
    path = RESULTS / "h200" / "ffn_few_tokens.json"
    if not path.exists():
        pytest.skip("no records of few tokens yet")
    times = {}
    for r in results.read_json([path]):
        if results.usual(r) and r["verified"] and r["median_us"]:
            key = r["dtype"], r["d_model"], r["d_ff"], r["tokens"]
            times.setdefault(key, {})[r["variant"]] = r["median_us"]
    losses = {}
    for (dtype, d_model, d_ff, tokens), us in times.items():
        how = {"fp8": dtype == "fp8", "is_cuda": True}
        few = choice.runs_few(tokens, d_ff, d_model, **how)
        chosen = FEW if few else DENSE_FEW if choice.runs_dense_few(tokens, d_model, d_ff, d_model, **how) else DENSE
        if {chosen, DENSE} <= us.keys():
            losses[dtype, d_model, d_ff, tokens] = us[chosen] / us[DENSE] - 1
    assert len(losses) >= 30
    assert max(losses.values()) <= 0.02, {key: loss for key, loss in losses.items() if loss > 0.02}
