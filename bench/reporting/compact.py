"""Makes records small: what is committed is what tables, figures and drawings show, and whose it is.

    python -m bench compact bench/results/<gpu>/*.json

A bench writes all that it knows into its file; `merge` puts its calls together and calls this. What is left out here is
in the history of bench/results, or measured anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sparse24.bench import results

#: Facts that tell how a call went: its seed of noise, the state of the card, what the host did.
CALL = {"problem", "verified_rows", "repeatable", "iqr_us", "min_us", "rounds", "host_us", "power_w", "temperature_c"}
CALL |= {"power_limit_w", "alg_id", "split_k", "split_k_mode", "best_dense"}
ERRORS = {f"{output}_rel_error" for output in ("out", "dx", "dw1", "dw2")}
#: Ratios of these are made of their times where they are shown.
RATIOS_OF_TIMES = ("ffn_forward", "ffn_training", "ffn_weights", "experts")
#: Of a look at a GPU in training: what is drawn. The last look of a run is kept whole.
LOOKS = ("step", "zeros", "feature_nonzeros_dropped", "recipe_token_nonzeros_dropped")


def compact(records: list[results.Record]) -> list[results.Record]:
    """The records that are shown, with the facts that are; what constants are fitted to stays as it is."""
    records = [r for r in records if shown(r)]
    before = [None, *records]
    return [r if results.of_tuning(r) else _small(r, last) for last, r in zip(before, records, strict=False)]


def shown(record: results.Record) -> bool:
    """Whether a table, a figure or a drawing has it: whole networks, and products where these are compared."""
    bench, race = record["bench"], record.get("race")
    if bench == "ffn_training":
        return race in ("training", "dw1", "dw2", "gemms")
    if bench == "gemm1":
        return record.get("sizes", "large") == "large"
    if bench == "ffn_forward" and race == "gemm2":
        return record["variant"].startswith("dense")  # what relu2_mlp would take where it runs dense
    return True


def _small(record: results.Record, last: results.Record | None) -> results.Record:
    """What is kept of a record; of the driver and of the clock, that it is another one than the last record's."""
    small = {key: value for key, value in record.items() if key not in CALL}
    if small["bench"] in ("ffn_training", "ffn_weights"):  # errors of its outputs, which it was verified with
        small = {key: value for key, value in small.items() if key not in ERRORS}
    if "median_us" in small and small["race"] in ("forward", "training") and small["bench"].startswith("ffn_"):
        small.pop("tflops_dense_equivalent", None)  # rates are those of products
    if small["bench"] not in ("ffn_training", "train_gpt"):
        small.pop("peak_bytes", None)
    if "commit" in small:
        small["commit"] = small["commit"][:7]
        small.pop("sparse24", None)  # the commit says more than the version
    for key in ("driver", "sm_clock_mhz"):
        if last and small.get(key) == last.get(key):
            small.pop(key, None)
    if small["bench"] == "ffn_few_tokens":  # what variants share, ratios, errors of verified ones
        of_problem = {"rel_error", "graphs", "layers", "speedup_in_stack"}
        if small["role"] != "sparse24":
            of_problem.add("union")
        small = {key: value for key, value in small.items() if key not in of_problem}
    if small["bench"] in RATIOS_OF_TIMES:
        small = {key: value for key, value in small.items() if not key.startswith("speedup_vs_")}
    if small.get("sizes") == "large":  # as where nothing is said
        del small["sizes"]
    if "date" in small:
        small["date"] = small["date"][:10]
    looks = small.get("activations")
    if looks:
        small["activations"] = [{key: look[key] for key in LOOKS if key in look} for look in looks[:-1]] + looks[-1:]
    return small


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path)
    for path in parser.parse_args(argv).json:
        content = json.loads(path.read_text())
        if isinstance(content, list):
            results.write_json(path, compact(content))
        elif "bench" in content:  # a run of training
            path.write_text(json.dumps(_small(content, None), separators=(",", ":")) + "\n")
    return 0
