"""Attention over some of the keys: which keys, the product over these alone, and its place in a model."""
