"""The table of few tokens: made from records, and written as it stands."""

import pytest
from benches import run

from bench.reporting.figure_values import RESULTS
from bench.tuning import few_tokens
from sparse24 import _C, mlp
from sparse24.bench import results

FEW, DENSE = few_tokens.FEW, few_tokens.OTHERWISE


def records(d_model, times, dtype="bf16", **facts):
    """Of a size [d_model, 4 d_model]: us of both variants by tokens."""
    common = {"bench": "ffn_few_tokens", "dtype": dtype, "d_model": d_model, "d_ff": 4 * d_model, "zeros": 0.9}
    common |= {"pattern": "iid", "verified": True, "race": "forward"} | facts
    return [
        common | {"tokens": tokens, "variant": variant, "median_us": us}
        for tokens, both in times.items()
        for variant, us in zip((FEW, DENSE), both, strict=True)
    ]


def test_the_largest_number_up_to_which_it_is_nowhere_slower():
    made = [
        *records(1024, {1: (10, 20), 2: (15, 20), 4: (20, 20), 8: (21, 20), 16: (5, 20)}),
        *records(2048, {1: (21, 20), 2: (1, 20)}),
        *records(1024, {1: (1, 2), 64: (1, 2)}, "fp8"),
        *records(512, {8: (1, 2)}, zeros=0.5),  # not the usual zeros
        *records(512, {8: (1, 2)}, pattern="layer5"),
        *records(256, {8: (1, 2)}, verified=False),
        *records(256, {8: (1, None)}),  # failed
        *records(128, {1: (1, 2), 32: (1, 2)}),  # where it ends was not measured
    ]
    rows = few_tokens.rows_of(made, "a record")
    assert [tuple(row.values()) for row in rows] == [
        (16, 1024, 4096, 4, "a record"),
        (16, 2048, 8192, 0, "a record"),
        (8, 1024, 4096, 64, "a record"),
    ]


def test_the_file_is_what_it_writes(tmp_path, monkeypatch):
    path = tmp_path / "few_tokens.inc"
    path.write_text(few_tokens.TABLE.read_text())
    few_tokens.write(path, _C.few_tokens_rows())
    assert path.read_text() == few_tokens.TABLE.read_text()

    new, known = tmp_path / "new.json", _C.few_tokens_rows()[0]
    times = {1: (1, 2), known["tokens"]: (1, 2), 32: (1, 2), 64: (3, 2)}
    results.write_json(new, records(known["d_model"], times) + records(7777, {16: (1, 2), 32: (3, 2)}))
    monkeypatch.setattr(few_tokens, "TABLE", path)
    monkeypatch.setattr(few_tokens, "ROOT", tmp_path)
    before = path.read_text().splitlines()
    printed = run("fit_few_tokens", new)
    assert f"16 bits, 4096 x 16384: {known['tokens']} -> 32" in printed and "7777 x 31108: no row -> 16" in printed
    assert path.read_text().splitlines() == before
    run("fit_few_tokens", new, "--write")
    after = path.read_text().splitlines()
    changed = [line for line in after if line not in before]
    assert changed == [f'{{16, 4096, 16384, 32, "{new}"}},', f'{{16, 7777, 31108, 16, "{new}"}},']
    assert len(after) == len(before) + 1


def test_no_choice_is_slower_than_dense():
    """At the sizes of the records: the library's own table, against them."""
    path = RESULTS / "h200" / "ffn_few_tokens.json"
    if not path.exists():
        pytest.skip("no records of few tokens yet")
    times = {}
    for r in results.read_json([path]):
        if results.usual(r) and r["verified"] and r["median_us"] and r["tokens"] <= 64:
            key = r["dtype"], r["d_model"], r["d_ff"], r["tokens"]
            times.setdefault(key, {})[r["variant"]] = r["median_us"]
    losses = {}
    for (dtype, d_model, d_ff, tokens), us in times.items():
        if {FEW, DENSE} <= us.keys():
            few = tokens <= mlp.few_tokens(d_ff, d_model, fp8=dtype == "fp8")
            losses[dtype, d_model, d_ff, tokens] = us[FEW if few else DENSE] / us[DENSE] - 1
    assert len(losses) >= 30
    assert max(losses.values()) <= 0.02, {key: loss for key, loss in losses.items() if loss > 0.02}
