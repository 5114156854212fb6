"""Sparse autoencoders: dictionaries of features, and codes of few of them, learned from activations."""
