"""What a table or a drawing of layers shows, and how it is called."""

#: The columns of the table and of the heat map: what they are called in each.
COLUMNS = {
    "zeros": ("zeros", "zeros"),
    "feature_groups_over_2": (">2 of 4", "groups with more than two"),
    "feature_nonzeros_dropped": ("dropped", "non-zeros dropped"),
    "feature_energy_dropped": ("energy", "energy dropped"),
    "output_error": ("error", "output error"),
    "token_nonzeros_dropped": ("tokens", "dropped along tokens"),
    "split_permuted_token_nonzeros_dropped": ("recipe", "dropped, default recipe"),
    "fp8_underflow": ("fp8", "zero in fp8"),
    "features_never_active": ("dead", "dead features"),
    "features_active_8_tokens": ("by 8", "features lit by 8 tokens"),
    "features_active_64_tokens": ("by 64", "features lit by 64"),
    "features_active_128_tokens": ("by 128", "features lit by 128"),
}
#: What the short names mean.
MEANING = """\
All in %. zeros: of the activation. >2 of 4: groups of four features with more than two non-zeros. dropped, energy:
what 2:4 drops of the non-zeros and of the energy; error: by how much that changes the output. tokens, recipe: what the
weight gradients drop of the rest, tokens in their order, and with the default recipe. fp8: non-zeros that become zero.
dead: features that no token lights; by 8, 64, 128: those that any of so many neighbouring tokens lights.
"""


def display(name: str) -> str:
    """Name a module; the model itself has none."""
    return name or "the model"
