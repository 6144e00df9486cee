"""Measure feed-forward networks: nothing is timed unchecked.

The harness of the repository's benchmarks (``harness``), the inputs and rivals of the feed-forward network (``ffn``),
and the command ``sparse24 bench``.
"""
