"""The commands of the benchmarks: `python -m bench COMMAND`, from the root of the repository."""

import importlib
import os
import sys

#: Commands, and the modules whose `main` they call.
COMMANDS = {
    "compress": "cases.compress",
    "mm": "cases.mm",
    "ffn_forward": "cases.ffn_forward",
    "ffn_training": "cases.ffn_training",
    "ffn_few_tokens": "cases.ffn_few_tokens",
    "ffn_weights": "cases.ffn_weights",
    "experts": "cases.experts",
    "models": "cases.models",
    "generate": "cases.generate",
    "nanochat_step": "cases.nanochat_step",
    "distributed": "distributed.command",
    "train_gpt": "training.train_gpt",
    "corpus": "training.corpus",
    "accuracy": "studies.accuracy",
    "token_direction": "studies.token_direction",
    "pruned_weights": "studies.pruned_weights",
    "tune_mm": "tuning.mm",
    "tune_linear": "tuning.linear",
    "fit": "tuning.fit",
    "fit_few_tokens": "tuning.few_tokens",
    "stalls": "profiling.stalls",
    "threshold": "reporting.threshold",
    "regret": "reporting.regret",
    "merge": "reporting.merge",
    "compact": "reporting.compact",
    "report": "reporting.report",
    "train_table": "reporting.train_table",
    "figures": "reporting.figures",
    "plot": "reporting.plots",
    "run_gpu": "run_gpu",
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(f"{__doc__}\nCOMMAND --help tells more. Commands: {', '.join(COMMANDS)}")
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"python -m bench: expected a command of {known}; got {name or 'none'}", file=sys.stderr)
        return 2
    from bench.gpu import commit

    os.environ.setdefault("SPARSE24_COMMIT", commit.of_tree())
    sys.argv = [f"python -m bench {name}", *sys.argv[2:]]
    return importlib.import_module(f"bench.{COMMANDS[name]}").main()


if __name__ == "__main__":
    sys.exit(main())
