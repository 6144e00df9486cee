"""A schedule inside of the training loops of others: a module for each, which imports what it is for."""
