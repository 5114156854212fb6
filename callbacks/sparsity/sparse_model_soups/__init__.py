"""Sparse Model Soups: iterative magnitude pruning whose cycles start from the average of several retrained models."""
