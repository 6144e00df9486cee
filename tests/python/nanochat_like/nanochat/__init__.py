"""A package that is laid out as nanochat is: what the benchmark of its steps uses has the names that it has there."""
