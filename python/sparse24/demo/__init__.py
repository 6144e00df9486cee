"""The whole story on one machine: real text, a trained model, its FFNs dense and 2:4, verified."""
