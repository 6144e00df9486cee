"""Times of every kernel configuration, and the constants that follow from them."""
