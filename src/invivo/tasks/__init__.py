"""Asking: items, options scored by their log-probabilities."""
