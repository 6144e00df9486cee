"""Draws the records of a GPU: products, the FFN forward and in training, and a GPT.

    python -m bench plot bench/results/<gpu>

writes mm.svg, ffn_forward.svg (over the number of tokens), ffn_forward_sizes.svg, ffn_few_tokens.svg, ffn_training.svg,
ffn_weights.svg, experts.svg, distributed.svg and train_gpt.svg there, of the records that there are. 90 % independent
zeros are drawn; the JSON files hold the others too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.reporting import train_table
from sparse24.bench import results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args(argv)
    from sparse24.bench import drawing

    written = 0
    for name, draw in drawings(args.folder).items():
        figure = draw()
        if figure is None:
            print(f"nothing to draw for {name}")
            continue
        path = args.folder / f"{name}.{args.format}"
        drawing.save(figure, path)
        print(path)
        written += 1
    return 0 if written else 1


def drawings(folder: Path) -> dict[str, Callable[[], Any]]:
    """Name what there is to draw of the records of a folder, as functions: of a figure, or None. Needs matplotlib."""
    from bench.reporting.plots import distributed, experts, few_tokens, forward, gpt, products, training, weights

    def records(name: str) -> list[results.Record]:
        path = folder / f"{name}.json"
        return results.read_json([path]) if path.exists() else []

    found = {
        "mm": (products.draw, records("mm")),
        "ffn_forward": (forward.draw_sweeps, records("ffn_forward")),
        "ffn_forward_sizes": (forward.draw_sizes, records("ffn_forward")),
        "ffn_few_tokens": (few_tokens.draw, records("ffn_few_tokens")),
        "ffn_training": (training.draw, records("ffn_training")),
        "ffn_weights": (weights.draw, records("ffn_weights")),
        "experts": (experts.draw, records("experts")),
        "distributed": (distributed.draw, records("distributed")),
        "train_gpt": (gpt.draw, train_table.read(folder / "train_gpt")),
        "train_gpt_1280": (gpt.draw, train_table.read(folder / "train_gpt_1280")),
    }
    return {name: partial(draw, some) for name, (draw, some) in found.items()}
