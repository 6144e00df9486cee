"""What 2:4 weights cost a trained model in loss, and what adapters give back: the model that `sparse24 demo` trains.

    python -m bench pruned_weights --out bench/results/cpu/pruned_weights.json
    python -m bench pruned_weights --checkpoint demo.pt         # trains and saves; the next call loads

`sparse24.analyze_weights` prunes the first weight of every network, or both, by magnitude or by what an entry does to
the output on training text, and fits adapters of some ranks to what was taken away. Loss on held-out text; nothing is
trained after pruning, and the activations stay dense.
"""

from __future__ import annotations

from bench.studies.accuracy import subject
from sparse24 import analyze_weights
from sparse24.bench import results
from sparse24.demo.data import even_windows
from sparse24.demo.model import SMALL

RANKS = (0, 4, 8, 16)
#: Batches to judge by and to calibrate with, and windows of each.
BATCHES, CALIBRATION, WINDOWS = 8, 2, 8


def text(records: list[results.Record]) -> str:
    """A line for each model, with the loss over that of the dense one in %."""
    dense = records[0]["dense_loss"]
    lines = [f"held-out loss {dense:.4f}; with 2:4 weights, % more, and with adapters of rank {RANKS[1:]}"]
    for start in range(0, len(records), len(RANKS)):
        some = records[start : start + len(RANKS)]
        losses = "".join(f"{100 * (r['loss'] / dense - 1):>+9.2f}" for r in some)
        lines.append(f"{some[0]['weights']:<6}{some[0]['chosen_by']:<11}{losses}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args, device, facts, corpus, model = subject(__doc__, argv)

    seen, held_out = (
        even_windows(part, count * (1 if args.smoke else WINDOWS), SMALL.sequence + 1).to(device).split(WINDOWS)
        for part, count in ((corpus.train, CALIBRATION), (corpus.held_out, 1 if args.smoke else BATCHES))
    )
    records = []
    for weights in ("up", "both"):
        for chosen, calibration in (("magnitude", None), ("outputs", seen)):
            losses = analyze_weights(model, held_out, sparse_weights=weights, ranks=RANKS, calibration=calibration)
            dense = losses.pop("dense")
            records += [
                {"bench": "pruned_weights", "variant": name, "weights": weights, "chosen_by": chosen}
                | {"rank": rank, "dim": SMALL.dim, "loss": loss, "dense_loss": dense}
                | facts
                for rank, (name, loss) in zip(RANKS, losses.items(), strict=True)
            ]
    print(text(records))
    if args.out:
        results.write_json(args.out, records)
    return 0
