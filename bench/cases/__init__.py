"""What is timed: kernels, products, feed-forward networks, models."""
