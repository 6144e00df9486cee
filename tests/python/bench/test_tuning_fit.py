"""The constants of the cost model: what its choices lose at recorded sizes, and the program that fits them."""

import pytest

from bench.reporting.figure_values import RESULTS
from bench.tuning import fit
from sparse24 import _C
from sparse24.bench import results


@pytest.fixture(scope="module")
def races():
    return fit.races_of(results.read_json([RESULTS / "h200" / "tuning.json"]))


def test_no_choice_loses_more_than_three_percent(races):
    model = _C._CostModel(_C.cost_rows())
    losses = {race[0]["problem"]: fit.regret(model, race) for race in races}
    known = {problem: loss for problem, loss in losses.items() if loss is not None}
    assert len(known) >= 40 and len(known) == len(losses), losses
    assert max(known.values()) <= 0.03, known
    assert fit.mean_regret(_C.cost_rows(), races) < 0.003


def test_other_constants_would_lose(races):
    rows = [
        row | {"value": 0.5} if row["tile"] == "128x256" and row["field"] == "throughput" else row
        for row in _C.cost_rows()
    ]
    model = _C._CostModel(rows)
    assert max(fit.regret(model, race) or 0 for race in races) > 0.1


def changed(rows, field, tile, value):
    return [row | {"value": value} if (row["field"], row["tile"]) == (field, tile) else row for row in rows]


def timed_by(rows):
    """A race of all tiles of the first GEMM at some sizes, timed by the model with these rows."""
    model = _C._CostModel(rows)
    races = []
    for tokens, d_ff, d_model in [(16384, 16384, 4096), (2048, 6656, 1664), (32768, 3072, 768), (512, 16384, 4096)]:
        race = []
        for config in _C.linear_configs("bfloat16", False):
            record = {"op": "linear_relu2", "dtype": "bf16", "tokens": tokens, "d_ff": d_ff, "d_model": d_model}
            record |= {"problem": f"{tokens} {d_ff} {d_model}", "tile": config["tile"]}
            race.append(record | {"median_us": fit.predicted_us(model, record)})
        races.append(race)
    return races


def test_a_fit_finds_the_constants_that_the_times_were_made_with():
    rows = _C.cost_rows()
    races = timed_by(changed(changed(rows, "throughput", "128x192", 1.2), "throughput", "128x64", 0.5))
    assert fit.error(rows, races) > 0.02
    fitted = fit.fit(rows, races, "a record")
    assert fit.error(fitted, races) < 0.01
    by_tile = {row["tile"]: row for row in fitted if row["product"] == "dense" and row["field"] == "throughput"}
    assert by_tile["128x192"]["value"] == pytest.approx(1.2, rel=0.02)
    assert by_tile["128x64"]["value"] == pytest.approx(0.5, rel=0.02)
    assert by_tile["128x192"]["record"] == "a record"
    assert by_tile["128x128"]["record"] == "the unit" and by_tile["128x128"]["value"] == 1


def test_a_tile_without_a_row_gets_one():
    races = timed_by(_C.cost_rows())
    rows = [r for r in _C.cost_rows() if (r["product"], r["tile"], r["field"]) != ("dense", "128x192", "throughput")]
    model = _C._CostModel(rows)
    assert all(model.fastest(*fit.problem_of(race[0]), race)["tile"] != "128x192" for race in races)
    row = fit.fit(fit.with_timed_tiles(rows, races, "a record"), races, "a record")[-1]
    assert (row["product"], row["bits"], row["tile"]) == ("dense", 0, "128x192")
    assert (row["field"], row["record"]) == ("throughput", "a record")
    assert row["value"] == pytest.approx(1.08, rel=0.03)


def test_a_fit_finds_the_rate_of_the_card():
    rows = _C.cost_rows()
    slow = [row | {"value": 2 * row["value"]} if row["field"] == "mac_us" else row for row in rows]
    fitted = fit.fit(rows, timed_by(slow), "a record")
    rates = {(row["product"], row["bits"]): row["value"] for row in fitted if row["field"] == "mac_us"}
    assert rates["dense", 16] == pytest.approx(7.3e-7, rel=0.01)
    assert rates["dense", 8] == 1.93e-7 and rates["sparse", 16] == 2.1e-7  # no record of theirs


def test_the_data_file_is_what_the_program_writes(tmp_path):
    path = tmp_path / "costs.inc"
    path.write_text(fit.COSTS.read_text())
    fit.write(path, _C.cost_rows())
    assert path.read_text() == fit.COSTS.read_text()


def test_every_constant_names_a_record_that_is_there():
    for row in _C.cost_rows():
        assert row["record"] == fit.UNIT or (fit.ROOT / row["record"]).is_file(), row
