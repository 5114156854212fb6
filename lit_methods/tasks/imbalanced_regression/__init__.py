"""Regression with skewed labels: module, losses, metrics, weights."""
