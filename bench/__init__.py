"""Benchmarks of the repository: `python -m bench` lists them. Their harness is `sparse24.bench`."""
