"""What was found out about a model: numbers of each layer, and whether to convert it."""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sparse24.analyze import speed
from sparse24.analyze.columns import COLUMNS, MEANING, display
from sparse24.analyze.speed import Calls
from sparse24.terminal import percent, table

#: A layer is kept dense where 2:4 drops more of the non-zeros, or changes its output by more, than this.
MOST_DROPPED, MOST_ERROR = 0.08, 0.05
#: Zeros of a network that was not trained.
_RANDOM = (0.4, 0.6)
#: Layers that a verdict names.
_NAMED = 3


@dataclass(frozen=True)
class ModelReport:
    """What `sparse24.analyze_model` found out.

    Attributes
    ----------
    layers : dict of str to dict
        Of each feed-forward network, by the name of its module: `tokens` that were seen, `d_model`, `d_ff` and `d_out`;
        everything that `ActivationStats` has, under the same names; `feature_density`, the share of tokens that light a
        feature, at 0, 5, ... 100 % of the features in ascending order; `prefill_speedup`, `decode_speedup` and
        `training_speedup` in 16 bits, and with the suffix `_fp8` in fp8; `state`: "dense", "converted", "ReLU2MLP" or
        "ReLU2Experts"; `experts`, of a mixture, whose tokens are the choices of its router;
        `convert` and, where that is False, `reason`.
    skipped : dict of str to str
        Networks that could not be looked at, and why: what `convert` would not take, and what no batch reached.
    near_misses : dict of str to str
        As `ConvertReport.near_misses`.
    calls : Calls
        The numbers of tokens that the speed-ups are for: see `at`.
    precision : {"bf16", "fp8"}
        Which speed-ups the verdict has: those of the weights as they are.
    """

    layers: dict[str, dict[str, Any]]
    skipped: dict[str, str] = field(default_factory=dict)
    near_misses: dict[str, str] = field(default_factory=dict)
    calls: Calls = field(default_factory=Calls)
    precision: str = "bf16"

    @property
    def decisions(self) -> dict[str, bool]:
        """Whether to convert each network: for `sparse24.ConvertConfig`. Modules of this library need no conversion."""
        return {name: layer["convert"] for name, layer in self.layers.items() if not layer["state"].startswith("ReLU2")}

    @property
    def verdict(self) -> str:
        """Tell in a sentence how many networks to convert, what to expect, and which to keep dense."""
        if not self.layers and not self.skipped:
            return "no squared-ReLU feed-forward network was found"
        chosen = sum(layer["convert"] for layer in self.layers.values())
        parts = [f"convert {chosen} of {len(self.layers) + len(self.skipped)}"]
        if chosen:
            parts.append(self._expectation())
        elif self.layers and all(_RANDOM[0] < layer["zeros"] < _RANDOM[1] for layer in self.layers.values()):
            parts.append("half of all activations are zeros, as before training: train dense first")
        parts += self._kept_dense()
        if self.skipped:
            parts.append(f"{len(self.skipped)} cannot be converted ({next(iter(self.skipped.values()))})")
        return "; ".join(parts)

    def at(self, **tokens: int) -> "ModelReport":
        """Give the report with the speed-ups for other numbers of tokens in a call.

        Parameters
        ----------
        **tokens : int
            `prefill`, `decode` or `training`. By default 8,192, 8 and 16,384.
        """
        calls = replace(self.calls, **tokens)
        layers = {name: {**layer, **speed.speedups(layer, calls)} for name, layer in self.layers.items()}
        return replace(self, layers=layers, calls=calls)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity: they are None."""
        return {
            "verdict": self.verdict,
            "decisions": self.decisions,
            "tokens_per_call": asdict(self.calls),
            "speedups": {name: speed.of_all(self.layers.values(), name) for name in _speedup_names(self.layers)},
            "layers": _finite(self.layers),
            "skipped": dict(self.skipped),
            "near_misses": dict(self.near_misses),
        }

    def table(self) -> str:
        """Give a text for a terminal: numbers of each layer, what they mean, and the verdict."""
        rows = []
        for name, layer in self.layers.items():
            gains = ("-" if (gain := layer[key]) is None else f"{gain:.2f}x" for key in self._speedups().values())
            shares = (percent(layer[key], 1 if (layer[key] or 0) >= 0.0995 else 2) for key in COLUMNS)
            rows.append((display(name), *shares, *gains, "yes" if layer["convert"] else "no"))
        short, text = [name for name, _ in COLUMNS.values()], ""
        if rows:
            text = table(("layer", *short, *self._speedups(), "convert"), rows) + f"\n\n{MEANING}"
            measured = f"of the nearest size measured on an {speed.device()}"
            text += f"Speed-ups in {self.precision} over torch.compile, {measured}.\n"
        text += "".join(f"\nnot looked at: {display(name)}: {why}" for name, why in self.skipped.items())
        text += "".join(f"\nnear miss: {display(name)}: {why}" for name, why in self.near_misses.items())
        return f"{text}\n{self.verdict}".lstrip("\n")

    def __str__(self) -> str:
        return self.table()

    def csv(self) -> str:
        """Give a line of comma-separated values for each layer, and one that names them."""
        rows = [{"layer": name, **_flat(layer)} for name, layer in self.layers.items()]
        out = io.StringIO()
        writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)) or ["layer"])
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def plot(self, path: str | Path) -> None:
        """Draw the layers: all metrics as a heat map, non-zeros per group, and how dense the features are.

        Parameters
        ----------
        path : str or Path
            A file; its ending says which kind (.svg, .png, .pdf).

        Raises
        ------
        RuntimeError
            matplotlib is not installed.
        """
        try:
            from sparse24.analyze import drawing
        except ImportError as error:
            raise RuntimeError(f"sparse24.ModelReport.plot: expected matplotlib, got none: {error}") from error
        drawing.draw(self.layers, self.verdict, Path(path))

    def _speedups(self) -> dict[str, str]:
        """Name the columns of the speed-ups in the precision of the model."""
        suffix = "" if self.precision == "bf16" else "_fp8"
        return {phase: f"{phase}_speedup{suffix}" for phase in speed.PHASES}

    def _expectation(self) -> str:
        gains = {phase: speed.of_all(self.layers.values(), key) for phase, key in self._speedups().items()}
        if all(gain == 1 for gain in gains.values()):
            return "expect no speed-up: for such sizes and numbers of tokens relu2_mlp runs dense"
        said = ", ".join(
            f"{'an unmeasured speed' if gain is None else f'{gain:.2f}x'} in {'FFN ' if i == 0 else ''}{phase} "
            f"({getattr(self.calls, phase):,} tokens)"
            for i, (phase, gain) in enumerate(gains.items())
        )
        return f"expect {said} in {self.precision}"

    def _kept_dense(self) -> list[str]:
        kept = {name: layer["reason"] for name, layer in self.layers.items() if not layer["convert"]}
        said = [f"{display(name)} {reason}: keep it dense" for name, reason in list(kept.items())[:_NAMED]]
        return said + ([f"{len(kept) - _NAMED} more are to stay dense, too"] if len(kept) > _NAMED else [])


def decide(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Decide whether to convert a layer: `convert`, and the `reason` against it."""
    dropped, error = layer["feature_nonzeros_dropped"], layer["output_error"]
    reason = ""
    if math.isnan(dropped) or (error is not None and math.isnan(error)):
        reason = "is not a number on some of these tokens"
    elif dropped > MOST_DROPPED:
        reason = f"drops {percent(dropped, 0)} % of non-zeros"
    elif error is not None and error > MOST_ERROR:
        reason = f"changes its output by {percent(error, 0)} %"
    return {"convert": not reason, "reason": reason}


def _flat(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Give one value for each column."""
    flat = {key: value for key, value in layer.items() if not isinstance(value, (list, tuple))}
    return flat | {f"groups_of_{number}": share for number, share in enumerate(layer["nonzeros_per_group"])}


def _finite(value: Any) -> Any:
    """Copy numbers, lists and mappings as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _speedup_names(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [key for layer in list(layers.values())[:1] for key in layer if "_speedup" in key]
