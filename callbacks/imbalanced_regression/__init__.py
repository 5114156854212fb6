"""Imbalanced regression: what attaches to any regression module."""
