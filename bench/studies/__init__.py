"""What is measured without a clock: errors, and what pruning drops."""
