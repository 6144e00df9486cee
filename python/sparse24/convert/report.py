"""What a conversion did, and says of it."""

from collections import Counter
from dataclasses import dataclass, field

_LOOKED_FOR = "two linear layers or weights, [F, D] and [D_out, F], and a squared ReLU between them"


@dataclass
class ConvertReport:
    """What `convert` did.

    Attributes
    ----------
    converted : list of str
        Names of the modules.
    skipped : dict of str to str
        Names of further feed-forward networks, and why each was left as it is.
    evaluation_only : list of str
        Which of the converted run as before conversion in training, where they have dropout or the like.
    near_misses : dict of str to str
        Names of modules whose code mentions squared ReLU, and why each is no feed-forward network of two layers.
    looked_at : int
        How many modules of the model own other modules or two weights.
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    evaluation_only: list[str] = field(default_factory=list)
    near_misses: dict[str, str] = field(default_factory=dict)
    looked_at: int = 0

    def __str__(self) -> str:
        text = f"sparse24: converted {len(self.converted)} of {len(self.converted) + len(self.skipped)}"
        if self.evaluation_only:
            text += f" ({len(self.evaluation_only)} in evaluation only: in training they have dropout or the like)"
        if self.skipped:
            counts = Counter(self.skipped.values())
            reasons = [reason if len(counts) == 1 else f"{count}: {reason}" for reason, count in counts.most_common()]
            text += f", skipped {len(self.skipped)} ({'; '.join(reasons)})"
        elif not self.converted and (looked_at := self.looked_at or len(self.near_misses)):
            text += f": none of {looked_at} {'modules' if looked_at > 1 else 'module'} has {_LOOKED_FOR}"
        if self.near_misses:
            text += "\nnear misses, of which parts can run `sparse24.relu2_mlp`:"
            for reason in dict.fromkeys(self.near_misses.values()):
                names = [name or "the model" for name, found in self.near_misses.items() if found == reason]
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                text += f"\n  {', '.join(names[:3])}{more}: {reason}"
        return text
