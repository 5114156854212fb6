"""Sparse autoencoders: dictionaries of features for the activations of a model."""
