"""Hyperparameters that are learned while a module trains."""
