"""The squared-ReLU feed-forward network against its rivals: forward and training."""
