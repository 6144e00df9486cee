"""How well activations fit 2:4: of one, and of all feed-forward networks of a model."""

from sparse24.analyze.activation import ActivationStats, activation_stats
from sparse24.analyze.model import analyze_model
from sparse24.analyze.pruning import top2_mask
from sparse24.analyze.report import ModelReport
from sparse24.analyze.weights import analyze_weights

__all__ = ["ActivationStats", "ModelReport", "activation_stats", "analyze_model", "analyze_weights", "top2_mask"]
